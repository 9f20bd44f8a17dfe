"""The loop's step gets nothing from the host but its batch: no implicit transfer, no wait."""

import jax
import pytest

from ntm_jax.training import loop
from tests.common import tiny_config


def guarded(monkeypatch, change=lambda arguments: arguments):
    """Trains with a guard against implicit transfers around each step; `change` its arguments."""
    make_step, taken = loop.make_step, []

    def make_guarded(*arguments):
        step = make_step(*arguments)

        def call(*arguments):
            with jax.transfer_guard("disallow"):
                taken.append(arguments[2])
                return step(*change(arguments))

        call.lower = step.lower
        return call

    monkeypatch.setattr(loop, "make_step", make_guarded)
    monkeypatch.setattr(loop.pictures, "draw", lambda *_: [])
    return taken


def test_a_step_transfers_nothing_implicitly(tmp_path, monkeypatch):
    taken = guarded(monkeypatch)
    loop.train(tiny_config(), str(tmp_path / "run"), progress=False)
    assert taken == [2] * 6


@pytest.mark.slow
def test_the_guard_sees_a_transfer(tmp_path, monkeypatch):
    def from_host(arguments):
        state, batch, *rest = arguments
        return state, {name: jax.device_get(value) for name, value in batch.items()}, *rest

    guarded(monkeypatch, from_host)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        loop.train(tiny_config(), str(tmp_path / "run"), progress=False)
