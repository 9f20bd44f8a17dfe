"""The choice between the transporter's two inverses, by the arithmetic of a chip.

Symbols: N tokens, W width, L layers of a block, P weights of a layer, S sweeps, R rows: latents
[N, D] that a chip inverts together, images x levels.
"""

import jax.numpy as jnp

from ntm_jax.core.config import ModelConfig
from ntm_jax.core.transporter import cache_sizes
from ntm_jax.runtime import sharding
from ntm_jax.runtime.chips import Chip, chip_of

# Kernels of a layer that wait for each other: counted in a sequential step that was compiled for an
# H100, which has 40 for two layers.
KERNELS_PER_LAYER = 20
# Most sweeps assumed of a block. docs/results/rates.md measured means to a change of 1e-5, at the
# level nearest to the data: 8 at 16 tokens, and 30 to 35 from 256 tokens on. Other levels take
# fewer. The inverse goes on to 1e-6, which takes more, and until its slowest image is done.
MAX_TYPICAL_SWEEPS = 32


def choose(inverse: str, config: ModelConfig, rows: int, mesh) -> str:
    """parallel or sequential: `inverse`, or for auto the one that should be the faster.

    rows: of all devices. mesh: the devices that invert them; None if they are unknown, as those of
    an exported program, for which auto is sequential.
    """
    if inverse != "auto":
        return inverse
    if mesh is None:
        return "sequential"
    rows = -(-rows // sharding.batch_shards(mesh))
    chip = chip_of(mesh.devices.flat[0])
    predicted = seconds(config, rows, chip, parts=mesh.shape["tensor"])
    # A prediction is not better than to 5 %.
    return "parallel" if predicted["parallel"] < 0.95 * predicted["sequential"] else "sequential"


def seconds(config: ModelConfig, rows: float, chip: Chip, parts: int = 1) -> dict[str, float]:
    """Predicted seconds of a block's inverse on one chip, {"sequential": s, "parallel": s}.

    Both read the weights of L layers once a pass and multiply every row's tokens with them. The
    sequential inverse is N passes over one token of each row, the parallel one S passes over N:

        sequential = N (max(latency, weights / memory, R L (2 P + 4 W M) / flops) + cache / memory)
        parallel = S max(latency, weights / memory, R N L (2 P + 4 W N) / flops)

    Here P = W (2 W + 2 G C + 2 r W), with G C the width of keys and values and r the MLP's ratio;
    M is the mean length of the KV cache, and 4 W M the FLOPs of a token's attention to it. For
    every token that attention reads 2 G C M numbers of a row and layer, the cache's bytes, in
    kernels of their own, so that their time adds to that of the weights. flops is the rate at the
    model's precision, memory that of the chip's memory, and latency that of KERNELS_PER_LAYER
    kernels for each layer, which wait for each other. Left out are activations, embeddings, norms,
    the network between chips, and that a mesh's sequence axis splits the tokens of a sweep.

    While weights bound a sequential pass and products a sweep, and without the cache, the ratio of
    the two is the rule that sweeps win where R S < (bytes of a weight) / 2 x flops / memory: the
    chip's ridge. At precision `highest` flops are a sixth on a TPU, and so is the number of rows.

    S depends on the parameters; here it follows from N. parts: devices that the weights are split
    over.
    """
    c, tokens = config, config.tokens
    width, layers = c.transporter_width, c.transporter_layers
    sweeps = min(tokens, 4 + tokens / 4, MAX_TYPICAL_SWEEPS)
    size = jnp.dtype(c.transporter_dtype).itemsize
    flops = chip.rate("highest" if c.precision == "highest" and size == 4 else "default")
    keys = c.kv_heads * c.head_size
    weights = width * (2 * width + 2 * keys + 2 * c.mlp_ratio * width)
    ends = cache_sizes(tokens)
    grown = (end * (end - begin) for begin, end in zip([0, *ends], ends, strict=False))
    cached = sum(grown) / tokens

    def one_pass(count: float, attended: float) -> float:
        """Seconds of a pass over `count` tokens that attend to `attended` tokens each."""
        products = count * layers * (2 * weights + 4 * width * attended) / parts
        waiting = layers * KERNELS_PER_LAYER * chip.latency
        return max(waiting, layers * weights * size / parts / chip.memory, products / flops)

    cache = rows * layers * 2 * keys * cached * size / parts
    return {"sequential": tokens * (one_pass(rows, cached) + cache / chip.memory),
            "parallel": sweeps * one_pass(rows * tokens, tokens)}
