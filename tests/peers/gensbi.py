"""aurelio-amerio/GenSBI's TarFlow, in JAX."""

import importlib
import pathlib
import sys
import types

import jax
from flax import nnx

from tests.peers import jax_cpu
from tests.peers.work import Sizes, Work

products = jax_cpu.products


def _model(sizes: Sizes):
    # Its package imports all of its methods and their dependencies; the flow needs none of them.
    package = next(found for path in sys.path
                   if (found := pathlib.Path(path) / "gensbi" / "models").is_dir())
    models = types.ModuleType("gensbi.models")
    models.__path__ = [str(package)]
    sys.modules.setdefault("gensbi.models", models)
    tarflow = importlib.import_module("gensbi.models.tarflow")
    return tarflow.TarFlow(tarflow.TarFlowParams(
        rngs=nnx.Rngs(0), modeled="image", img_size=sizes.side, patch_size=sizes.patch,
        img_channels=3, head_dim=sizes.head, num_heads=sizes.width // sizes.head,
        num_blocks=sizes.blocks, layers_per_block=sizes.layers))


def train_step(sizes: Sizes) -> Work:
    """A step of maximum likelihood."""
    graph, params, rest = nnx.split(_model(sizes), nnx.Param, ...)

    def loss(params, x):
        return -nnx.merge(graph, params, rest).log_prob(x).mean() / x[0].size

    x = jax_cpu.noise(sizes, sizes.side, sizes.side, 3)
    return jax_cpu.adamw(loss, params, x, 3 * sizes.forward_flops())


def inverse(sizes: Sizes, how: str) -> Work | None:
    """Its sampler, token by token with a KV cache; it has no parallel one."""
    if how != "sequential":
        return None
    model = _model(sizes)
    for i, block in enumerate(model.blocks):
        kernel = block.proj_out.kernel
        kernel[...] = jax_cpu.ends(jax.random.key(i), kernel[...])
    graph, state = nnx.split(model)

    def forward(state, x):
        for block in nnx.merge(graph, state).blocks:
            x, _ = block.inverse(x)
        return x

    def inverted(state, z):
        for block in reversed(nnx.merge(graph, state).blocks):
            z, _ = block.forward(z)
        return z

    x = jax_cpu.noise(sizes, sizes.tokens, sizes.dim)
    return jax_cpu.inverting(forward, inverted, state, x, sizes.forward_flops())
