"""How the processes of a job find each other at one port, before jax connects them."""

import contextlib
import re
import socket
import threading
import time

import pytest

from ntm_jax.errors import UserError
from ntm_jax.runtime.processes import rendezvous
from tests.runtime.processes.common import free_port


def meet_all(cases, timeout=5.0, pause=0.0) -> list[tuple[str, float]]:
    """(the refusal or "", seconds) of processes that meet at one port, as threads of this one.

    cases: (num_processes, process_id) of each.
    """
    address, found = f"localhost:{free_port()}", [None] * len(cases)

    def meet(place, count, number):
        begin, refusal = time.monotonic(), ""
        try:
            rendezvous.meet(address, count, number, timeout)
        except UserError as error:
            refusal = str(error)
        found[place] = (refusal, time.monotonic() - begin)

    threads = [threading.Thread(target=meet, args=(place, *case))
               for place, case in enumerate(cases)]
    for thread in threads:
        thread.start()
        time.sleep(pause)
    for thread in threads:
        thread.join()
    return found


@pytest.fixture
def quick_rendezvous(monkeypatch):
    """Repeats refusals for a shorter time, and does not wait for jax's service, which is absent."""
    monkeypatch.setattr(rendezvous, "LINGER", 0.3)
    monkeypatch.setattr(rendezvous, "_wait_for_port", lambda *_: None)


@pytest.mark.parametrize(("cases", "refusal"), [
    ([(2, 0), (3, 1)], "--num_processes is 2 in process 0 and 3 in process 1"),
    ([(3, 1), (2, 0)], "--num_processes is 2 in process 0 and 3 in process 1"),
    ([(3, 0), (2, 1)], "--num_processes is 3 in process 0 and 2 in process 1"),
    ([(3, 0), (3, 1), (2, 1)], "--num_processes is 3 in process 0 and 2 in process 1"),
    ([(3, 0), (3, 1), (3, 1)], "two processes with --process_id=1 connected to localhost:"),
    ([(2, 0), (2, 0)], "two processes with --process_id=0 connected to localhost:"),
])
def test_processes_that_are_no_job_are_refused_at_once(quick_rendezvous, cases, refusal):
    for said, seconds in meet_all(cases, pause=0.02):
        assert refusal in said
        assert seconds < 4


def test_a_process_that_comes_after_a_refusal_gets_the_same(quick_rendezvous, monkeypatch):
    monkeypatch.setattr(rendezvous, "LINGER", 1.0)
    *_, (said, seconds) = meet_all([(3, 0), (2, 1), (3, 2)], pause=0.4)
    assert "--num_processes is 3 in process 0 and 2 in process 1" in said
    assert seconds < 1


def test_a_late_process_is_waited_for_and_a_missing_one_is_named(quick_rendezvous):
    assert [said for said, _ in meet_all([(3, 2), (3, 0), (3, 1)], pause=0.3)] == ["", "", ""]
    for said, seconds in meet_all([(3, 0), (3, 1)], timeout=1.0):
        assert re.fullmatch(r"process 0 waited 1 s at localhost:\d+ for 3 processes, and these did "
                            r"not connect: 2: start them all, .*", said)
        assert seconds < 2
    (said, _), = meet_all([(2, 1)], timeout=0.5)
    assert re.fullmatch(r"process 1 waited 0.5 s at localhost:\d+ for 2 processes: start them all, "
                        r"with the address .*", said)


def test_a_process_that_is_killed_and_started_again_while_the_others_wait_is_welcome(
        quick_rendezvous):
    port, found = free_port(), []

    def meet(number):
        found.append(rendezvous.meet(f"localhost:{port}", 3, number, 10))

    first, again = (threading.Thread(target=meet, args=(number,)) for number in (0, 1))
    first.start()
    time.sleep(0.3)
    with socket.create_connection(("localhost", port)) as killed:
        killed.sendall(b'{"num_processes": 3, "process_id": 1}\n')
        time.sleep(0.3)
    again.start()
    meet(2)
    first.join()
    again.join()
    assert found == [None, None, None]


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.0 400 Bad Request\r\n"])
def test_a_port_of_another_program_is_refused(monkeypatch, greeting):
    monkeypatch.setattr(rendezvous, "SILENCE", 0.5)
    with socket.create_server(("", 0)) as other:
        address = f"localhost:{other.getsockname()[1]}"

        def answer():
            with contextlib.suppress(OSError):
                while True:
                    connections.append(other.accept()[0])
                    connections[-1].sendall(greeting)

        connections = []
        threading.Thread(target=answer, daemon=True).start()
        message = "of this machine is taken by another program or another job: choose a free port"
        with pytest.raises(UserError, match=message):
            rendezvous.meet(address, 2, 0, 20)
        message = "is not answered by process 0 of this job but by another program"
        with pytest.raises(UserError, match=message):
            rendezvous.meet(address, 2, 1, 20)
        for connection in connections:
            connection.close()


def test_an_address_is_split():
    assert rendezvous.split("host-1.example:8080") == ("host-1.example", 8080)
    assert rendezvous.split("[::1]:8080") == ("::1", 8080)
