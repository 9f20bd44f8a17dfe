"""The watchdog's filter of standard error."""

from ntm_jax.runtime.processes import watchdog


def test_records_of_the_coordination_service_are_dropped():
    """All else that C++ writes passes. The pages are of jax 0.10.2, cut as a pipe may cut them."""
    page = (
        b"W1127 02:30:08.450651    9862 xla.cc:1] kept\n and its second line\n"
        b"E1127 02:30:08.450651    9862 coordination_service_agent.cc:289] "
        b"Polled an error from coordination service.\ngone\n"
        b"E1127 02:30:08.450651    9862 cuda.cc:2] kept\nplain\n"
        b"F1127 02:30:08.450802    9862 client.h:80] "
        b"Terminating process because the JAX distributed service detected fatal errors.\n"
        b"*** Check failure stack trace: ***\n    @ 0x7f E1127 02:30:08.450651 SetError()\n")
    expected = (b"W1127 02:30:08.450651    9862 xla.cc:1] kept\n and its second line\n"
                b"E1127 02:30:08.450651    9862 cuda.cc:2] kept\nplain\n")
    for size in (7, len(page)):
        written = []
        errors = watchdog.Filter(written.append)
        for start_of_piece in range(0, len(page), size):
            errors.feed(page[start_of_piece : start_of_piece + size])
        errors.close()
        assert b"".join(written) == expected
        assert errors.aborted
