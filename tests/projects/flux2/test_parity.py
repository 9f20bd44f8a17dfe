"""The network and its reader against diffusers' Flux2Transformer2DModel.

Both have the same random weights, by files on disk.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from ntm_jax.core.conditions import Text
from ntm_jax.projects.flux2 import network as flux2
from ntm_jax.projects.flux2 import weights as flux2_weights
from tests.projects.flux2.common import TINY, abstract, as_diffusers, inputs

# others' deprecations warn
pytestmark = pytest.mark.filterwarnings("default")
ATOL = 1e-4  # float32 through four layers; the largest value is about 3


@pytest.fixture(scope="module")
def build():
    """build(double, single) -> diffusers' model at TINY's sizes.

    Its random weights keep the size of their input.
    """
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")

    @functools.cache
    def model(double: int, single: int):
        c = TINY
        module = diffusers.Flux2Transformer2DModel(
            in_channels=c.dim, num_layers=double, num_single_layers=single,
            attention_head_dim=c.head_size, num_attention_heads=c.heads,
            joint_attention_dim=c.text_width, mlp_ratio=float(c.mlp_ratio), axes_dims_rope=c.axes,
            rope_theta=c.theta, guidance_embeds=False)
        generator = torch.Generator().manual_seed(double)
        with torch.no_grad():
            for parameter in module.parameters():
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(
                    1 + 0.3 * values if values.ndim == 1 else values / values.shape[1] ** 0.5)
        return module.eval()

    return model


def theirs(module, grid, x, t, text, mask=None):
    """diffusers' velocity and the gradients of its sum of sines to x, t and text.

    Positions are those of diffusers' pipeline.
    """
    import torch
    from diffusers import Flux2KleinPipeline as Pipeline

    x, t, text = (torch.tensor(a, requires_grad=True) for a in (x, t, text))
    places = Pipeline._prepare_latent_ids(torch.zeros(len(x), 1, *grid))
    options = {}
    if mask is not None:
        seen = torch.cat([torch.tensor(mask), torch.ones(x.shape[:2], dtype=torch.bool)], 1)
        options["joint_attention_kwargs"] = {"attention_mask": seen[:, None, None]}
    velocity = module(hidden_states=x, encoder_hidden_states=text, timestep=t, img_ids=places,
                      txt_ids=Pipeline._prepare_text_ids(text), **options).sample
    torch.sin(velocity).sum().backward()
    return [a.detach().numpy() for a in (velocity, x.grad, t.grad, text.grad)]


def ours(config, params, x, t, text):
    @jax.jit
    def run(x, t, states):
        velocity, _ = flux2.Flux2(config).apply({"params": params}, x, t, Text(states, text.mask))
        return jnp.sum(jnp.sin(velocity)), velocity

    (_, velocity), gradients = jax.value_and_grad(run, (0, 1, 2), has_aux=True)(x, t, text.states)
    return [np.asarray(a) for a in (velocity, *gradients)]


def same(found, expected):
    for name, a, b in zip(("velocity", "x", "t", "text"), found, expected, strict=True):
        assert np.abs(b).max() > 0.1, name
        scale = 1000 if name == "t" else 1  # the network embeds 1000 t
        np.testing.assert_allclose(a / scale, b / scale, atol=ATOL, rtol=0, err_msg=name)


def read(module, folder, config=TINY):
    """A module's parameters, through its checkpoint."""
    module.save_pretrained(folder / "transformer", max_shard_size="40KB")
    return flux2_weights.read(str(folder), abstract(config))


@pytest.mark.parametrize(("double", "single", "grid"), [(2, 2, (3, 5)), (1, 3, (7, 1))])
def test_the_same_network(build, tmp_path, double, single, grid):
    """From a checkpoint in diffusers' names; test_weights.py reads the same from the original."""
    module, config = build(double, single), dataclasses.replace(
        TINY, double_layers=double, single_layers=single, grid=grid)
    params = read(module, tmp_path, config)
    x, t, text = inputs(config)
    same(ours(config, params, x, t, text), theirs(module, grid, x, t, text.states))


def test_padded_text_has_no_effect(build, tmp_path):
    """Against diffusers with an attention mask, and with each example's own tokens alone."""
    module = build(2, 2)
    params = read(module, tmp_path)
    x, t, text = inputs(text_tokens=6)
    mask = np.arange(6) < np.array([[6], [4]])
    states = np.where(mask[..., None], text.states, 7)
    found = ours(TINY, params, x, t, Text(states, mask))
    assert not found[3][1, 4:].any()
    same(found, theirs(module, TINY.grid, x, t, states, mask))
    short = theirs(module, TINY.grid, x[1:], t[1:], states[1:, :4])
    same([*(a[1:] for a in found[:3]), found[3][1:, :4]], short)


def test_every_parameter_of_klein_occurs_once():
    """The shapes of its 3.88 billion parameters, in both namings."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    config = flux2.Flux2Config((4, 4))
    with torch.device("meta"):
        module = diffusers.Flux2Transformer2DModel(
            num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680,
            guidance_embeds=False)
    theirs = {name: list(a.shape) for name, a in module.state_dict().items()}
    leaves = flatten_dict(abstract(config), sep="/")
    for table in (flux2_weights.DIFFUSERS, flux2_weights.ORIGINAL):
        assert sorted(" ".join(table.values()).split()) == sorted(
            name.rsplit("/", 1)[0] for name in leaves)
    _, shapes = flux2_weights._places(flux2_weights.DIFFUSERS, leaves)
    assert {name: list(shape) for name, shape in shapes.items()} == theirs
    _, shapes = flux2_weights._places(flux2_weights.ORIGINAL, leaves)
    with torch.device("meta"):
        named = as_diffusers({name: torch.empty(shape) for name, shape in shapes.items()})
    assert {name: list(a.shape) for name, a in named.items()} == theirs
    assert sum(np.prod(leaf.shape)
               for leaf in leaves.values()) == sum(a.numel() for a in module.parameters())
