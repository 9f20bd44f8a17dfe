"""A trained run as one object, for notebooks and for the programs that read a workdir."""

import dataclasses
import math

import jax
import numpy as np

from ntm_jax import typed
from ntm_jax.core.layers import Text
from ntm_jax.core.likelihood import bits_per_dim
from ntm_jax.core.model import NTM
from ntm_jax.data import transforms
from ntm_jax.data.pipeline import DataSpec
from ntm_jax.errors import UserError
from ntm_jax.runtime import attention, checkpoint, distill, evaluate, export, generate, sharding, state
from ntm_jax.runtime import config as configuration
from ntm_jax.runtime import prompts as asking
from ntm_jax.runtime.config import Config


@dataclasses.dataclass(frozen=True)
class Run:
    """A model with its parameters at a step, the EMA unless asked otherwise, on all the devices there are."""

    config: Config
    spec: DataSpec
    model: NTM
    params: dict
    step: int
    mesh: jax.sharding.Mesh
    workdir: str
    raw: bool = False
    denoiser: tuple | None = None  # of a denoiser's run, (module, parameters): model and params are its teacher's
    teacher_step: int | None = None  # and the step that these are of
    denoiser_config: Config | None = None  # and the configuration of the denoiser's own run, which has the denoiser's sizes

    def log_prob(self, images, label=None, trajectories: int = 32, seed: int | None = None) -> np.ndarray:
        """The importance-weighted lower bound on log p(image | label), nats, [n].

        images: [n, H, W, C] integers 0..levels-1, label: [n], or Text for a model of texts. Of continuous latents it is a
        bound on the density of the image noised to t_0, the noise given by the seed.
        """
        images = np.asarray(images)
        if images.shape[1:] != self.spec.image_shape:
            raise UserError(f"images have shape {images.shape}: expected [n, {', '.join(map(str, self.spec.image_shape))}]")
        x = transforms.scale(images, self.spec.levels) if self.spec.levels else images.astype(np.float32)
        x = transforms.patchify(x, self.spec.patch_size)
        told = self._condition(len(x), label)
        told = {"text": told.states, "text_mask": told.mask} if isinstance(told, Text) else {"label": told}
        shards = sharding.batch_shards(self.mesh)
        batch = {"x": x, "index": np.arange(len(x), dtype=np.int32)} | told
        batch = {k: np.resize(v, (-(-len(x) // shards) * shards, *v.shape[1:])) for k, v in batch.items()}
        result = evaluate.score_batch(self.config, self.model, self.params, batch, self.mesh, self.spec.levels, trajectories, seed=seed)
        return sharding.to_host(result["importance_weighted"])[: len(x)]

    def bits_per_dim(self, images, label=None, trajectories: int = 32, seed: int | None = None) -> np.ndarray:
        """The upper bound on -log2 p(image | label) / (H W C) that log_prob gives, [n]; UserError for continuous latents."""
        evaluate.check_unit("bits_per_dim", self)
        nats = -self.log_prob(images, label, trajectories, seed)
        return bits_per_dim(nats, math.prod(self.spec.image_shape))

    def sample(self, n: int, label=None, prompts=None, **options) -> np.ndarray:
        """n images [n, H, W, C], integers 0..levels-1, or latents, of label [n] or Text, or of prompts in turn, else as of
        generate.conditions; options as of generate.generate."""
        if prompts is not None:
            label = asking.states(asking.encoder(self), [prompts[i % len(prompts)] for i in range(n)])
        return self.sample_at(np.arange(n), label, **options)

    def sample_at(self, index, label=None, **options) -> np.ndarray:
        """The images of these indices."""
        label = None if label is None else self._condition(len(index), label)
        generate.check(self.config, options.get("steps"), options.get("guidance"))
        return generate.generate(
            self.config, self.model, self.params, self.spec, self.mesh, index, label, denoiser=self.denoiser, **options)

    def _condition(self, n, label):
        classes, width = self.model.config.num_classes, self.model.config.text_width
        if width:
            if not isinstance(label, Text) or np.shape(label.states)[::2] != (n, width) or np.shape(label.mask) != label.states.shape[:2]:
                raise UserError(f"the model is told texts: give label=Text(states [{n}, M, {width}], mask [{n}, M]) of ntm_jax.core.layers")
            return Text(np.asarray(label.states, np.float16), np.asarray(label.mask, bool))
        if label is None and classes:
            raise UserError(f"no label is given, and the model is of {classes} classes: give one label, or one for each of the {n} images")
        label = np.asarray(0 if label is None else label, np.int32)
        if label.shape not in ((), (1,), (n,)):
            raise UserError(f"label has shape {label.shape}: expected one label, or one for each of the {n} images")
        label = np.broadcast_to(label, n)
        if classes and not ((0 <= label) & (label < classes)).all():
            raise UserError(f"labels run from {label.min()} to {label.max()}: expected 0 to {classes - 1}")
        return label


def _mesh(config: configuration.Mesh):
    """The run's mesh on the devices there are, or, where they are too few for its other axes, all of them along data."""
    try:
        return sharding.make_mesh(config if -1 in (config.fsdp, config.tensor, config.sequence) else dataclasses.replace(config, data=-1))
    except UserError:
        return sharding.make_mesh(configuration.Mesh(1, -1, 1, 1, 1))


def with_denoiser(teacher: Run, run: Run) -> Run:
    """The teacher, sampled and evaluated as a denoiser's run is configured, with that run's step, folder and denoiser."""
    config = dataclasses.replace(teacher.config, sample=run.config.sample, evaluate=run.config.evaluate, seed=run.config.seed)
    return dataclasses.replace(teacher, config=config, step=run.step, workdir=run.workdir, raw=run.raw, denoiser=(run.model, run.params),
                               teacher_step=teacher.step, denoiser_config=run.config)


def load(workdir: str, step: int | None = None, raw: bool = False) -> Run:
    """The run in a workdir, or one of its WORKDIR/checkpoints/STEP, at its latest step or `step`, with the EMA or the raw parameters.

    workdir may also be an export: the run that it was made of, with the step, the parameters and the settings of sampling that it holds.
    UserError where there is none, or it was damaged.
    """
    folder, named = checkpoint.locate(workdir)
    if named is not None and step is None:
        workdir, step = str(folder), named
    if export.is_export(workdir):
        return _load_export(str(workdir), step, raw)
    config, spec = configuration.load(workdir)
    mesh = _mesh(config.mesh)
    model = state.make_model(config, spec, attention.choose(mesh))
    if config.teacher:
        model = distill.make_denoiser(model)
        step, params = state.restore_params(workdir, config, model, mesh, step, raw, configuration.fixed(config, spec))
        return with_denoiser(load(f"{workdir}/frozen"), Run(config, spec, model, params, step, mesh, str(workdir), raw))
    step, params = state.restore_params(workdir, config, model, mesh, step, raw, configuration.fixed(config, spec))
    return Run(config, spec, model, params, step, mesh, str(workdir), raw)


def _load_export(folder: str, step: int | None, raw: bool) -> Run:
    about = export.read_about(folder)
    if step not in (None, about.step):
        raise UserError(f"{folder} is an export of step {about.step}, and step {step} is asked of it: leave --step out, or give the "
                        "workdir of the run")
    if raw and about.parameters != "raw":
        raise UserError(f"{folder} is an export of the moving average of the parameters, and the raw ones are asked of it: leave --raw "
                        "out, or give the workdir of the run")
    try:
        spec = _exported_spec(about.spec)
        config, denoiser_config = _exported_configs(about)
        mesh = _mesh(config.mesh)
        model = state.make_model(config, spec, attention.choose(mesh))
        abstract, denoiser = state.abstract(config, model, mesh).params, None
        if denoiser_config:
            own_mesh = _mesh(denoiser_config.mesh)
            denoiser = distill.make_denoiser(state.make_model(denoiser_config, spec, attention.choose(own_mesh)))
            abstract = abstract | {export.DENOISER: state.abstract(denoiser_config, denoiser, own_mesh).params["params"]}
    except UserError as error:
        raise UserError(f"{folder}/{export.CONFIG} cannot be used ({error}): {export.REMEDY}") from None
    params = export.read_parameters(folder, about, abstract)
    if denoiser:
        denoiser = (denoiser, {"params": params.pop(export.DENOISER)})
    return Run(config, spec, model, params, about.step, mesh, folder, about.parameters == "raw", denoiser, about.teacher_step,
               denoiser_config)


def _exported_configs(about) -> tuple[Config, Config | None]:
    """The configuration of an export's run, and of its denoiser's own run if it has one."""
    if about.teacher_step is None:
        return configuration.read(about.config), None
    if about.denoiser_config is None:
        raise UserError("it lacks denoiser_config, the sizes of the learned denoiser, since an earlier version of ntm_jax exported it")
    # A teacher's configuration by itself may not name the denoiser as its decoder, nor be guided as the denoiser's run is.
    own = configuration.read(about.denoiser_config)
    sample = configuration.read(about.denoiser_config | {"sample": about.config.get("sample")}).sample
    teacher = configuration.read(about.config | {"sample": dataclasses.asdict(sample) | {"decoder": "inverse", "guidance": 0.0}})
    return dataclasses.replace(teacher, sample=sample), own


def _exported_spec(values: dict) -> DataSpec:
    spec = typed.read(DataSpec, values, "spec")
    height, width, channels = spec.image_shape
    if min(height, width, channels, spec.patch_size) < 1 or height % spec.patch_size or width % spec.patch_size:
        raise UserError(f"spec.image_shape is {spec.image_shape}, spec.patch_size {spec.patch_size}: expected a patch that divides the "
                        "image")
    numbers = (math.prod(spec.image_shape), spec.levels, spec.num_classes, spec.count, spec.text_tokens, spec.text_width)
    if min(numbers) < 0 or max(numbers) > configuration.LARGEST_SIZE or len(spec.mean) != len(spec.std):
        raise UserError(f"spec has a number below 0 or above {configuration.LARGEST_SIZE}, or not as many means as standard deviations")
    return spec
