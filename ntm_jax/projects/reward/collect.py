"""Collects samples that a reward accepts, as a folder of captioned images to train on.

Training on them is rejection sampling fine-tuning (RAFT, arXiv 2304.06767). Samples with rare
traits are copied, so that what a model seldom draws becomes common.

Symbols: n samples, K traits; H, W, C image height, width, channels.
"""

import dataclasses
import json
from collections.abc import Sequence
from typing import cast

import jax
import numpy as np
from etils import epath

from ntm_jax import files
from ntm_jax.data import images as image_files
from ntm_jax.errors import UserError
from ntm_jax.projects.reward.scorer import Scorer
from ntm_jax.runtime import plots
from ntm_jax.runtime.config import Sample
from ntm_jax.runtime.run import Run, checked_seed
from ntm_jax.sampling import generate
from ntm_jax.sampling.output_folder import fill

MOST_COPIES = 256  # of a sample with rare traits
_HELD_OUT = 10  # one in so many samples goes to test/
_PIXEL_LEVELS = 256  # of image files


@dataclasses.dataclass(frozen=True)
class CollectRequest:
    """Which samples to draw and to keep. None stands for the configuration's setting."""

    num: int  # samples to draw; sample i has the caption of training record i, in turn
    min_reward: float  # samples with a lower reward are dropped
    reward: str | None = None
    batch: int = 500  # samples at a time
    guidance: float | tuple[float, ...] | None = None
    decoder: str | None = None
    seed: int | None = None


def collect(run: Run, out: str, request: CollectRequest) -> None:
    """Writes the samples of a run that its reward accepts into a folder, and prints how many.

    train/ and test/ hold PNG files, test/ every tenth sample; metadata.jsonl has file_name, caption
    and reward of each; grid.png shows the first ones. The folder can be trained on as
    config.data.source=folder:OUT. Where the reward names traits, images in train/ with a trait that
    n of them show are copied until there are about mean(n) of it, MOST_COPIES times at most.

    What a stopped call has written is kept, and the same call goes on. Raises UserError where the
    run is not one of captioned images of 256 pixel levels, the reward accepts no sample,
    or the folder holds anything else; nothing is overwritten.
    """
    folder = epath.Path(files.expanded(out))
    collector = _Collector(run, request, folder)
    fill(run, folder, "collected.json", "metadata.jsonl", collector.asked(), request.num,
         request.batch, collector.make, collector.gather)
    if jax.process_index():
        return
    rows = (folder / "metadata.jsonl").read_text().splitlines()
    kept = sum("-" not in json.loads(row)["file_name"] for row in rows)
    print(f"{kept} of {request.num} samples kept, {len(rows)} images with copies in {out}, "
          f"step {run.step}", flush=True)


class _Collector:
    """A request, checked against a run, and what its batches need."""

    def __init__(self, run: Run, request: CollectRequest, folder: epath.Path):
        name = run.config.reward.name if request.reward is None else request.reward
        reward = dataclasses.replace(run.config.reward, name=name)
        self.run = dataclasses.replace(run, config=dataclasses.replace(run.config, reward=reward))
        self.request, self.folder, self.split = request, folder, run.config.data.split
        if not name:
            raise UserError(f"{run.workdir} has no reward: name one, such as --reward=shapes")
        if not run.condition.captioned or run.spec.pixel_levels != _PIXEL_LEVELS:
            raise UserError(f"{run.workdir} is not a model of captioned images of {_PIXEL_LEVELS} "
                            "pixel levels, and what is collected are image files with captions: "
                            "take a run with config.model.condition=text")
        self.options: Sample = generate.override(
            run.config, guidance=request.guidance, decoder=request.decoder)
        generate.check_decoder(run, self.options.decoder)
        # without the encoder, which reads every caption; default_condition opens it once
        source = dataclasses.replace(run.config.data, text_encoder="").open(self.split)
        self.captions = cast(Sequence[str], source.captions)  # of a model of text
        self.scorer = Scorer(self.run, source)

    def asked(self) -> dict:
        """What collected.json records, so that only the same call resumes the folder."""
        options = self.options
        return {
            "--reward": self.run.config.reward.name, "--min_reward": self.request.min_reward,
            "--guidance": options.guidance, "--decoder": options.decoder, "split": self.split,
            "--seed": checked_seed(self.run, self.request.seed)}

    def make(self, index: np.ndarray) -> dict:
        """Draws and scores the samples of these indices, and writes those that are kept."""
        y = self.run.default_condition(index, self.split)
        images = cast(np.ndarray, generate.sample_at(
            self.run, index, y, self.options, self.request.seed))
        if jax.process_index():
            return {}
        captions = [self.captions[int(i) % len(self.captions)] for i in index]
        scores = self.scorer.score(images, captions)
        kept = np.flatnonzero(scores.rewards >= self.request.min_reward)
        for part in ("train", "test"):
            (self.folder / part).mkdir(exist_ok=True)
        for row in kept:
            plots.save_png(self.folder / _name(index[row]), images[row])
        found = {"index": index[kept], "rewards": scores.rewards[kept],
                 "captions": np.array([captions[row] for row in kept], np.str_)}
        return found if scores.traits is None else found | {"traits": scores.traits[kept]}

    def gather(self, found: dict) -> None:
        """Writes the copies, the picture and the list of all samples that are kept."""
        folder = self.folder
        names = [_name(index) for index in found["index"]]
        if not names:
            raise UserError(f"no sample of {self.request.num} has a reward of "
                            f"{self.request.min_reward} or more: lower --min_reward")
        shown = [image_files.decode((folder / name).read_bytes()) for name in names[:100]]
        plots.save_png(folder / "grid.png", plots.picture(np.stack(shown), _PIXEL_LEVELS))
        in_train = np.array([name.startswith("train/") for name in names])
        copies = np.ones(len(names), int)
        if "traits" in found:
            copies[in_train] = copies_of_rare(found["traits"][in_train])
        rows = []
        for name, count, caption, reward in zip(
                names, copies, found["captions"], found["rewards"], strict=True):
            content = (folder / name).read_bytes() if count > 1 else b""
            for number in range(1, count + 1):
                copy = name if number == 1 else name.replace(".png", f"-{number}.png")
                if number > 1:
                    files.write(folder / copy, content)
                rows.append({"file_name": copy, "caption": str(caption), "reward": float(reward)})
        files.write(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def _name(index: int) -> str:
    """The file of a sample, relative to the folder."""
    part = "test" if index % _HELD_OUT == _HELD_OUT - 1 else "train"
    return f"{part}/{index:07d}.png"


def copies_of_rare(traits: np.ndarray) -> np.ndarray:
    """How often each sample is written, [n] from 1 to MOST_COPIES, of traits [n, K] bool.

    The mean over the traits of the number of samples that show it, over that number for the rarest
    trait of the sample.
    """
    shown = traits.sum(0)
    times = np.mean(shown) / np.maximum(shown, 1)
    largest = np.max(traits * times, -1, initial=0)
    return np.clip(np.round(largest), 1, MOST_COPIES).astype(int)
