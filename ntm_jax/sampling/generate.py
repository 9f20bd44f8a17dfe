"""Images from a model, by index: image i has the same noise in any batch, mesh and process.

So it is the same image within rounding.

Symbols: n images; B batch, K levels, N tokens, D token channels; H, W, C image height, width,
channels; V pixel levels; M text tokens, E their width.
"""

import dataclasses
import functools
import warnings
from typing import NamedTuple

import jax
import numpy as np

from ntm_jax import typed
from ntm_jax.core.model import full_precision
from ntm_jax.core.trajectory import example_keys
from ntm_jax.data import transforms
from ntm_jax.data.autoencoder import Autoencoder, open_autoencoder
from ntm_jax.data.pipeline import DataSpec
from ntm_jax.errors import UserError
from ntm_jax.runtime import autoencode, sharding
from ntm_jax.runtime.config import Config, Sample, check_guidance, check_steps, guided
from ntm_jax.runtime.run import Run, checked_seed
from ntm_jax.sampling import decoders, selection
from ntm_jax.sampling.decoders import Sampler

BATCH = 100  # images at a time, of pictures and of scores, so that one program serves both


class Drawn(NamedTuple):
    """Samples, their levels, and the log-density of their trajectories.

    samples: [n, H, W, C], integers 0..V-1 or float32 latents, or [n, D] of arrays in their units.
    levels: x_T..x_0 from pure noise down, [n, K, ...] float32, as the model has them: pixels in
      [-1, 1], arrays standardised.
    log_prob_by_factor: [n, K] float32, nats, from pure noise down: log p(x_T), then
      log p(x_k | x_{k+1}, y). They are densities of the levels, of arrays in standardised units.
    """

    samples: np.ndarray
    levels: np.ndarray
    log_prob_by_factor: np.ndarray

    @property
    def log_prob(self) -> np.ndarray:
        """log p(x_0..x_T | y) of every sample, [n] float64, nats."""
        return self.log_prob_by_factor.sum(-1, dtype=np.float64)


def override(config: Config, **given) -> Sample:
    """The configuration's options of sampling with the given ones that are not None.

    Raises UserError for an option that is unknown, or whose value its setting does not take, for
    guidance of another length than the steps, or that the model was not trained for, and for more
    steps than t_min allows. Warns of a number of steps that it was not trained with.
    """
    given = {name: np.asarray(value).tolist() for name, value in given.items()
             if value is not None}
    values = dataclasses.asdict(config.sample) | given
    options = typed.parse_dataclass(Sample, values, "config.sample")
    guidance, steps, own = options.guidance, options.steps, config.sample
    check_guidance("guidance", guidance, steps)
    if guidance != own.guidance and guided(guidance) and not config.train.condition_dropout:
        raise UserError(f"guidance is {guidance}, and the model was trained without condition "
                        "dropout: sample with guidance 0")
    if decoders.find(options.decoder).solves_ode:
        return options
    check_steps("steps", steps, config.trajectory, config.trajectory.t_min)
    trained = config.trajectory.steps
    if steps != own.steps and steps not in trained:
        warnings.warn(f"{steps} steps were not trained, only {', '.join(map(str, trained))}: "
                      "expect worse images", stacklevel=2)
    return options


def check_decoder(run: Run, decoder: str) -> None:
    """Raises UserError for a decoder that needs a denoiser, or a velocity, that the run lacks."""
    needs = decoders.find(decoder)
    if needs.solves_ode and (run.model.backbone is None or run.model.config.transporter_blocks):
        raise UserError(f"decoder={decoder} solves the ODE of a flow-matching model, and this run "
                        "is not one: take inverse or score")
    if needs.needs_denoiser and not run.denoiser:
        raise UserError(f"decoder={decoder} needs a denoiser, and this run has none: give as "
                        "--workdir the run of one, trained with config.train.objective=denoiser "
                        "and --config.teacher")


@functools.partial(jax.jit, static_argnames=("sampler", "with_levels", "with_log_prob"))
def generate_tokens(params, root, index, y, denoiser_params=None, *, sampler: Sampler,
                    with_levels: bool = False, with_log_prob: bool = False):
    """(clean tokens [B, N, D], levels, log-densities) of the image indices [B] on condition y.

    levels: x_0..x_T [B, K, N, D], None unless with_levels. log-densities: [B, K], those of
    core.sampling.sample_with_log_prob, None unless with_log_prob.
    """
    keys = example_keys(root, "sample", index)
    x, xs, log_density = decoders.find(sampler.options.decoder).draw(
        sampler, params, keys, y, denoiser_params, with_levels or with_log_prob)
    return x, xs if with_levels else None, log_density if with_log_prob else None


def sample_at(run: Run, index, condition=None, options: Sample | None = None,
              seed: int | None = None, with_levels: bool = False):
    """The images of these indices [n] on a condition.

    condition: labels [n], Text or Vector, those of Run.default_condition by default. options and
    seed: the configuration's by default. Returns images [n, H, W, C], uint8 0..V-1, or
    float32 latents, or rows [n, D] of an array in its units; with_levels also the levels from pure
    noise down, [n, K, ...], of an array in standardised units.
    """
    spec = run.spec
    x, xs, _ = _tokens_at(run, index, condition, options, seed, with_levels)
    if not with_levels:
        return spec.from_tokens(x)
    return spec.from_tokens(x), spec.from_tokens(xs, own_units=False)[:, ::-1]


def pictures_at(run: Run, index, condition=None, options: Sample | None = None,
                seed: int | None = None) -> np.ndarray:
    """as_pictures of the samples of sample_at, whose arguments these are."""
    return as_pictures(run, sample_at(run, index, condition, options, seed))


def as_pictures(run: Run, samples) -> np.ndarray:
    """Samples [n, H, W, C] as images, integers 0..picture_levels-1.

    Latents are decoded by config.sample.autoencoder, on all devices of the mesh; without one they
    are returned as they are, and so are pixels. Every process gives the same samples and gets all
    images. Raises UserError like autoencoder_of.
    """
    autoencoder = autoencoder_of(run)
    if not autoencoder:
        return samples
    mean = np.asarray(run.spec.mean or 0, np.float32)
    std = np.asarray(run.spec.std or 1, np.float32)
    return autoencode.decode(autoencoder, samples * std + mean, run.mesh)


def picture_levels(run: Run) -> int:
    """The values that a pixel of as_pictures can take; 0 for latents that nothing decodes."""
    return 256 if run.config.sample.autoencoder else run.spec.pixel_levels


def autoencoder_of(run: Run) -> Autoencoder | None:
    """The autoencoder of the run's latents, opened once in a process; None without one.

    Raises UserError where it cannot be opened, has latents of other channels, or the run has none.
    """
    name, spec = run.config.sample.autoencoder, run.spec
    if not name:
        return None
    if spec.pixel_levels or spec.columns:
        raise UserError(f"config.sample.autoencoder is {name}, which decodes latents, and the run "
                        f"is of {'an array' if spec.columns else 'pixels'}: leave it out")
    found, channels = open_autoencoder(name), spec.image_shape[-1]
    if found.channels != channels:
        raise UserError(f"config.sample.autoencoder={name} has latents of {found.channels} "
                        f"channels, and the run's have {channels}: it is an autoencoder of another "
                        "size; give the one that encoded the data")
    return found


def draw_at(run: Run, index, condition=None, options: Sample | None = None,
            seed: int | None = None) -> Drawn:
    """The samples of sample_at, with their levels and the log-density of their trajectories.

    Raises UserError where samples have no such density; see check_density.
    """
    options, spec = options or run.config.sample, run.spec
    check_density(run, options)
    x, xs, log_density = _tokens_at(
        run, index, condition, options, seed, with_levels=True, with_log_prob=True)
    return Drawn(spec.from_tokens(x), as_levels(spec, xs), log_density[:, ::-1])


def as_levels(spec: DataSpec, xs: np.ndarray) -> np.ndarray:
    """Levels or latents of all levels [n, K, N, D] as users have them: [n, K, ...], noise first."""
    levels = transforms.unpatchify(xs, spec.image_shape, spec.patch_size)[:, ::-1]
    return levels.reshape(*levels.shape[:2], *spec.data_shape)


def check_density(run: Run, options: Sample) -> None:
    """Raises UserError for an ODE's solver, and where samples are selected."""
    if run.selection:
        raise UserError("a sample that is selected among candidates does not have the density of "
                        "its trajectory: take 1 candidate, or leave the log-density out")
    if decoders.find(options.decoder).solves_ode:
        raise UserError(f"decoder={options.decoder} solves an ODE, whose samples have no "
                        "trajectory density: give an NTM, or leave the log-density out")


def sampler_of(run: Run, options: Sample) -> tuple[Sampler, dict | None]:
    """The sampler of a run, and its denoiser's parameters if the decoder needs one.

    Raises UserError like check_decoder.
    """
    check_decoder(run, options.decoder)
    denoiser = run.denoiser if decoders.find(options.decoder).needs_denoiser else None
    sampler = Sampler(full_precision(run.model), run.schedule, options, run.mesh,
                      run.pixels, denoiser and denoiser.module)
    return sampler, denoiser and denoiser.params


def _tokens_at(run: Run, index, condition, options, seed: int | None, with_levels: bool,
               with_log_prob: bool = False) -> list:
    """generate_tokens of these indices [n], on the host."""
    options = options or run.config.sample
    decoder, (sampler, denoiser_params) = decoders.find(options.decoder), sampler_of(run, options)
    index = np.asarray(index, np.int32)
    y = run.default_condition(index) if condition is None else condition
    placed = sharding.place((index, y), run.mesh)
    seed = checked_seed(run, seed)
    root = jax.random.key(seed)

    def draw(number: int) -> list:
        own = jax.random.fold_in(root, number) if number else root
        with sharding.use(run.mesh):  # a decoder that has the levels anyway: the same program
            x, levels, density = generate_tokens(
                run.params, own, *placed, denoiser_params, sampler=sampler,
                with_levels=with_levels or decoder.needs_levels,
                with_log_prob=with_log_prob)
        found = x, levels if with_levels else None, density
        return [part if part is None else sharding.to_host(part)[: len(index)] for part in found]

    return selection.select(run, index, y, seed, draw) if run.selection else draw(0)


def in_batches(n: int, batch: int) -> list[np.ndarray]:
    """Image indices 0..n-1, `batch` at a time."""
    return [np.arange(start, min(start + batch, n)) for start in range(0, n, batch)]
