"""Reads runs: from a workdir, or from an export, which holds one run's parameters and settings.

An export lies in a folder or, at hf://OWNER/NAME, on the Hugging Face Hub. Reading one runs none of
its code: only config.json and the safetensors are opened, and both are verified.
"""

import dataclasses
import hashlib
import math

import jax
import safetensors
import safetensors.numpy
from etils import epath
from flax import traverse_util

from ntm_jax import files, typed
from ntm_jax.data.pipeline import DataSpec, spec_from_json
from ntm_jax.errors import UserError, first_line
from ntm_jax.export import hub
from ntm_jax.registry import NotRegistered
from ntm_jax.runtime import build, checksums
from ntm_jax.runtime import config as configuration
from ntm_jax.runtime.config import Config
from ntm_jax.runtime.processes import require_same_everywhere
from ntm_jax.runtime.run import Denoiser, Run, load_workdir, run_mesh, untrained

FORMAT = 1
CONFIG, WEIGHTS, SCRIPT = "config.json", "model.safetensors", "sample.py"
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
    files: dict = dataclasses.field(default_factory=dict)  # {file's name: SHA-256}; may be missing
    teacher_step: int | None = None  # of the teacher, in the export of a denoiser's run
    denoiser_config: dict | None = None  # the denoiser's own configuration, which has its sizes


def is_export(folder) -> bool:
    """Whether a folder is an export, even a damaged one, and not a run's."""
    folder = epath.Path(folder)
    if (folder / "checkpoints").exists():
        return False
    return any((folder / name).exists() for name in (WEIGHTS, SCRIPT, "sampler.bin"))


def read_export_info(folder) -> ExportInfo:
    """An export's config.json, verified.

    Raises UserError if it is missing, damaged or of another format.
    """
    path = epath.Path(folder) / CONFIG
    text = _content(path)
    values = files.read_json(path, REMEDY)
    if "files" in values and files.SEAL.encode() not in text:
        raise UserError(f"{path} was damaged or edited: its checksum {files.SEAL} is missing; "
                        f"{REMEDY}")
    version = values.get("format")
    if version is None:
        raise UserError(f"{path} is not an export's: expected the folder that launch/export.py "
                        "wrote")
    if isinstance(version, int) and version != FORMAT:
        raise UserError(f"{folder} is of format {version}, and this version of ntm_jax reads "
                        f"{FORMAT}: export the run anew")
    names = {field.name for field in dataclasses.fields(ExportInfo)}
    known = {key: value for key, value in values.items() if key in names}
    try:
        return typed.parse_dataclass(ExportInfo, known, CONFIG)
    except UserError as error:
        raise UserError(f"{path} cannot be used ({error}): {REMEDY}") from None


def read_parameters(folder, about: ExportInfo, abstract, skip: str | None = None) -> dict:
    """The parameters of an export, verified, on the devices of their abstract counterparts.

    Arrays whose name begins with `skip` are left out. Raises UserError if the file is damaged, or
    its arrays are not those of `abstract`.
    """
    path = epath.Path(folder) / WEIGHTS
    content = _content(path)
    if about.files and hashlib.sha256(content).hexdigest() != about.files.get(WEIGHTS):
        raise UserError(f"{path} was damaged or edited: its SHA-256 is not the one in {CONFIG}; "
                        f"{REMEDY}")
    try:
        flat = safetensors.numpy.load(content)
    except (safetensors.SafetensorError, LookupError, TypeError, ValueError,
            AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {first_line(error)}): "
                        f"{REMEDY}") from None
    flat = {name: array for name, array in flat.items() if not (skip and name.startswith(skip))}
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


def _content(path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): {REMEDY}") from None


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
    try:
        spec = _exported_spec(about.spec)
        config, denoiser_config = _exported_configs(about)
        run = untrained(config, spec, run_mesh(config.mesh), folder)
        abstract = build.abstract_params(run.model, run.mesh)
        if denoiser_config:
            own = untrained(denoiser_config, spec, run_mesh(denoiser_config.mesh))
            # abstract_params returns one dict to all callers, which must not change.
            abstract = abstract | {
                DENOISER: build.abstract_params(own.model, own.mesh)["params"]}
    except NotRegistered:
        raise  # the file is whole, and the line names the remedy
    except UserError as error:
        raise UserError(f"{folder}/{CONFIG} cannot be used ({error}): {REMEDY}") from None
    params, denoiser = read_parameters(folder, about, abstract), None
    if denoiser_config:
        denoiser = Denoiser(own.model, {"params": params.pop(DENOISER)}, denoiser_config,
                            about.teacher_step)
    return dataclasses.replace(run, params=params, step=about.step, raw=about.parameters == "raw",
                               denoiser=denoiser)


def _exported_configs(about: ExportInfo) -> tuple[Config, Config | None]:
    """The configuration of an export's run, and its denoiser's own if it has one."""
    if about.teacher_step is None:
        return configuration.read(about.config), None
    if about.denoiser_config is None:
        raise UserError("it lacks denoiser_config, the sizes of the learned denoiser, since an "
                        "earlier version of ntm_jax exported it")
    # A teacher's configuration by itself may not choose the denoiser as its decoder, nor have the
    # guidance of the denoiser's run.
    own = configuration.read(about.denoiser_config)
    given = about.denoiser_config | {"sample": about.config.get("sample")}
    sample = configuration.read(given).sample
    plain = dataclasses.asdict(sample) | {"decoder": "inverse", "guidance": 0.0}
    teacher = configuration.read(about.config | {"sample": plain})
    return dataclasses.replace(teacher, sample=sample), own


def _exported_spec(values: dict) -> DataSpec:
    spec = spec_from_json(values)
    height, width, channels = spec.image_shape
    smallest = min(height, width, channels, spec.patch_size)
    if smallest < 1 or height % spec.patch_size or width % spec.patch_size:
        raise UserError(f"spec.image_shape is {spec.image_shape}, spec.patch_size "
                        f"{spec.patch_size}: expected a patch that divides the image")
    numbers = (math.prod(spec.image_shape), spec.pixel_levels, spec.num_classes, spec.count,
               spec.text_tokens, spec.text_width, spec.condition_width)
    largest = 2**31 - 1  # sizes and indices of arrays are int32
    if min(numbers) < 0 or max(numbers) > largest or len(spec.mean) != len(spec.std):
        raise UserError(f"spec has a number below 0 or above {largest}, or not as many means as "
                        "standard deviations")
    vectors = {len(spec.condition_mean), len(spec.condition_std), spec.condition_width}
    if spec.columns not in (0, numbers[0]) or len(vectors) > 1 or (
            spec.columns and len(spec.std) != spec.columns):
        raise UserError("spec has other numbers of columns, or of a condition's numbers, than "
                        "means and standard deviations")
    return spec
