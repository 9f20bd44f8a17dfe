"""Signals that ask a run to stop."""

import signal

import pytest

from ntm_jax.training.signals import StopRequest


@pytest.fixture
def handled():
    """Signals are handled by a function that records them, until the test ends."""
    seen, before = [], {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        before[number] = signal.signal(number, lambda number, _: seen.append(number))
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_asks_and_the_second_acts_as_before(handled, number):
    with StopRequest() as stop:
        assert not stop.agreed(0)
        signal.raise_signal(number)
        assert (stop.agreed(0), handled) == (True, [])
        signal.raise_signal(number)
        assert handled == [number]


def test_an_ignored_hangup_stays_ignored(handled):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop.agreed(0)
