"""Writes samples of a run into a folder, batch by batch, so that a stopped call can be resumed.

Symbols: n images; H, W, C image height, width, channels; K levels.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath

from ntm_jax import files
from ntm_jax.errors import UserError
from ntm_jax.registry import load
from ntm_jax.runtime import checksums, plots
from ntm_jax.runtime.run import Run, checked_seed
from ntm_jax.sampling import generate, prompts
from ntm_jax.sampling.output_folder import fill
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
    autoencoder: str | None = None  # decodes latents, such as kl:FOLDER
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
    """Writes images of a run into a folder, and prints how many.

    PNG files; grid.png; samples.npz, in ADM's layout: arr_0 uint8 [n, H, W, 3], or latents where no
    autoencoder decodes them, arr_1 labels, prompts' numbers or vectors; with log_prob also log_prob
    [n] and log_prob_by_factor [n, K] from pure noise down, in nats; with save_trajectories
    trajectories.npz: arr_0 [n, K, H, W, C] from pure noise down, which an autoencoder does not
    decode, and with log_prob as the model has them; for prompts contact_sheet.png and
    prompts.jsonl. Of an array only samples.npz, with arr_0 [n, D] in its own units.

    What a stopped call has written is kept, and the rest is made, bit for bit as an uninterrupted
    call makes it. Raises UserError where the folder holds anything else, other samples among it;
    nothing is overwritten.
    """
    writer = _Writer(run, request, epath.Path(files.expanded(out)))
    fill(run, writer.folder, "samples.json", "samples.npz", writer.asked(), request.num,
         request.batch, writer.make, writer.gather)
    if not jax.process_index():
        unit = "rows" if run.spec.columns else "images"
        print(f"{request.num} {unit} in {out}, step {run.step}", flush=True)


class _Writer:
    """A request, checked against a run, and what its batches need."""

    def __init__(self, run: Run, request: SampleRequest, folder: epath.Path):
        if request.autoencoder is not None:
            config = run.config.with_sampling(autoencoder=request.autoencoder)
            run = dataclasses.replace(run, config=config)
        generate.autoencoder_of(run)  # before anything is drawn
        self.run, self.request, self.folder = run, request, folder
        self.options = generate.override(
            run.config, steps=request.steps, guidance=request.guidance, decoder=request.decoder,
            inverse=request.inverse)
        generate.check_decoder(run, self.options.decoder)
        if request.log_prob:
            generate.check_density(run, self.options)
        kind, values = run.condition, request.labels or request.condition
        for flag, given in {"--labels": request.labels, "--condition": request.condition}.items():
            if given and flag != kind.flag:
                remedy = f"give {kind.flag}" if kind.flag else "leave it out"
                raise UserError(f"{flag} is given, and the model of {run.workdir} is conditioned "
                                f"on {kind.describe()}: {remedy}")
        # the conditions that are given, in turn over the samples
        self.given: Any = None
        if values:
            self.given = kind.validate(len(values), np.array(values))
        self.encoder = prompts.open_encoder(run, request.encoder) if request.prompts else None
        self.layout = prompts.Layout()
        if request.layout:
            if not request.prompts:
                raise UserError(f"--layout={request.layout} writes a benchmark's folder: give its "
                                "prompts as --prompts")
            self.layout = load(prompts.LAYOUTS[request.layout])()
            self.layout.check(request.prompts)
        self.pixel_levels = generate.picture_levels(run)

    def asked(self) -> dict:
        """What the folder's samples.json records, so that only the same call resumes it."""
        run, request, options, selection = self.run, self.request, self.options, self.run.selection
        selected = {}
        if selection:
            selected = {"--candidates": selection.candidates, "--judge": selection.judge.workdir,
                        "judge_step": selection.judge.step, "--enough": selection.stop_nats,
                        "judge_checksum": checksums.digest(selection.judge.params)}
        given = request.labels or request.condition or request.prompts
        from_records = run.condition.from_records and not given
        return selected | {
            "--save_trajectories": request.save_trajectories,
            "--labels": self.given.tolist() if request.labels else None,
            "--autoencoder": run.config.sample.autoencoder or None, "--layout": request.layout,
            "--prompts": request.prompts and _described(request.prompts),
            "--encoder": self.encoder and self.encoder.name, "--steps": options.steps,
            "--guidance": options.guidance, "--decoder": options.decoder,
            "--inverse": options.inverse, "percentile": options.percentile,
            "--seed": checked_seed(run, request.seed),
            "split": run.config.evaluate.split if from_records else None,
            "--log_prob": request.log_prob or None, "--condition": request.condition}

    def make(self, index) -> dict:
        """Draws the samples of these indices, writes their PNG files, and returns their arrays."""
        run, request = self.run, self.request
        drawing = run, index, self._condition(index), self.options, request.seed
        if request.log_prob:
            images, levels, density = generate.draw_at(*drawing)
            arrays = {"log_prob_by_factor": density}
            if request.save_trajectories:
                arrays["arr_1"] = levels
        elif request.save_trajectories:
            images, levels = generate.sample_at(*drawing, True)
            arrays = {"arr_1": levels}
        else:
            images, arrays = generate.sample_at(*drawing), {}
        images = generate.as_pictures(run, images)
        if jax.process_index():
            return {}
        if not run.spec.columns:
            for i, image in zip(index, plots.displayable(images, self.pixel_levels), strict=True):
                path = self.folder / self.layout.image(i, request.per_prompt, request.num)
                path.parent.mkdir(parents=True, exist_ok=True)
                plots.save_png(path, image)
        return {"arr_0": images} | arrays

    def gather(self, arrays: dict) -> None:
        """Writes the files of all samples."""
        run, request, folder = self.run, self.request, self.folder
        stored = images = arrays["arr_0"]
        if request.save_trajectories:
            levels, pixels = arrays["arr_1"], 0 if request.log_prob else run.spec.pixel_levels
            with files.atomic_writer(folder / "trajectories.npz") as file:
                np.savez(file, plots.displayable(levels, pixels) if pixels else levels)
        if not run.spec.columns:
            shown = plots.displayable(images, self.pixel_levels)
            plots.save_png(folder / "grid.png", plots.picture(images[:100], self.pixel_levels))
            if request.prompts:
                prompts.write_pictures(folder, self.layout, request.prompts, shown)
            stored = shown if self.pixel_levels else images
            if self.pixel_levels and stored.shape[-1] == 1:  # gray; latents stay as they are
                stored = np.repeat(stored, 3, -1)
        density = {}
        if request.log_prob:
            factors = arrays["log_prob_by_factor"]
            density = {"log_prob": factors.sum(1, dtype=np.float64), "log_prob_by_factor": factors}
        with files.atomic_writer(folder / "samples.npz") as file:
            np.savez(file, stored, self._numbers(), **density)

    def _condition(self, index):
        """The condition of the samples of these indices."""
        if self.request.prompts:
            return prompts.states(self.encoder, [
                self.request.prompts[i // self.request.per_prompt].text for i in index])
        if self.given is None:
            return self.run.default_condition(index)
        return jax.tree.map(lambda a: a[index % len(a)], self.given)

    def _numbers(self) -> np.ndarray:
        """The label, the prompt's number or the vector [E] in its own units, of every sample."""
        index = np.arange(self.request.num)
        if self.request.prompts:
            return index // self.request.per_prompt
        if self.run.condition.captioned:
            return np.zeros_like(index)
        return self.run.condition.numbers(self._condition(index))


def _described(asked: list[Prompt]) -> str:
    """The number of prompts and their digest."""
    return f"{len(asked)} of digest {files.digest([*map(dataclasses.astuple, asked)])[:16]}"
