"""Runs a preparation: this process's shards, and the manifest once all shards are complete.

Any number of processes work on their own shards of one plan. A process verifies the SHA-256 of
those of its shards that exist, and makes those anew that differ from their tally or the manifest,
to the same bits. The process that finds all shards complete writes the manifest.
"""

import dataclasses
import functools
import hashlib
import re
import time
from collections.abc import Container, Sequence
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from ntm_jax import files
from ntm_jax.data.prepare import captioned, inputs, loading, shards
from ntm_jax.data.prepare.encoder import Encoder
from ntm_jax.data.prepare.plan import Choices, Shard, claim, make_plan, make_shards
from ntm_jax.data.prepare.shards import BadLimit, PreviousManifest, Tally, few
from ntm_jax.data.records import MANIFEST, Layout, write_manifest
from ntm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class _Job:
    """What the steps of a preparation share."""

    root: epath.Path
    choices: Choices
    given: captioned.Input
    encoder: Encoder
    plan: dict[str, Any]
    plan_hash: str
    previous: PreviousManifest | None
    limit: BadLimit


def prepare(
    choices: Choices,
    out: str,
    max_bad: float = 0.01,
    batch: int = 32,
    workers: int = 0,
    num_processes: int = 1,
    process_id: int = 0,
    follow_outside: bool = False,
) -> None:
    """Writes this process's shards to the folder `out`, and the manifest once all are complete.

    If there is a manifest already, shards that are missing, damaged or exchanged are made again, to
    the same bits.

    Args:
      max_bad: the permitted share of bad images: missing or not decodable. They are left out.
      batch: images encoded at a time. Changing it changes rounding in networks.
      workers: processes that decode images; 0 decodes in this one.
      num_processes, process_id: the number of processes that share the work, and this one's number
        from 0.
      follow_outside: see inputs.open_input.
    Raises:
      UserError: more bad images; a folder of another plan; an input or a choice that is not
        understood; shards that differ from the manifest when made again. Complete shards stay.
    """
    root = epath.Path(out).expanduser()
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id}: expected 0 to {num_processes - 1}, below "
            f"--num_processes={num_processes}"
        )
    given = inputs.open_input(
        choices.input, choices.captions, choices.caption_feature, choices.tfds_split, follow_outside
    )
    encoder, everything = Encoder(choices, given.classes), make_shards(choices, given.items)
    plan = make_plan(choices, given, encoder.digest)
    plan_hash = claim(root, plan, num_processes == 1)
    limit = BadLimit(max_bad * len(given.items), root)
    job = _Job(root, choices, given, encoder, plan, plan_hash, shards.read_previous(root), limit)
    mine = everything[process_id::num_processes]
    again = _make(job, mine, batch, workers)
    tallies = {shard.name: shards.complete(root, shard, plan_hash) for shard in everything}
    lacking = [shard for shard, tally in tallies.items() if tally is None]
    if lacking:
        print(
            f"this process is done; {len(lacking)} shards of others are not complete yet, such as "
            f"{lacking[0]}: the last process writes the manifest",
            flush=True,
        )
        return
    _finish(job, everything, [tally for tally in tallies.values() if tally])
    if job.previous:
        print(
            f"the {len(mine)} shards of this process agree with the earlier {MANIFEST}; made "
            f"again: {few(again) or 'none'}",
            flush=True,
        )


def _make(job: _Job, mine: Sequence[Shard], batch: int, workers: int) -> list[str]:
    """Makes this process's shards that are not verified.

    Returns the names of those that the manifest lists and that were made again.
    """
    done: dict[str, Tally] = {}
    for shard in mine:
        tally = shards.verified(job.root, shard, job.plan_hash, job.previous)
        if tally:
            done[shard.name] = tally
    again = [shard.name for shard in mine if job.previous and shard.name not in done]
    if again:
        print(f"differing from {MANIFEST}, and made again: {few(again)}", flush=True)
    job.limit.check(done.values())
    load = functools.partial(captioned.load, job.given.read, job.choices.image_size)
    with loading.make_pool(workers) as pool, _Progress(mine, done) as progress:
        for shard in mine:
            if shard.name in done:
                continue
            items = [job.given.items[row] for row in shard.rows]
            loaded = loading.load_items(pool, workers, load, items)
            tally = Tally(job.plan_hash)
            flip = job.choices.flip and shard.split == "train"
            examples = job.encoder.examples(loaded, tally, batch, flip)
            examples = progress.watch(job.limit.watch(examples, tally, list(done.values())), tally)
            shards.write(job.root, shard, examples, job.encoder.layout, tally)
            done[shard.name] = tally
            progress.done(shard)
    return again


class _Progress:
    """A bar of the images of a process's shards on a terminal, a line for each shard elsewhere."""

    def __init__(self, mine: Sequence[Shard], done: Container[str]):
        self._before = sum(len(shard.rows) for shard in mine if shard.name in done)
        self._bar = tqdm(
            total=sum(len(shard.rows) for shard in mine),
            initial=self._before,
            desc="prepare",
            unit="image",
            disable=None,
        )
        self._begin, self._first = time.perf_counter(), self._before

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()

    def watch(self, examples, tally: Tally):
        """The examples of the shard of `tally`; the bar follows them."""
        for example in examples:
            self._bar.update(self._before + tally.images - self._bar.n)
            yield example

    def done(self, shard: Shard) -> None:
        """Counts a shard as complete."""
        self._before += len(shard.rows)
        if self._bar.disable:
            rate = (self._before - self._first) / (time.perf_counter() - self._begin)
            print(
                f"{shard.name}: {self._before} of {self._bar.total} images, {rate:.0f} images/s",
                flush=True,
            )


def _finish(job: _Job, everything: Sequence[Shard], tallies: Sequence[Tally]) -> None:
    """Writes the manifest of all shards, with their tallies in order, and prints a summary."""
    job.limit.check(tallies)
    splits = _splits(everything, tallies)
    if not sum(splits["train"]["counts"]):
        raise UserError(f"{job.root} has no record to train on: expected at least one good image")
    together = hashlib.sha256("".join(tally.sha256 for tally in tallies).encode()).hexdigest()
    _check_unchanged(job, everything, tallies, together)
    found = {
        "bad_images": sum(len(tally.bad) for tally in tallies),
        "cut_captions": sum(tally.cut_captions for tally in tallies),
        "null_captions": {
            reason: sum(tally.null_captions[reason] for tally in tallies)
            for reason in tallies[0].null_captions
        },
    }
    layout = job.encoder.layout
    if job.choices.latents:
        pairs = zip(everything, tallies, strict=True)
        training = [tally for shard, tally in pairs if shard.split == "train" and tally.records]
        mean, std = _moments(training, layout)
        found |= {"latent_mean": mean, "latent_std": std}
        if job.choices.latent_scale == "measured":
            layout = dataclasses.replace(layout, mean=mean, std=std)
    made = job.plan | found | {"records_sha256": together}
    write_manifest(str(job.root), dataclasses.replace(layout, choices=made), splits)
    _remove_parts(job.root)
    _print_summary(job, splits, tallies, found)


def _splits(everything: Sequence[Shard], tallies: Sequence[Tally]) -> dict[str, dict[str, list]]:
    """The manifest's splits."""
    splits = {}
    for shard, tally in zip(everything, tallies, strict=True):
        part = splits.setdefault(shard.split, {"shards": [], "counts": [], "sha256": []})
        part["shards"].append(f"{shard.name}.arrayrecord")
        part["counts"].append(tally.records)
        part["sha256"].append(tally.sha256)
    return splits


def _check_unchanged(
    job: _Job, everything: Sequence[Shard], tallies: Sequence[Tally], together: str
) -> None:
    """Raises UserError, naming the shards, if they differ from the manifest that existed before."""
    if job.previous is None or job.previous.together in ("", together):
        return
    other = [
        shard.name
        for shard, tally in zip(everything, tallies, strict=True)
        if job.previous.shards.get(f"{shard.name}.arrayrecord", tally.sha256) != tally.sha256
    ]
    named = f" ({few(other)})" if other else ""
    raise UserError(
        f"{job.root} differs from its {MANIFEST} after making shards again{named}, so its images "
        "or the programs that encode them have changed since: choose another --out, or remove "
        f"{MANIFEST} and give the command again to keep the new shards"
    )


def _moments(training: Sequence[Tally], layout: Layout) -> tuple[list[float], list[float]]:
    """The mean and standard deviation of the training latents by channel."""
    height, width, _ = layout.image_shape
    count = sum(tally.records for tally in training) * height * width
    mean = np.sum([tally.sums for tally in training], 0) / count
    square = np.sum([tally.squares for tally in training], 0) / count
    std = np.sqrt(np.maximum(square - mean**2, 1e-12))
    return mean.tolist(), std.tolist()


def _remove_parts(root: epath.Path) -> None:
    """Removes the plans, shards and tallies that killed calls left half-written.

    Parts of a manifest stay: another process may be writing one at this moment.
    """
    own = re.escape(files.PART) + r"(plan|(train|test)-\d+)\.(json|arrayrecord)-[0-9a-f]{12}"
    for part in root.glob(f"{files.PART}*"):
        if re.fullmatch(own, part.name):
            part.unlink(missing_ok=True)


def _print_summary(job: _Job, splits: dict, tallies: Sequence[Tally], found: dict) -> None:
    counts = ", ".join(f"{sum(part['counts'])} in {split}" for split, part in splits.items())
    size = sum(tally.bytes for tally in tallies) / 2**20
    bad = shards.bad_images(tallies)
    null = ", ".join(f"{count} {reason}" for reason, count in found["null_captions"].items())
    text = f" '--config.data.text={job.choices.text}'" if job.choices.text else ""
    print(
        f"records: {counts}; {len(tallies)} shards, {size:.1f} MiB\n"
        f"bad images left out: {len(bad)} of {job.plan['images']}{': ' if bad else ''}{few(bad)}\n"
        f"null captions: {null}\n"
        f"captions cut: {found['cut_captions']}\n"
        f"to train on them: --config.data.source=records:{job.root}{text}",
        flush=True,
    )
