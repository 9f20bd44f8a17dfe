"""Chooses the attention that a model is built with, by the mesh's devices, and shards it: splash on TPU, cuDNN on NVIDIA, else plain XLA.

An attention is called as core.layers.plain_attention is. Where a kernel cannot take a shape or a dtype, the plain one serves.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import NamedSharding, PartitionSpec

from ntm_jax.core.layers import own_precision, plain_attention, precision
from ntm_jax.runtime import sharding


@dataclasses.dataclass(frozen=True)
class Attention:
    """kind: splash, cudnn. interpret runs splash without a TPU, for tests."""

    kind: str
    mesh: jax.sharding.Mesh
    interpret: bool = False

    def __call__(self, q, k, v, *, causal: bool, keys=None):
        kind = self.serves(q.shape, q.dtype)
        if kind == "splash":
            splash_here = functools.partial(_splash, causal=causal, mesh=self.mesh, interpret=self.interpret)
            return _keep_precision(splash_here, q, k, v, keys)
        if kind == "cudnn":
            return _cudnn(q, k, v, keys, causal, self.mesh)
        return plain_attention(q, k, v, causal=causal, keys=keys)

    def serves(self, shape, dtype) -> str:
        """The kind that takes q of a shape [B, N, H, C] and a dtype: splash blocks of 128 tokens a device, cuDNN half precision."""
        batch, tokens, heads, _ = shape
        fits = batch % sharding.batch_shards(self.mesh) == 0 and heads % self.mesh.shape["tensor"] == 0
        if self.kind == "splash" and (not fits or tokens % (128 * self.mesh.shape["sequence"])):
            return "plain"
        # cuDNN's causal mask would start anew on every device that holds a part of the tokens.
        if self.kind == "cudnn" and (not fits or self.mesh.shape["sequence"] > 1 or jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16)):
            return "plain"
        return self.kind


def choose(mesh):
    """The attention for a mesh, by the platform of its devices."""
    kind = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}.get(mesh.devices.flat[0].platform)
    return Attention(kind, mesh) if kind else plain_attention


QUERIES = PartitionSpec(*sharding.BATCH, "sequence", "tensor")
KEYS = PartitionSpec(*sharding.BATCH, None, "tensor")


def _keep_precision(attend, q, *others):
    """attend(q, *others), of which the gradient too has the products' precision that is set now.

    Pallas traces a kernel's gradient only when it is asked for, outside the context that set it.
    """
    if jax.config.jax_default_matmul_precision is None:
        return attend(q, *others)
    here = functools.partial(precision, own_precision(q.dtype) or jax.config.jax_default_matmul_precision)

    @jax.custom_vjp
    def call(*arrays):
        with here():
            return attend(*arrays)

    def forward(*arrays):
        with here():
            return jax.vjp(attend, *arrays)

    def backward(pullback, gradient):
        with here():
            return pullback(gradient)

    call.defvjp(forward, backward)
    return call(q, *others)


def _splash(q, k, v, keys, causal, mesh, interpret):
    tokens, heads, parts = q.shape[1], q.shape[2], mesh.shape["sequence"]
    if not causal:  # the same for every part of the queries
        mask, parts = splash.FullMask((tokens // parts, tokens)), 1
    elif parts > 1:  # jax cannot shard the queries of a mask that it computes
        mask = splash.NumpyMask(np.tri(tokens, dtype=bool))
    else:
        mask = splash.CausalMask((tokens, tokens))
    block = next(size for size in (512, 384, 256, 128) if tokens // mesh.shape["sequence"] % size == 0)
    sizes = splash.BlockSizes(**dict.fromkeys(
        ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq"),
        block))
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=mesh.shape["tensor"], q_seq_shards=parts, interpret=interpret)
    spec = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec("tensor", "sequence" if parts > 1 else None)))
    segments = jnp.ones(q.shape[:2], jnp.int32) if keys is None else keys.astype(jnp.int32)  # a hidden key is a segment of its own

    def local(kernel, q, k, v, q_segments, kv_segments):
        def one(q, k, v, *ids):
            return kernel(q, k, v, segment_ids=splash.SegmentIds(*ids) if keys is not None else None)

        swapped = (jnp.swapaxes(a, 1, 2) for a in (q / jnp.sqrt(q.shape[-1]).astype(q.dtype), k, v))
        return jnp.swapaxes(jax.vmap(one)(*swapped, q_segments, kv_segments), 1, 2)

    tokens_spec = PartitionSpec(*sharding.BATCH, "sequence")
    return jax.shard_map(
        local, mesh=mesh, in_specs=(spec, QUERIES, KEYS, KEYS, tokens_spec, sharding.BATCH), out_specs=QUERIES,
        check_vma=False)(kernel, q, k, v, segments, segments)


def _cudnn(q, k, v, keys, causal, mesh):
    def local(q, k, v, keys):
        mask = None if keys is None else jnp.broadcast_to(keys[:, None, None], (len(q), 1, q.shape[1], k.shape[1]))
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation="cudnn")

    examples = None if keys is None else sharding.BATCH
    return jax.shard_map(local, mesh=mesh, in_specs=(QUERIES, KEYS, KEYS, examples), out_specs=QUERIES, check_vma=False)(q, k, v, keys)
