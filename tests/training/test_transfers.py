"""The loop's step gets nothing from the host but its batch: no implicit transfer, no wait."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntm_jax.training import loop
from tests.common import tiny_config


def test_a_step_transfers_nothing_implicitly(tmp_path, monkeypatch):
    make_step, taken = loop.make_step, []

    def make_guarded(*arguments):
        step = make_step(*arguments)

        def call(*arguments):
            with jax.transfer_guard("disallow"):
                taken.append(arguments[2])
                return step(*arguments)

        call.lower = step.lower
        return call

    monkeypatch.setattr(loop, "make_step", make_guarded)
    settings = tiny_config(**{"train.save_every": 9})
    loop.train(settings, str(tmp_path / "run"), progress=False, until=3)
    assert taken == [2] * 3
    # The guard sees a transfer.
    refused = pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer")
    with jax.transfer_guard("disallow"), refused:
        jax.jit(jnp.sum)(np.ones(3))
