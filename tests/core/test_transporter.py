"""The transporter: its log-determinant, its inverse, and what each output may see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ntm_jax.core import layers
from ntm_jax.core.transporter import Block, Transporter

CONFIGS = [
    {},
    {"transporter_blocks": 1, "positions": "learned", "scan": True, "transporter_layers": 2},
    {"transporter_blocks": 3, "num_classes": 3, "kv_heads": 1, "steps": (2, 4)},
    {"positions": "learned", "num_classes": 2, "steps": (1,), "kv_heads": 1, "grid": (1, 5), "dim": 3},
]


def only_transporter(tiny):
    """(module, its variables, x [B, N, D], (t [B], steps [B], label [B])) of a Tiny."""
    xs, t, steps, label = tiny.inputs()
    module = Transporter(tiny.config, layers.plain_attention)
    return module, {"params": tiny.params["params"]["transporter"]}, xs[:, 0], (t[:, 0], steps, label)


def only_block(tiny, index):
    """(module, its variables, x [B, N, D], condition [B, W]) of one block of a Tiny."""
    xs = tiny.inputs().xs
    variables = {"params": tiny.params["params"]["transporter"][f"blocks_{index}"]}
    condition = jnp.asarray(np.random.default_rng(0).normal(size=(2, tiny.config.transporter_width)), jnp.float32)
    return Block(tiny.config, index % 2 == 1, layers.plain_attention), variables, xs[:, 0], condition


@pytest.mark.parametrize("changes", CONFIGS)
def test_log_det_is_that_of_the_jacobian(tiny, changes):
    random = tiny(**changes)
    module, variables, x, rest = only_transporter(random)
    single = module.apply(variables, x, *rest)[1]
    with jax.enable_x64(True):
        model = tiny(**changes, dtype=jnp.float64, transporter_dtype=jnp.float64).model
        x = jnp.asarray(x, jnp.float64)

        def forward(x):
            return model.apply(random.params, x, *rest, method="transport")

        log_det = forward(x)[1]
        jacobian = jax.jacfwd(lambda x: forward(x)[0])(x)
        for i in range(len(x)):
            size = x[i].size
            expected = jnp.linalg.slogdet(jacobian[i, :, :, i].reshape(size, size))
            assert expected.sign == 1
            assert abs(expected.logabsdet) > 0.1
            # the conditioner's outputs are rounded to float32, 6e-8, and summed, with some cancellation
            assert log_det[i] == pytest.approx(float(expected.logabsdet), rel=1e-5)
            # the whole network in float32
            assert single[i] == pytest.approx(float(expected.logabsdet), rel=1e-5, abs=1e-5)


def test_a_new_transporter_is_the_identity(tiny):
    new = tiny(new=True, num_classes=2)
    xs, t, steps, label = new.inputs()
    for x, level in ((xs[:, 0], t[:, 0]), (xs[:, 1], t[:, 1])):
        u, log_det = new.transport(x, level, steps, label)
        np.testing.assert_array_equal(u, x)
        np.testing.assert_array_equal(log_det, 0)
        np.testing.assert_array_equal(new.invert(x, level, steps, label), x)


@pytest.mark.parametrize("changes", [{}, *CONFIGS[1:3]])
def test_inverse_of_256_tokens(tiny, changes):
    random = tiny(**changes, grid=(16, 16))
    module, variables, x, rest = only_transporter(random)
    u, log_det = jax.jit(module.apply)(variables, x, *rest)
    assert jnp.abs(u - x).max() > 0.5
    back = jax.jit(lambda u: module.apply(variables, u, *rest, method="inverse"))(u)
    # float32 rounding, 1e-7, which later tokens see and pass on, times exp(g) of at most e in each block
    assert jnp.abs(back - x).max() <= 1e-5
    again, log_det_again = jax.jit(module.apply)(variables, back, *rest)
    np.testing.assert_allclose(again, u, atol=1e-5)
    np.testing.assert_allclose(log_det_again, log_det, atol=1e-3)  # 512 log-scales, each within 1e-5 and more


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("changes", CONFIGS[:3])
def test_cached_decoding_equals_the_conditioner(tiny, index, changes):
    changes = changes | {"transporter_blocks": 2}
    block, variables, x, condition = only_block(tiny(**changes), index)
    c = block.config
    expected = block.apply(variables, x, condition, method="conditioner")
    cache = (jnp.zeros((c.transporter_layers, len(x), c.tokens, c.kv_heads, c.head_size)),) * 2
    previous = jnp.full_like(x[:, 0], 7.0)  # ignored at the first token
    for n in range(c.tokens):
        *found, cache = block.apply(variables, previous, condition, cache, n, method="decode")
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b[:, n], atol=1e-5)  # float32 sums in another order
        previous = x[:, n]


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("index", [0, 1])
def test_a_block_sees_only_earlier_tokens_of_its_own_order(tiny, index, positions):
    block, variables, x, condition = only_block(tiny(positions=positions, transporter_layers=2), index)
    tokens = block.config.tokens

    def seen(function):  # [N, N]: how strongly output n depends on token j; examples must not interact
        jacobian = np.abs(jax.jacfwd(function)(x))
        assert not jacobian[0, :, :, 1].any()
        assert not jacobian[1, :, :, 0].any()
        return (jacobian[0, :, :, 0] + jacobian[1, :, :, 1]).max((1, 3))

    earlier = np.tri(tokens, k=-1, dtype=bool)
    for part in (0, 1):  # shift, log-scale: in the block's own order
        dependence = seen(lambda x, part=part: block.apply(variables, x, condition, method="conditioner")[part])
        assert not dependence[~earlier].any()
        assert (dependence[earlier] > 1e-4).all()
    outputs = seen(lambda x: block.apply(variables, x, condition)[0])
    own = np.tri(tokens, dtype=bool)
    own = own[::-1, ::-1] if index == 1 else own  # in the image's order the second block runs backwards
    assert not outputs[~own].any()
    assert (outputs[own] > 1e-4).all()


def test_channels_of_a_token_do_not_see_each_other(tiny):
    """Given the earlier tokens the map of a token is elementwise, by exp(-g)."""
    block, variables, x, condition = only_block(tiny(), 0)
    jacobian = jax.jacfwd(lambda x: block.apply(variables, x, condition)[0])(x)
    _, g = block.apply(variables, x, condition, method="conditioner")
    for i, n in np.ndindex(2, block.config.tokens):
        np.testing.assert_allclose(jacobian[i, n, :, i, n], np.diag(np.exp(-g[i, n])), rtol=1e-6)  # one float32 exponential


def test_two_blocks_let_every_token_see_every_other(tiny):
    module, variables, x, rest = only_transporter(tiny())
    jacobian = np.abs(jax.jacfwd(lambda x: module.apply(variables, x, *rest)[0])(x))
    assert (jacobian[0, :, :, 0].max((1, 3)) > 1e-4).all()


def test_log_scales_are_softly_bounded(tiny):
    random = tiny(log_scale_bound=0.25)
    for index in (0, 1):
        block, variables, x, condition = only_block(random, index)
        wide = Block(tiny(log_scale_bound=1e4).config, block.reverse, layers.plain_attention)
        (m, g), (wide_m, raw) = (b.apply(variables, x, condition, method="conditioner") for b in (block, wide))
        np.testing.assert_array_equal(m, wide_m)
        assert jnp.abs(raw).max() > 0.5
        # tanh in float32, and the wide bound's own, raw^3 / 3e8
        np.testing.assert_allclose(g, 0.25 * np.tanh(np.asarray(raw, np.float64) / 0.25), atol=1e-6)


@pytest.mark.parametrize("change", ["level", "steps", "label"])
def test_the_condition_reaches_the_output(tiny, change):
    random = tiny(num_classes=2, steps=(2, 4))
    xs, t, steps, label = random.inputs()
    inputs = {"level": t[:, 0], "steps": steps, "label": label}
    before = random.transport(xs[:, 0], *inputs.values())
    inputs[change] = {"level": t[:, 0] + 0.1, "steps": steps * 2, "label": (label + 1) % 3}[change]  # 2 is the null class
    after = random.transport(xs[:, 0], *inputs.values())
    for a, b in zip(before, after, strict=True):
        assert (jnp.abs(a - b).reshape(2, -1).max(1) > 1e-3).all()
    # and the inverse is told the same
    np.testing.assert_allclose(random.invert(after[0], *inputs.values()), xs[:, 0], atol=1e-5)  # float32 rounding, two blocks


def test_arithmetic_is_float32_when_the_network_is_bfloat16(tiny):
    random = tiny(transporter_dtype=jnp.bfloat16)
    exact = tiny()
    assert random.config.exact() == exact.config
    xs, t, steps, label = random.inputs()
    u, log_det = random.transport(xs[:, 0], t[:, 0], steps, label)
    assert u.dtype == log_det.dtype == jnp.float32
    expected = exact.transport(xs[:, 0], t[:, 0], steps, label)
    assert 0 < jnp.abs(u - expected[0]).max() < 0.3  # bfloat16 keeps 3 digits: another number, near this one
    assert jnp.array_equal(u, u.astype(jnp.bfloat16)) is not True
    assert random.invert(u, t[:, 0], steps, label).dtype == jnp.float32
