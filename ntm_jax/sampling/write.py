"""Writes samples of a run into a folder, batch by batch, so that a stopped call can be resumed.

Symbols: n images; H, W, C image height, width, channels; K levels.
"""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import numpy as np
from etils import epath

from ntm_jax import files
from ntm_jax.data import pretrained
from ntm_jax.errors import UserError, check_count
from ntm_jax.runtime import checksums, plots
from ntm_jax.runtime.run import Run, checked_seed
from ntm_jax.sampling import generate, prompts
from ntm_jax.sampling.options import check_decoder, override
from ntm_jax.sampling.output_folder import OutputFolder
from ntm_jax.sampling.prompts import Prompt


@dataclasses.dataclass(frozen=True)
class SampleRequest:
    """Which images to write. None stands for the configuration's setting."""

    num: int
    batch: int = 500  # images at a time
    labels: list[str] | None = None  # classes by name or number, in turn over the images
    prompts: list[Prompt] | None = None  # each has num / len(prompts) images, a whole number
    layout: str | None = None  # geneval, dpg: the folders of a benchmark
    encoder: str | None = None  # of the prompts; see prompts.open_encoder
    autoencoder: str | None = None  # the folder of FLUX.2's, which decodes latents to images
    save_trajectories: bool = False
    steps: int | None = None
    guidance: float | tuple[float, ...] | None = None
    decoder: str | None = None
    inverse: str | None = None
    seed: int | None = None
    log_prob: bool = False  # also writes the log-density of every trajectory
    condition: tuple[tuple[float, ...], ...] | None = None  # vectors, in turn over the samples

    @property
    def per_prompt(self) -> int:
        """How many images each prompt has."""
        return self.num // len(self.prompts) if self.prompts else 1


def write_samples(run: Run, out: str, request: SampleRequest) -> None:
    """Writes images of a run into a folder, and prints how many and how fast.

    PNG files; grid.png; samples.npz, in ADM's layout: arr_0 uint8 [n, H, W, 3], or latents as they
    are, arr_1 labels, prompts' numbers or vectors; with log_prob also log_prob [n] and
    log_prob_by_factor [n, K] from pure noise down, in nats; with save_trajectories
    trajectories.npz: arr_0 [n, K, H, W, C] from pure noise down, which an autoencoder does not
    decode, and with log_prob as the model has them; for prompts contact_sheet.png and
    prompts.jsonl. Of an array only samples.npz, with arr_0 [n, D] in its own units.

    What a stopped call has written is kept, and the rest is made, bit for bit as an uninterrupted
    call makes it. Raises UserError where the folder holds anything else, other samples among it;
    nothing is overwritten.
    """
    work = _Work(run, request)
    asked = work.description()
    output = OutputFolder(epath.Path(files.expanded(out)), "samples.json", "samples.npz")
    made, per_second = output.fill(asked, request.num, request.batch, "sample", work,
                                   (run.params, run.denoiser and run.denoiser.params))
    if jax.process_index():
        return
    unit = "rows" if run.spec.columns else "images"
    rate = f", {per_second:.1f} {unit}/s after the first batch" if per_second else ""
    found = f", {request.num - made} of them found there" if made < request.num else ""
    print(f"{request.num} {unit} in {out}{found}{rate}, step {run.step}", flush=True)


class _Work:
    """A request, checked against a run, and what its batches need."""

    def __init__(self, run: Run, request: SampleRequest):
        self.run, self.request = run, request
        check_count("num", request.num)
        self.options = override(run.config, steps=request.steps, guidance=request.guidance,
                                decoder=request.decoder, inverse=request.inverse)
        check_decoder(run, self.options.decoder)
        if request.log_prob:
            generate.check_density(run, self.options)
        given = {"--labels": request.labels, "--condition": request.condition,
                 "--prompts": request.prompts}
        for flag, values in given.items():
            if values and flag != run.condition.flag:
                remedy = f"give {run.condition.flag}" if run.condition.flag else "leave it out"
                raise UserError(f"{flag} is given, and the model of {run.workdir} "
                                f"is conditioned on {run.condition.describe()}: {remedy}")
        values = request.labels or request.condition
        # the conditions that are given, in turn over the samples
        self.given: Any = None
        if values:
            self.given = run.condition.validate(len(values), np.array(values))
        self.encoder = prompts.open_encoder(run, request.encoder) if request.prompts else None
        self.autoencoder = None
        if request.autoencoder and jax.process_index() == 0:
            make, folder = pretrained.AUTOENCODERS.find(f"flux2:{request.autoencoder}")
            self.autoencoder = make(folder)
        self.pixel_levels = 256 if request.autoencoder else run.spec.pixel_levels
        prompts.check_layout(request.layout, request.prompts)

    def description(self) -> dict:
        """What the folder's samples.json records, so that only the same call resumes it."""
        request, selection = self.request, self.run.selection
        selected = {}
        if selection:
            selected = {"--candidates": selection.candidates, "--judge": selection.judge.workdir,
                        "judge_step": selection.judge.step, "--enough": selection.stop_nats,
                        "judge_checksum": checksums.digest(selection.judge.params)}
        return selected | {
            "--workdir": self.run.workdir, "step": self.run.step, "--num": request.num,
            "--batch": request.batch, "--save_trajectories": request.save_trajectories,
            "--labels": self.given.tolist() if request.labels else None,
            "--autoencoder": request.autoencoder, "--layout": request.layout,
            "--prompts": request.prompts and _described(request.prompts),
            "--encoder": self.encoder and self.encoder.name, "--steps": self.options.steps,
            "--guidance": self.options.guidance, "--decoder": self.options.decoder,
            "--inverse": self.options.inverse, "percentile": self.options.percentile,
            "--seed": checked_seed(self.run, request.seed), "split": self._split(),
            "--log_prob": request.log_prob or None,
            "--condition": request.condition and [list(vector) for vector in request.condition]}

    def _split(self) -> str | None:
        """The split whose texts or vectors the samples have; None where they have given ones."""
        given = self.request.prompts or self.given is not None
        own = self.run.condition.from_records and not given
        return self.run.config.evaluate.split if own else None

    def _condition(self, index):
        """The condition of the samples of these indices."""
        if self.request.prompts:
            return prompts.states(self.encoder, [
                self.request.prompts[i // self.request.per_prompt].text for i in index])
        if self.given is None:
            return self.run.default_condition(index)
        return jax.tree.map(lambda a: a[index % len(a)], self.given)

    def write_batch(self, output: OutputFolder, number: int, index) -> None:
        """Makes the images of these indices and writes their files."""
        run, request = self.run, self.request
        images, levels, density = self._draw(index, self._condition(index))
        if jax.process_index():
            return
        if self.autoencoder:
            mean, std = np.asarray(run.spec.mean or 0), np.asarray(run.spec.std or 1)
            images = images * std.astype(np.float32) + mean.astype(np.float32)
            images = self.autoencoder.decode(images)
        folder = output.folder
        paths = [prompts.image_path(folder, request.layout, i, request.per_prompt, request.num)
                 for i in index]
        shown = () if run.spec.columns else plots.displayable(images, self.pixel_levels)
        for path, image in zip(paths, shown, strict=False):
            plots.save_png(path, image)
        # Written last and atomically: its presence marks the batch as complete.
        with files.atomic_writer(output.part(number)) as file:
            np.savez(file, images, *levels, **density)

    def _draw(self, index, y) -> tuple[np.ndarray, list, dict]:
        """(samples of these indices, their levels if asked for, their log-density if asked for)."""
        run, request = self.run, self.request
        if request.log_prob:
            drawn = generate.draw_at(run, index, y, self.options, request.seed)
            levels = [drawn.levels] if request.save_trajectories else []
            return drawn.samples, levels, {"log_prob_by_factor": drawn.log_prob_by_factor}
        found = generate.sample_at(run, index, y, self.options, request.seed,
                                   request.save_trajectories)
        images, *levels = found if isinstance(found, tuple) else (found,)
        return images, levels, {}

    def gather(self, output: OutputFolder, batches: int) -> None:
        """Writes the files of all images."""
        run, request, folder = self.run, self.request, output.folder
        arrays = output.read_parts(batches)
        stored = images = arrays["arr_0"]
        if "arr_1" in arrays:
            levels, pixels = arrays["arr_1"], 0 if request.log_prob else run.spec.pixel_levels
            with files.atomic_writer(folder / "trajectories.npz") as file:
                np.savez(file, plots.displayable(levels, pixels) if pixels else levels)
        if not run.spec.columns:
            shown = plots.displayable(images, self.pixel_levels)
            plots.save_png(folder / "grid.png", plots.picture(images[:100], self.pixel_levels))
            if request.prompts:
                prompts.write_pictures(folder, request.layout, request.prompts, shown)
            stored = shown if self.pixel_levels else images
            if self.pixel_levels and stored.shape[-1] == 1:  # gray; latents stay as they are
                stored = np.repeat(stored, 3, -1)
        density = {}
        if request.log_prob:
            factors = arrays["log_prob_by_factor"]
            density = {"log_prob": factors.sum(1, dtype=np.float64), "log_prob_by_factor": factors}
        with files.atomic_writer(folder / "samples.npz") as file:
            np.savez(file, stored, self._numbers(), **density)
        output.remove_parts(batches)

    def _numbers(self) -> np.ndarray:
        """The label, the prompt's number or the vector [E] in its own units, of every sample."""
        if self.run.condition.captioned:
            number = np.arange(self.request.num) // self.request.per_prompt
            return number if self.request.prompts else np.zeros_like(number)
        batches = generate.in_batches(self.request.num, self.request.batch)
        return np.concatenate([self.run.condition.numbers(self._condition(index))
                               for index in batches])


def _described(asked: list[Prompt]) -> str:
    """The number of prompts and their digest."""
    content = json.dumps([dataclasses.astuple(prompt) for prompt in asked])
    return f"{len(asked)} of digest {hashlib.sha256(content.encode()).hexdigest()[:16]}"
