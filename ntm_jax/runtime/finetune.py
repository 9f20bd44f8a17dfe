"""From a pretrained flow-matching model to an NTM (method, section 7): where a new run's parameters come from, and the frozen copy.

A run of ours gives its moving average, a public checkpoint its safetensors. The copy that the means are held near is kept once, in
WORKDIR/frozen, in the dtype that it computes in: a resume needs nothing else.
"""

import jax
import jax.numpy as jnp

from ntm_jax.backbones import flux2_weights
from ntm_jax.errors import UserError
from ntm_jax.runtime import checkpoint, export, load, state
from ntm_jax.runtime import config as configuration
from ntm_jax.runtime.checkpoint import Checkpoints
from ntm_jax.runtime.config import Config


def start_from(config: Config, spec, model, mesh, current: state.State) -> state.State:
    """A new run's state with the parameters that config.init_from names: all of an export or a run of the same model, or the backbone of
    a flow-matching model. UserError where they are another model's."""
    source = config.init_from
    try:
        pretrained = _backbone(config, spec, model, mesh)
    except UserError as error:
        raise UserError(f"config.init_from is {source}: {error}") from None
    if pretrained is None:
        return export.start_from(source, config, model, mesh, current)

    def put(params, backbone):
        return {"params": params["params"] | {"backbone": backbone}}

    return current.replace(params=put(current.params, pretrained), ema=put(current.ema, _cast(pretrained)))


def _backbone(config: Config, spec, model, mesh):
    """The backbone's parameters of the flow-matching model in config.init_from; None where that is no such model."""
    folder, _ = checkpoint.locate(config.init_from)
    if config.model.head != "posterior" or (folder / export.WEIGHTS).exists():
        return None
    expected = state.abstract(config, model, mesh).params["params"]["backbone"]
    if not (folder / "checkpoints").exists():
        if spec.std:
            raise UserError(f"config.data.source {config.data.source} holds latents normalised by their own mean and std, and the network "
                            "there learned the encoder's: prepare them with --latent_scale=encoder")
        return flux2_weights.read(config.init_from, expected) if config.model.backbone == "flux2" else None
    if config.train.objective == "flow_matching" or configuration.load(str(folder))[0].train.objective != "flow_matching":
        return None
    run = load.load(config.init_from)
    for key, mine, theirs in (("image shape", spec.image_shape, run.spec.image_shape),
                              ("config.data.patch_size", config.data.patch_size, run.config.data.patch_size),
                              ("config.model.data_std", config.model.data_std, run.config.model.data_std),
                              ("config.model.condition", config.model.condition, run.config.model.condition)):
        if mine != theirs:
            raise UserError(f"the flow-matching model there learned data of another kind: {key} is {theirs} there and {mine} here")
    found = run.params["params"]["backbone"]
    there, here = checkpoint.named_leaves(found), checkpoint.named_leaves(expected)
    for name in [*here, *sorted(set(there) - set(here))]:
        one, other = (checkpoint.describe(arrays.get(name)) for arrays in (there, here))
        if one != other:
            raise UserError(f"the flow-matching model there is another network: array {name} is {one} there and {other} here; give its "
                            "sizes, config.model.width, predictor_layers and the rest")
    return jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), found, expected)


def _cast(tree, dtype=None):
    """A copy, in another dtype if given: a step donates what it is given."""
    return jax.jit(lambda tree: jax.tree.map(lambda a: jnp.copy(a).astype(dtype or a.dtype), tree),
                   out_shardings=jax.tree.map(lambda a: a.sharding, tree))(tree)


def abstract(config: Config, model, mesh) -> dict:
    """The frozen copy's shapes with their shardings."""
    dtype = jnp.dtype(config.model.dtype)
    backbone = state.abstract(config, model, mesh).params["params"]["backbone"]
    return {"params": jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, dtype, sharding=a.sharding), backbone)}


def frozen(config: Config, model, mesh, workdir: str, current: state.State) -> dict:
    """The frozen copy of the backbone, from WORKDIR/frozen; a run that takes its first step leaves it there."""
    with Checkpoints(f"{workdir}/frozen") as checkpoints:
        if int(current.step) == 0 and checkpoints.latest() is None:
            checkpoints.save(0, {"params": _cast(current.params["params"]["backbone"], config.model.dtype)}, {})
        return checkpoints.restore_subtree(0, abstract(config, model, mesh))[1]
