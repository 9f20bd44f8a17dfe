"""Fine-tuning and post-training: where a new run's parameters come from.

A run or an export of the same model gives all parameters. A flow-matching model, ours or a public
checkpoint, gives the backbone of the head flow_matching (docs/concepts.md, section 7).
"""

import dataclasses

import jax
from etils import epath

from ntm_jax import backbones
from ntm_jax.errors import UserError
from ntm_jax.export.read import (
    DENOISER,
    is_export,
    load_run,
    local_folder,
    read_export_info,
    read_parameters,
)
from ntm_jax.runtime import build, checkpoint, checksums, config_file
from ntm_jax.runtime.run import FROZEN, Run, restore_params
from ntm_jax.training import objectives, reference_model
from ntm_jax.training.state import State


def start_from(run: Run, current: State) -> State:
    """A new run's state with the parameters that config.init_from names.

    Raises UserError where they are another model's.
    """
    try:
        where = local_folder(run.config.init_from)
        backbone = _read_backbone(run, where)
        params = _read_all(run, where) if backbone is None else None
    except UserError as error:
        raise UserError(f"config.init_from is {run.config.init_from}: {error}") from None
    if params is not None:
        return dataclasses.replace(current, params=params, ema=reference_model.copy(params))

    def put(tree, backbone):
        return {"params": tree["params"] | {"backbone": backbone}}

    return dataclasses.replace(current, params=put(current.params, backbone),
                               ema=put(current.ema, reference_model.copy(backbone)))


def _read_all(run: Run, where: str) -> dict:
    """All parameters of an export, or the EMA of a run: a workdir or WORKDIR/checkpoints/STEP.

    A denoiser's run and its export hold two models. A new denoiser starts from the denoiser,
    another run from its teacher.
    """
    folder, is_denoiser = epath.Path(where), bool(run.config.teacher)
    if is_export(folder):
        info, expected = read_export_info(folder), build.abstract_params(run.model, run.mesh)
        _check_encoder(run, info.spec.get("text", ""))
        if is_denoiser:
            expected = {DENOISER: expected["params"]}
            found = read_parameters(folder, info, expected, skip=("params/", "pixels/"))
            return {"params": found[DENOISER]}
        return read_parameters(folder, info, expected, skip=(f"{DENOISER}/", "pixels/"))
    workdir, step = checkpoint.locate(folder)
    if not (workdir / "checkpoints").exists():
        raise UserError("there is no such export or run: expected an export's folder, a run's, or "
                        "WORKDIR/checkpoints/STEP")
    theirs, spec = config_file.load(str(workdir))
    _check_encoder(run, spec.text)
    if theirs.teacher and not is_denoiser:
        workdir, step = workdir / FROZEN, None
    return restore_params(run, theirs, step, folder=str(workdir))[1]


def _check_encoder(run: Run, theirs: str) -> None:
    """Raises UserError where a model learned the states of another text encoder.

    Another vocabulary of as many words has arrays of the same shapes, and gives the words other
    meanings.
    """
    mine = run.spec.text
    if run.condition.captioned and mine and theirs and mine != theirs:
        raise UserError(f"the model there learned the text encoder {theirs}, and the data here "
                        f"have {mine}: give --config.data.text_encoder='{theirs}', or leave "
                        "init_from out")


def _read_backbone(run: Run, where: str):
    """The backbone's parameters from a flow-matching model; None where `where` is not one."""
    config = run.config
    folder, _ = checkpoint.locate(where)
    if config.model.head != "flow_matching":
        return None
    exported = is_export(folder)
    expected = build.abstract_params(run.model, run.mesh)["params"]["backbone"]
    if not exported and not (folder / "checkpoints").exists():
        if run.spec.std:
            raise UserError(f"config.data.source {config.data.source} holds latents normalised by "
                            "their own mean and std, and the network there learned the encoder's: "
                            "prepare them with --latent_scale=encoder")
        read = backbones.find(config.model.backbone).read
        return read(where, expected) if read else None
    theirs = (read_export_info(folder).config["train"]["objective"] if exported
              else config_file.load(str(folder))[0].train.objective)
    own, theirs = (objectives.find(name).trains for name in (config.train.objective, theirs))
    if own == "velocity" or theirs != "velocity":
        return None
    other = load_run(where)
    assert other.params is not None  # it was loaded
    for name, here, there in (
            ("image shape", run.spec.image_shape, other.spec.image_shape),
            ("config.model.data_std", config.model.data_std, other.config.model.data_std)):
        if here != there:
            raise UserError("the flow-matching model there learned data of another kind: "
                            f"{name} is {there} there and {here} here")
    _check_encoder(run, other.spec.text)
    found = other.params["params"]["backbone"]
    different = checksums.first_difference(*map(checksums.named_leaves, (found, expected)))
    if different:
        name, there, here = different
        raise UserError(f"the flow-matching model there is another network: array {name} is "
                        f"{there} there and {here} here; give its sizes, config.model.width, "
                        "predictor_layers and the rest")
    return jax.tree.map(lambda a, b: jax.device_put(a, b.sharding), found, expected)
