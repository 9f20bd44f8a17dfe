"""google-research/big_vision's Jet, a flow of coupling layers, in JAX (arXiv 2412.15129)."""

import importlib
import sys
import types

import jax

from tests.peers import jax_cpu
from tests.peers.work import Sizes, Work

products = jax_cpu.products


def _module():
    """Jet's module. It imports tensorflow, for files alone: empty modules take its place."""
    names = {"tensorflow", "tensorflow.io", "tensorflow.io.gfile"} - sys.modules.keys()
    importlib.import_module("flax.io")  # asks for tensorflow itself
    sys.modules.update({name: types.ModuleType(name) for name in names})
    found = importlib.import_module("big_vision.models.proj.jet.jet")
    for name in names:  # einops looks for it later
        del sys.modules[name]
    return found


def _started(sizes: Sizes):
    """(model, parameters, batch of images, FLOPs of a pass); a coupling reads half the numbers."""
    model = _module().Model(depth=sizes.blocks, block_depth=sizes.layers, emb_dim=sizes.width,
                            num_heads=sizes.width // sizes.head, ps=sizes.patch)
    x = jax_cpu.noise(sizes, sizes.side, sizes.side, 3)
    params = jax.jit(lambda key: model.init(key, x, method="forward"))(jax.random.key(0))
    return model, params, x, sizes.forward_flops(
        ends=3 * sizes.blocks * sizes.dim * sizes.width // 2)


def train_step(sizes: Sizes) -> Work:
    """A step of maximum likelihood. Its recomputation of every block is not counted."""
    model, params, x, count = _started(sizes)
    split = params["params"]
    fixed = {name: split[name] for name in split if name.endswith("FREEZE_ME")}

    def loss(learned, x):
        z, log_det = model.apply({"params": learned | fixed}, x, method="forward")
        return (z**2).sum() / 2 / z.size - log_det.sum() / z.size

    learned = {name: split[name] for name in split if name not in fixed}
    return jax_cpu.adamw(loss, learned, x, 3 * count)


def inverse(sizes: Sizes, how: str) -> Work | None:
    """Its inverse, which is one pass over all tokens."""
    if how != "parallel":
        return None
    model, params, x, count = _started(sizes)
    last = params["params"]["couplings"]["dnn"]["final_proj"]
    last["kernel"] = jax_cpu.ends(jax.random.key(1), last["kernel"])
    work = jax_cpu.inverting(
        lambda params, x: model.apply(params, x, method="forward")[0],
        lambda params, z: model.apply(params, z, method="inverse")[0], params, x, count)
    return Work(work.once, work.flops, work.error, "couplings: one pass, no sweeps")
