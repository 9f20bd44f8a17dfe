"""A trained run as one object, for notebooks and for the programs that read a workdir."""

import dataclasses

import jax
import numpy as np

from ntm_jax.core.model import NTM
from ntm_jax.data import transforms
from ntm_jax.data.pipeline import DataSpec
from ntm_jax.errors import UserError
from ntm_jax.runtime import attention, evaluate, generate, sharding, state
from ntm_jax.runtime import config as configuration
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

    def log_prob(self, images, label=None, trajectories: int = 32, seed: int | None = None) -> np.ndarray:
        """The importance-weighted lower bound on log p(image | label), nats, [n].

        images: [n, H, W, C] integers 0..levels-1, label: [n]. bits/dim = -log_prob / (H W C ln 2).
        """
        images = np.asarray(images)
        if images.shape[1:] != self.spec.image_shape:
            raise UserError(f"images have shape {images.shape}: expected [n, {', '.join(map(str, self.spec.image_shape))}]")
        x = transforms.patchify(transforms.scale(images, self.spec.levels), self.spec.patch_size)
        label = self._labels(len(x), label)
        shards = sharding.batch_shards(self.mesh)
        batch = {"x": x, "label": label, "index": np.arange(len(x), dtype=np.int32)}
        batch = {k: np.resize(v, (-(-len(x) // shards) * shards, *v.shape[1:])) for k, v in batch.items()}
        result = evaluate.score_batch(self.config, self.model, self.params, batch, self.mesh, self.spec.levels, trajectories, seed=seed)
        return sharding.to_host(result["importance_weighted"])[: len(x)]

    def sample(self, n: int, label=None, **options) -> np.ndarray:
        """n images [n, H, W, C], integers 0..levels-1; label [n] (by default all classes in turn); options as of generate.generate."""
        return self.sample_at(np.arange(n), label, **options)

    def sample_at(self, index, label=None, **options) -> np.ndarray:
        """The images of these indices."""
        label = None if label is None else self._labels(len(index), label)
        generate.check(self.config, options.get("steps"), options.get("guidance"))
        return generate.generate(self.config, self.model, self.params, self.spec, self.mesh, index, label, **options)

    def _labels(self, n, label):
        classes = self.model.config.num_classes
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


def load(workdir: str, step: int | None = None, raw: bool = False) -> Run:
    """The run in a workdir at its latest step or `step`, with the EMA or the raw parameters. UserError where there is none."""
    config, spec = configuration.load(workdir)
    mesh = _mesh(config.mesh)
    model = state.make_model(config, spec, attention.choose(mesh))
    step, params = state.restore_params(workdir, config, model, mesh, step, raw)
    return Run(config, spec, model, params, step, mesh)
