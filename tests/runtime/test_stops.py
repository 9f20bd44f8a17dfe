"""A signal stops a job at a point of its loop; tests/campaigns/stops.py tries all phases."""

import signal
import time

import pytest

from ntm_jax.runtime import stops

SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP


@pytest.fixture
def handled():
    """Signals are handled by a function that records them, until the test ends."""
    seen, before = [], {}
    for number in SIGNALS:
        before[number] = signal.signal(number, lambda number, _: seen.append(number))
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


def stops_in_time(watch) -> bool:
    return any(watch.point() or time.sleep(0.01) for _ in range(500))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_at_a_point_and_handlers_come_back(handled, number):
    with stops.watch() as watch:
        watch.begin()
        assert not watch.point()
        signal.raise_signal(number)
        assert stops_in_time(watch)
        assert watch.stopping
        watch.end()
    signal.raise_signal(number)
    assert handled == [number]


def test_a_second_interrupt_acts_at_once(handled):
    with stops.watch():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_an_ignored_hangup_stays_ignored(handled):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    with stops.watch() as watch:
        watch.begin()
        signal.raise_signal(signal.SIGHUP)
        time.sleep(0.05)
        assert not watch.point()
