"""The transporter: its log-determinant, its inverse, and what each output may see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

CONFIGS = [
    {},
    {"transporter_blocks": 1, "positions": "learned", "scan": True, "transporter_layers": 2},
    {"transporter_blocks": 3, "num_classes": 3, "kv_heads": 1, "steps": (2, 4)},
    {"positions": "learned", "num_classes": 2, "steps": (1,), "kv_heads": 1, "grid": (1, 5), "dim": 3},
]


def condition(config):
    """What blocks are told, a modulation [B, 6, W]."""
    return (0.3 * np.random.default_rng(0).normal(size=(2, 6, config.transporter_width))).astype(np.float32)


def clean(tiny):
    """(x [B, N, D], t [B], steps [B], label [B]): what a transporter is called with."""
    xs, t, steps, label = tiny.inputs()
    return xs[:, 0], t[:, 0], steps, label


@pytest.mark.parametrize("changes", CONFIGS)
def test_log_det_is_that_of_the_jacobian(tiny, changes):
    x, *rest = clean(tiny(**changes))
    single = tiny(**changes).transporter(x, *rest)[1]
    with jax.enable_x64(True):
        transporter = tiny(**changes, dtype=jnp.float64, transporter_dtype=jnp.float64).transporter
        jacobian, log_det = jax.device_get(jax.jit(jax.jacfwd(lambda x: transporter(x, *rest), has_aux=True))(x.astype(np.float64)))
        assert jacobian.dtype == np.float64
        for i in range(len(x)):
            sign, expected = np.linalg.slogdet(jacobian[i, :, :, i].reshape(x[i].size, x[i].size))
            assert sign == 1
            assert abs(expected) > 0.3
            # log-scales are rounded to float32, 6e-8, and summed, partly cancelling; the second is all float32
            assert log_det[i] == pytest.approx(expected, rel=1e-5)
            assert single[i] == pytest.approx(expected, rel=1e-5)


def test_a_new_transporter_is_the_identity(tiny):
    new = tiny(new=True, num_classes=2)
    x, *rest = clean(new)
    u, log_det = new.transport(x, *rest)
    np.testing.assert_array_equal(u, x)
    np.testing.assert_array_equal(log_det, 0)
    np.testing.assert_array_equal(new.invert(x, *rest), x)


@pytest.mark.parametrize("changes", CONFIGS[:3])
def test_inverse_of_256_tokens(tiny, changes):
    random = tiny(**changes, grid=(16, 16))
    x, *rest = clean(random)
    u, _ = random.transport(x, *rest)
    assert np.abs(u - x).max() > 1
    # float32 rounding, 1e-7, times exp(g) in each block and what later tokens make of it
    np.testing.assert_allclose(random.invert(u, *rest), x, atol=1e-5)


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("changes", CONFIGS[:3])
def test_cached_decoding_equals_the_conditioner(tiny, index, changes):
    block = tiny(**(changes | {"transporter_blocks": 2})).block(index)
    c, x = block.module.config, clean(tiny(**changes))[0]
    expected = block.conditioner(x, condition(c))
    assert np.abs(np.stack(expected)).max() < 1.5
    cache = (np.zeros((c.transporter_layers, len(x), c.tokens, c.kv_heads, c.head_size), np.float32),) * 2
    previous = np.full_like(x[:, 0], 7.0)  # ignored at the first token
    for n in range(c.tokens):
        *found, cache = block.decode(previous, condition(c), cache, n)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b[:, n], atol=1e-5)  # float32 sums in another order
        previous = x[:, n]


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_block_sees_only_earlier_tokens_of_its_own_order(tiny, index, positions):
    random = tiny(positions=positions, transporter_layers=2)
    block, x, told = random.block(index), clean(random)[0], condition(random.config)
    tokens = random.config.tokens

    def seen(function):  # [N, N]: how strongly output n depends on token j; examples must not interact
        jacobian = np.abs(jax.jit(jax.jacfwd(function))(x))
        assert not jacobian[0, :, :, 1].any()
        assert not jacobian[1, :, :, 0].any()
        return np.minimum(jacobian[0, :, :, 0].max((1, 3)), jacobian[1, :, :, 1].max((1, 3)))

    earlier = np.tri(tokens, k=-1, dtype=bool)
    for part in (0, 1):  # shift, log-scale: in the block's own order
        dependence = seen(lambda x, part=part: block.conditioner(x, told)[part])
        assert not dependence[~earlier].any()
        assert (dependence[earlier] > 1e-5).all()
    outputs = seen(lambda x: block(x, told)[0])
    own = np.tri(tokens, dtype=bool)
    own = own[::-1, ::-1] if index == 1 else own  # in the image's order the second block runs backwards
    assert not outputs[~own].any()
    assert (outputs[own] > 1e-5).all()


def test_channels_of_a_token_do_not_see_each_other(tiny):
    """Given the earlier tokens the map of a token is elementwise, by exp(-g)."""
    block, x, told = tiny().block(0), clean(tiny())[0], condition(tiny().config)
    jacobian = np.asarray(jax.jit(jax.jacfwd(lambda x: block(x, told)[0]))(x))
    _, g = block.conditioner(x, told)
    for i, n in np.ndindex(g.shape[:2]):
        np.testing.assert_allclose(jacobian[i, n, :, i, n], np.diag(np.exp(-g[i, n])), rtol=1e-6)  # one float32 exponential


def test_two_blocks_let_every_token_see_every_other(tiny):
    x, *rest = clean(tiny())
    jacobian = np.abs(jax.jit(jax.jacfwd(lambda x: tiny().transporter(x, *rest)[0]))(x))
    assert (jacobian[0, :, :, 0].max((1, 3)) > 1e-5).all()


def test_log_scales_are_softly_bounded(tiny):
    x, told = clean(tiny())[0], condition(tiny().config)
    m, g = tiny(log_scale_bound=0.25).block(1).conditioner(x, told)
    wide_m, raw = tiny(log_scale_bound=1e4).block(1).conditioner(x, told)
    np.testing.assert_array_equal(m, wide_m)
    assert np.abs(raw).max() > 0.3
    np.testing.assert_allclose(g, 0.25 * np.tanh(np.asarray(raw) / 0.25), atol=1e-6)  # float32 tanh; the wide one bends by raw^3 / 3e8


@pytest.mark.parametrize("change", ["level", "steps", "label"])
def test_the_condition_reaches_the_output_and_the_inverse(tiny, change):
    random = tiny(num_classes=2, steps=(2, 4))
    x, t, steps, label = clean(random)
    inputs = {"level": t, "steps": steps, "label": label}
    before = random.transport(x, *inputs.values())
    inputs[change] = {"level": t + 0.1, "steps": steps * 2, "label": (label + 1) % 3}[change]  # 2 is the null class
    after = random.transport(x, *inputs.values())
    for a, b in zip(before, after, strict=True):
        assert (np.abs(a - b).reshape(2, -1).max(1) > 1e-3).all()
    np.testing.assert_allclose(random.invert(after[0], *inputs.values()), x, atol=1e-5)  # float32 rounding, two blocks


def test_a_bfloat16_network_keeps_float32_arithmetic(tiny):
    random, exact = tiny(transporter_dtype=jnp.bfloat16), tiny()
    assert random.config.exact() == exact.config
    x, *rest = clean(random)
    (u, log_det), (expected, _) = random.transport(x, *rest), exact.transport(x, *rest)
    assert u.dtype == log_det.dtype == random.invert(u, *rest).dtype == np.float32
    assert 1e-5 < np.abs(u - expected).max() < 0.1  # bfloat16 has three digits
    # (x - m) exp(-g) of bfloat16 m and g is not itself a bfloat16 number
    assert (u != u.astype(jnp.bfloat16)).mean() > 0.9
