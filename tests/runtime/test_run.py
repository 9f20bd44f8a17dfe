"""Runs: parameters read back from a workdir."""


from ntm_jax.runtime.run import restore_params
from ntm_jax.training import state
from tests.common import as_run, bits, randomised, setup, tiny_config, write_run


def test_the_ema_or_the_raw_parameters_are_read_back(tmp_path):
    settings = tiny_config()
    _, model, mesh = setup(settings)
    run = as_run(settings, model, mesh)
    write_run(tmp_path, settings)
    raw_params = state.initialize(run).params
    ema = randomised(raw_params, 2)
    for step, raw, expected in ((2, False, ema), (None, True, raw_params)):
        found, params = restore_params(run, step, raw, tmp_path)
        assert found == (step or 4)
        assert bits(params) == bits(expected)
