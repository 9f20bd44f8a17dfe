"""Attention by kernels of accelerators: splash on TPU, cuDNN on NVIDIA.

An attention has the signature of plain_attention in core/transformer, and is sharded over the mesh.
Shapes and dtypes that a kernel does not support use plain attention.

Symbols: B batch, N tokens, H heads, C head size.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import NamedSharding, PartitionSpec

from ntm_jax.core.transformer import own_precision, plain_attention, precision
from ntm_jax.runtime import sharding

QUERIES = PartitionSpec(*sharding.BATCH, "sequence", "tensor")
KEYS = PartitionSpec(*sharding.BATCH, None, "tensor")
SPLASH_BLOCKS = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv",
                 "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention by a kernel, called as core.transformer.plain_attention is.

    kind: splash or cudnn. interpret: runs splash without a TPU, for tests.
    """

    kind: str
    mesh: jax.sharding.Mesh
    interpret: bool = False

    def __call__(self, q, k, v, *, causal: bool, keys=None):
        kind = self.kind_for(q.shape, q.dtype)
        if kind == "splash":
            attend = functools.partial(
                _splash, causal=causal, mesh=self.mesh, interpret=self.interpret)
            return _keep_precision(attend, q, k, v, keys)
        if kind == "cudnn":
            return _cudnn(q, k, v, keys, causal, self.mesh)
        return plain_attention(q, k, v, causal=causal, keys=keys)

    def kind_for(self, shape, dtype) -> str:
        """The kind that handles q of a shape [B, N, H, C] and a dtype; "plain" if no kernel does.

        splash needs a multiple of 128 tokens per device, cuDNN half precision and heads whose size
        is a multiple of 8, at most 128.
        """
        batch, tokens, heads, size = shape
        axes = self.mesh.shape
        divides = batch % sharding.batch_shards(self.mesh) == 0 and heads % axes["tensor"] == 0
        if self.kind == "splash":
            supported = divides and tokens % (128 * axes["sequence"]) == 0
        else:  # cuDNN's causal mask would restart on every device of the sequence axis
            half = jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16)
            fits = size % 8 == 0 and size <= 128
            supported = divides and axes["sequence"] == 1 and half and fits
        return self.kind if supported else "plain"


def _keep_precision(attend, q, *others):
    """attend(q, *others), whose gradient also uses the matmul precision that is set now.

    Pallas traces a kernel's gradient later, outside the context that set the precision.
    """
    # An attribute that jax.config gets at run time.
    setting = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    if setting is None:
        return attend(q, *others)
    current = own_precision(q.dtype) or setting

    @jax.custom_vjp
    def call(*arrays):
        with precision(current):
            return attend(*arrays)

    def forward(*arrays):
        with precision(current):
            return jax.vjp(attend, *arrays)

    def backward(pullback, gradient):
        with precision(current):
            return pullback(gradient)

    call.defvjp(forward, backward)
    return call(q, *others)


def _splash_kernel(tokens: int, heads: int, causal: bool, mesh, interpret: bool):
    """(the kernel, the sharding of its mask)."""
    parts = mesh.shape["sequence"]
    block = next(size for size in (512, 384, 256, 128) if tokens // parts % size == 0)
    if not causal:  # all parts of the queries share one mask
        mask, parts = splash.FullMask((tokens // parts, tokens)), 1
    elif parts > 1:  # jax cannot shard the queries of a computed mask
        mask = splash.NumpyMask(np.tri(tokens, dtype=bool))
    else:
        mask = splash.CausalMask((tokens, tokens))
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**dict.fromkeys(SPLASH_BLOCKS, block)),
        head_shards=mesh.shape["tensor"], q_seq_shards=parts, interpret=interpret)
    spec = PartitionSpec("tensor", "sequence" if parts > 1 else None)
    return kernel, kernel.manual_sharding_spec(NamedSharding(mesh, spec))


def _splash(q, k, v, keys, causal, mesh, interpret):
    kernel, spec = _splash_kernel(q.shape[1], q.shape[2], causal, mesh, interpret)
    # Hidden keys form a segment of their own, so that no query sees them.
    segments = jnp.ones(q.shape[:2], jnp.int32) if keys is None else keys.astype(jnp.int32)

    def local(kernel, q, k, v, q_segments, kv_segments):
        def one(q, k, v, *ids):
            return kernel(q, k, v,
                          segment_ids=splash.SegmentIds(*ids) if keys is not None else None)

        swapped = (jnp.swapaxes(a, 1, 2) for a in (q / jnp.sqrt(q.shape[-1]).astype(q.dtype), k, v))
        return jnp.swapaxes(jax.vmap(one)(*swapped, q_segments, kv_segments), 1, 2)

    tokens_spec = PartitionSpec(*sharding.BATCH, "sequence")
    return jax.shard_map(
        local, mesh=mesh, in_specs=(spec, QUERIES, KEYS, KEYS, tokens_spec, sharding.BATCH),
        out_specs=QUERIES, check_vma=False)(kernel, q, k, v, segments, segments)


def _cudnn(q, k, v, keys, causal, mesh):
    def local(q, k, v, keys):
        mask = None
        if keys is not None:
            mask = jnp.broadcast_to(keys[:, None, None], (len(q), 1, q.shape[1], k.shape[1]))
        return jax.nn.dot_product_attention(
            q, k, v, mask=mask, is_causal=causal, implementation="cudnn")

    examples = None if keys is None else sharding.BATCH
    return jax.shard_map(local, mesh=mesh, in_specs=(QUERIES, KEYS, KEYS, examples),
                         out_specs=QUERIES, check_vma=False)(q, k, v, keys)
