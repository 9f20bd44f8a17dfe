"""The transporter: its log-determinant, its inverse, and the dependence of each output.

Its outputs by their formula, with bounds and conditions, are in tests/test_reference.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntm_jax.core.conditions import Text
from ntm_jax.core.transporter import TOLERANCE
from ntm_jax.data.conditions.label import ClassCondition
from ntm_jax.data.conditions.text import TextCondition

LEARNED = {"transporter_blocks": 1, "positions": "learned", "scan": True, "transporter_layers": 2}


def condition(config):
    """A random modulation [B, 6, W] for blocks."""
    return (0.3 * np.random.default_rng(0).normal(size=(2, 6, config.transporter_width))).astype(
        np.float32)


def clean(tiny):
    """The arguments of a transporter: (x [B, N, D], t [B], steps [B], label [B])."""
    xs, t, steps, label = tiny.inputs()
    return xs[:, 0], t[:, 0], steps, label


@functools.cache
def _compiled_inverse(module, how):
    return jax.jit(functools.partial(module.apply, how=how, method=type(module).inverse))


def inverse(bound, *args, how="parallel", tolerance=TOLERANCE):
    """(x, sweeps, log-determinant) of a transporter's or a block's inverse, as numpy arrays."""
    return jax.device_get(_compiled_inverse(bound.module, how)(
        {"params": bound.weights}, *args, tolerance=tolerance))


def residual(block, x, u, modulation):
    """max |x - (m(x) + exp(g(x)) u)| / max(1, |x|) of each example, in the image's order: [B]."""
    flip = (slice(None), slice(None, None, -1 if block.module.reverse else None))
    m, g = block.conditioner(x[flip], modulation)
    new = m + np.exp(g) * u[flip]
    return (np.abs(new - x[flip]) / np.maximum(1, np.abs(new))).max((1, 2))


@pytest.mark.parametrize("changes", [
    LEARNED | {"condition": ClassCondition(2, True), "steps": (1,), "kv_heads": 1, "grid": (1, 5),
               "dim": 3},
    {"condition": TextCondition(5, True)}])
def test_log_det_is_that_of_the_jacobian(tiny, changes):
    x, *rest = clean(tiny(**changes))
    single = tiny(**changes).transporter(x, *rest)[1]
    with jax.enable_x64(True):
        transporter = tiny(**changes, dtype=jnp.float64, transporter_dtype=jnp.float64).transporter
        run = jax.jit(jax.jacfwd(lambda x: transporter(x, *rest), has_aux=True))
        jacobian, log_det = jax.device_get(run(x.astype(np.float64)))
        assert jacobian.dtype == np.float64
        for i in range(len(x)):
            sign, expected = np.linalg.slogdet(jacobian[i, :, :, i].reshape(x[i].size, x[i].size))
            assert sign == 1
            assert abs(expected) > 0.3
            # Log-scales are rounded to float32, 6e-8, and summed, partly cancelling; `single` is
            # float32 throughout.
            assert log_det[i] == pytest.approx(expected, rel=1e-5)
            assert single[i] == pytest.approx(expected, rel=1e-5)


def test_a_new_transporter_is_the_identity_and_its_positions_are_of_the_size_asked_for(tiny):
    new = tiny(new=True, condition=ClassCondition(2, True), positions="learned",
               transporter_positions_std=1.0, transporter_blocks=1, grid=(16, 16), dim=1)
    x, *rest = clean(new)
    u, log_det = new.transport(x, *rest)
    np.testing.assert_array_equal(u, x)
    np.testing.assert_array_equal(log_det, 0)
    table = new.weights["transporter"]["blocks_0"]["positions"]["table"]
    assert len(table) == 256
    assert np.std(table) == pytest.approx(1, rel=0.05)
    assert np.std(new.weights["predictor"]["positions"]["table"]) < 0.025


def test_a_text_counts_by_its_tokens_and_not_by_its_padding(tiny):
    random = tiny(condition=TextCondition(5, True))
    x, t, steps, text = clean(random)
    text = text._replace(mask=np.arange(4) < np.array([[3], [0]]))  # the second is the null caption
    u, _ = random.transporter(x, t, steps, text)
    # not a constant, which the layer norm takes away
    other = np.random.default_rng(1).normal(size=5).astype(np.float32)

    def moved(text):
        return np.abs(random.transporter(x, t, steps, text)[0] - u).max((1, 2))

    padding, token = text.states + 0, text.states + 0
    padding[0, 3:], padding[1] = other, other
    token[:, 1] += other
    np.testing.assert_array_equal(moved(text._replace(states=padding)), 0)
    longer = Text(np.pad(text.states, ((0, 0), (0, 3), (0, 0))),
                  np.pad(text.mask, ((0, 0), (0, 3))))
    np.testing.assert_array_less(moved(longer), 1e-5)  # float32 sums, other order
    by_token = moved(text._replace(states=token))
    assert by_token[0] > 1e-3
    assert by_token[1] == 0
    assert moved(text._replace(mask=np.ones((2, 4), bool))).min() > 1e-3
    for kind, y, other in ((TextCondition(5), text, text._replace(states=token)),
                           (ClassCondition(2), np.array([0, 1]), np.array([1, 2]))):
        blind = tiny(condition=kind)
        np.testing.assert_array_equal(
            blind.transport(x, t, steps, y)[0], blind.transport(x, t, steps, other)[0])


@pytest.mark.parametrize(("changes", "grid"), [
    (LEARNED, (4, 4)),
    ({"condition": ClassCondition(2, True), "kv_heads": 1, "steps": (2, 4)}, (4, 4)),
    pytest.param(LEARNED, (16, 16), marks=pytest.mark.slow)])
def test_both_inverses_undo_the_transporter(tiny, changes, grid):
    random = tiny(**changes, grid=grid)
    x, *rest = clean(random)
    u, log_det = random.transport(x, *rest)
    assert np.abs(u - x).max() > 0.5
    found = {how: inverse(random.transporter, u, *rest, how=how)
             for how in ("sequential", "parallel")}
    assert np.abs(log_det).min() > 0.1
    for back, sweeps, back_log_det in found.values():
        # float32: the error of x, times some 1 a dimension
        np.testing.assert_allclose(back_log_det, -log_det, atol=1e-5 * x[0].size)
        assert sweeps.shape == (2, random.config.transporter_blocks)
        assert sweeps.dtype == np.int32
        # float32 rounding, 1e-7, times exp(g) in each block and what later tokens make of it
        np.testing.assert_allclose(back, x, atol=1e-5)
    assert (found["sequential"][1] == random.config.tokens).all()
    assert (found["parallel"][1] <= random.config.tokens).all()
    errors = {how: np.sqrt(np.mean(np.square(back - x))) for how, (back, *_) in found.items()}
    assert errors["parallel"] < 2 * errors["sequential"]


def test_the_parallel_inverse_keeps_its_tolerance(tiny):
    """Its residual is within the tolerance, and a smaller tolerance takes more sweeps."""
    block, modulation = tiny(grid=(8, 8)).block(1), condition(tiny().config)
    u, before = clean(tiny(grid=(8, 8)))[0], 0
    for tolerance in (1e-2, 1e-4, TOLERANCE):
        x, sweeps, _ = inverse(block, u, modulation, tolerance=tolerance)
        left = residual(block, x, u, modulation)
        assert (left <= tolerance).all()
        assert (left > 1e-6).all() or tolerance < 1e-2  # the tolerance ends it
        assert (before < sweeps).all()
        assert (sweeps < 64).all()
        before = sweeps


def test_as_many_sweeps_as_tokens_are_exact(tiny):
    """Also where shifts are larger than the tokens that they depend on.

    There no sweep makes a token right before all tokens that it depends on are.
    """
    block, u, modulation = tiny().block(1), clean(tiny())[0], condition(tiny().config)
    project = block.weights["project"]
    wide = project["kernel"] * np.array([20, 20, 1, 1], np.float32)  # of two shifts, two scales
    block.weights = block.weights | {"project": project | {"kernel": wide}}
    x, sweeps, _ = inverse(block, u, modulation, tolerance=0.0)
    np.testing.assert_array_equal(sweeps, 6)
    assert (residual(block, x, u, modulation) < 2e-6).all()  # float32 rounding of another program
    expected, *_ = inverse(block, u, modulation, how="sequential")
    # rounding, 1e-7, grows tenfold with every token
    np.testing.assert_allclose(x, expected, rtol=1e-3, atol=1e-3)
    assert np.abs(x).max() > 5


def test_sweeps_survive_numbers_that_overflow(tiny):
    """u is so large, and exp(g) so small, that the network overflows at x = u, the first sweep."""
    c = tiny().config
    block, modulation = tiny(log_scale_bound=100.0).block(0), condition(c)
    bias = block.weights["project"]["bias"] - np.where(np.arange(2 * c.dim) < c.dim, 0,
                                                       65).astype(np.float32)
    block.weights = block.weights | {"project": block.weights["project"] | {"bias": bias}}
    x = clean(tiny())[0]
    u, _ = block(x, modulation)
    assert np.isfinite(u).all()
    assert np.isnan(block.conditioner(u, modulation)[0]).all()  # the first token's too
    found, sweeps, _ = inverse(block, u, modulation)
    np.testing.assert_allclose(found, x, atol=1e-4)  # a float32 log-scale of -57 is known to 4e-6
    assert (sweeps <= 6).all()


def test_a_latent_that_is_not_finite_harms_only_its_own_example(tiny):
    random = tiny()
    u, *rest = clean(random)
    expected, *_ = inverse(random.transporter, u, *rest)
    u[1, 3] = np.nan
    found, sweeps, _ = inverse(random.transporter, u, *rest)
    np.testing.assert_array_equal(found[0], expected[0])
    assert np.isnan(found[1]).any()
    np.testing.assert_array_equal(sweeps[1], 0)


def seen(function, x):
    """How much output n changes where token j of both examples moves, the lesser of them: [N, N].

    Asserts that an example does not change where the other one moves.
    """
    before, found = function(x), np.zeros((2, x.shape[1], x.shape[1]))
    for i, j in np.ndindex(x.shape[:2]):
        moved = x.copy()
        moved[i, j] += np.random.default_rng(3).normal(size=x.shape[2:])
        change = np.abs(function(moved) - before)
        assert not change[1 - i].any()
        found[i, :, j] = change[i].max(1)
    return found.min(0)


@pytest.mark.parametrize(("index", "positions"), [(0, "rotary"), (1, "learned")])
def test_a_block_depends_only_on_earlier_tokens_of_its_own_order(tiny, index, positions):
    random = tiny(positions=positions, transporter_layers=2)
    block, x, modulation = random.block(index), clean(random)[0], condition(random.config)
    tokens = random.config.tokens
    earlier = np.tri(tokens, k=-1, dtype=bool)
    for part in (0, 1):  # shift, log-scale: in the block's own order
        dependence = seen(lambda x, part=part: block.conditioner(x, modulation)[part], x)
        assert not dependence[~earlier].any()
        assert (dependence[earlier] > 1e-5).all()
    outputs = seen(lambda x: block(x, modulation)[0], x)
    own = np.tri(tokens, dtype=bool)
    # in the image's order the second block runs backwards
    own = own[::-1, ::-1] if index == 1 else own
    assert not outputs[~own].any()
    assert (outputs[own] > 1e-5).all()


def test_a_bfloat16_network_keeps_float32_arithmetic(tiny):
    random, exact = tiny(transporter_dtype=jnp.bfloat16), tiny()
    x, *rest = clean(random)
    (u, log_det), (expected, _) = random.transport(x, *rest), exact.transport(x, *rest)
    back = jax.eval_shape(random.invert, u, *rest)[0]
    assert u.dtype == log_det.dtype == back.dtype == np.float32
    assert 1e-5 < np.abs(u - expected).max() < 0.1  # bfloat16 has three digits
    # (x - m) exp(-g) of bfloat16 m and g is not itself a bfloat16 number
    assert (u != u.astype(jnp.bfloat16)).mean() > 0.9
