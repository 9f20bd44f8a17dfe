"""Reads runs: from a workdir, or from an export, which holds one run's parameters and settings.

An export lies in a folder or, at hf://OWNER/NAME, on the Hugging Face Hub. Reading one runs none of
its code: only config.json and the safetensors are opened, whose arrays have checksums.
"""

import dataclasses

import jax
import safetensors
import safetensors.numpy
from etils import epath
from flax import traverse_util

from ntm_jax import files, typed
from ntm_jax.data.pipeline import spec_from_json
from ntm_jax.errors import UserError, first_line
from ntm_jax.export import hub
from ntm_jax.runtime import build, checksums
from ntm_jax.runtime import config as configuration
from ntm_jax.runtime.config import Config
from ntm_jax.runtime.processes import require_same_everywhere
from ntm_jax.runtime.run import (
    Denoiser,
    Run,
    abstract_pixel_params,
    load_workdir,
    run_mesh,
    untrained,
)

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "model.safetensors"
FILES = (CONFIG, WEIGHTS, "sampler.bin", "log_likelihood.bin", "sample.py", "README.md")
DENOISER = "denoiser"  # how the names of a denoiser's arrays begin
REMEDY = "copy the export again from where it came, or export the run anew"


@dataclasses.dataclass(frozen=True)
class ExportInfo:
    """The keys of an export's config.json that reading it needs; others are ignored."""

    format: int
    step: int
    parameters: str  # raw, ema
    checksums: dict  # {array's name: its checksum}; see array_checksums
    spec: dict
    config: dict
    teacher_step: int | None = None  # of the teacher, in the export of a run with a denoiser
    denoiser_step: int | None = None  # of the denoiser's own training; `step` in earlier exports
    denoiser_config: dict | None = None  # the denoiser's own configuration, which has its sizes


def is_export(folder) -> bool:
    """Whether a folder is an export, and not a run's."""
    return (epath.Path(folder) / WEIGHTS).exists()


def read_export_info(folder) -> ExportInfo:
    """An export's config.json. Raises UserError if it is missing, damaged or of another format."""
    path = epath.Path(folder) / CONFIG
    if not path.exists():
        raise UserError(f"{path} is missing: {REMEDY}")
    values = files.read_json(path, REMEDY)
    if values.get("format") != FORMAT:
        raise UserError(f"{path} is of format {values.get('format')}, and this version of ntm_jax "
                        f"reads {FORMAT}: expected the folder that ntm-jax export wrote")
    names = {field.name for field in dataclasses.fields(ExportInfo)}
    return typed.parse_dataclass(
        ExportInfo, {key: values[key] for key in values if key in names}, str(path))


def read_parameters(folder, about: ExportInfo, abstract, skip: tuple[str, ...] = ()) -> dict:
    """The parameters of an export, verified, on the devices of their abstract counterparts.

    Arrays whose names begin with one of `skip` are left out. Raises UserError if the file is
    damaged, or its arrays are not those of `abstract`.
    """
    path = epath.Path(folder) / WEIGHTS
    try:
        flat = safetensors.numpy.load(files.regular(path).read_bytes())
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged ({first_line(error)}): {REMEDY}") from None
    flat = {name: array for name, array in flat.items() if not name.startswith(skip)}
    expected = checksums.named_leaves(abstract)
    different = checksums.first_difference(flat, expected)
    if different:
        name, there, here = different
        raise UserError(f"it is of another model: array {name} is {there} in the export, {here} in "
                        "this model; use the configuration it was trained with, or another export")
    params = traverse_util.unflatten_dict({
        name: jax.make_array_from_callback(a.shape, a.sharding, lambda i, name=name: flat[name][i])
        for name, a in expected.items()}, sep="/")
    for name, value in checksums.array_checksums(params).items():
        if about.checksums.get(name) != value:
            raise UserError(f"{path} is damaged: {name} has checksum {value}, written with "
                            f"{about.checksums.get(name)}; {REMEDY}")
    return params


def local_folder(where: str) -> str:
    """The folder of a run or an export: `where` itself, or what it names on the Hub, downloaded."""
    return hub.fetch(where, (CONFIG, WEIGHTS)) if hub.is_address(where) else files.expanded(where)


def load_run(workdir: str, step: int | None = None, raw: bool = False) -> Run:
    """The run in a workdir, in one of its WORKDIR/checkpoints/STEP, or in an export.

    workdir: a folder, or hf://OWNER/NAME[@REVISION] for an export on the Hub. step: the latest by
    default. raw: with the raw parameters in place of their EMA. An export has the one step, the
    parameters and the sampling settings that it was written with. Raises UserError if there is no
    run, its files are damaged, or the processes of a job ask for different ones.
    """
    # Parts of two different arrays would look like a damaged checkpoint.
    require_same_everywhere({"the run": str(workdir), "--step": step, "--raw": raw})
    if hub.is_address(workdir):
        run = _load_export(local_folder(workdir), step, raw)
        return dataclasses.replace(run, workdir=hub.results_folder(workdir))
    workdir = files.expanded(workdir)
    if is_export(workdir):
        return _load_export(workdir, step, raw)
    return load_workdir(workdir, step, raw)


def _load_export(folder: str, step: int | None, raw: bool) -> Run:
    about = read_export_info(folder)
    if step not in (None, about.step):
        raise UserError(f"{folder} is an export of step {about.step}, and --step asks for step "
                        f"{step}: leave --step out, or give the workdir of the run")
    if raw and about.parameters != "raw":
        raise UserError(f"{folder} is an export of the moving average of the parameters, and --raw "
                        "asks for the raw ones: leave --raw out, or give the workdir of the run")
    spec = spec_from_json(about.spec)
    config, denoiser_config = _exported_configs(about)
    run = untrained(config, spec, run_mesh(config.mesh), folder)
    # abstract_params returns one dict to all callers, which must not change.
    abstract = build.abstract_params(run.model, run.mesh) | abstract_pixel_params(run)
    if denoiser_config:
        own = untrained(denoiser_config, spec, run_mesh(denoiser_config.mesh))
        abstract = abstract | {DENOISER: build.abstract_params(own.model, own.mesh)["params"]}
    params, denoiser = read_parameters(folder, about, abstract), None
    if denoiser_config:
        denoiser = Denoiser(own.model, {"params": params.pop(DENOISER)}, denoiser_config,
                            about.teacher_step, about.denoiser_step or about.step)
    return dataclasses.replace(run, params=params, step=about.step, raw=about.parameters == "raw",
                               denoiser=denoiser)


def _exported_configs(about: ExportInfo) -> tuple[Config, Config | None]:
    """The configuration of an export's run, and its denoiser's own if it has one."""
    if about.teacher_step is None:
        return configuration.read(about.config), None
    assert about.denoiser_config is not None  # such as launch.export writes
    # A teacher's configuration by itself may not choose the denoiser as its decoder, nor have the
    # guidance of the denoiser's run.
    own = configuration.read(about.denoiser_config)
    given = about.denoiser_config | {"sample": about.config.get("sample")}
    sample = configuration.read(given).sample
    plain = dataclasses.asdict(sample) | {"decoder": "inverse", "guidance": 0.0}
    teacher = configuration.read(about.config | {"sample": plain})
    return dataclasses.replace(teacher, sample=sample), own
