"""Runs a preparation: this process's shards, and the manifest once all shards are complete.

Any number of processes work on their own shards of one plan. The process that finds all shards
complete writes the manifest.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from ntm_jax import files
from ntm_jax.data.records import Layout, Split, write_manifest
from ntm_jax.errors import UserError, few
from ntm_jax.tools.prepare import captioned, inputs, shards
from ntm_jax.tools.prepare.captioned import Item, Loaded
from ntm_jax.tools.prepare.encoder import Encoder
from ntm_jax.tools.prepare.plan import PrepareOptions, Shard, lock_plan, make_plan, make_shards
from ntm_jax.tools.prepare.shards import Tally
from ntm_jax.workers import start as start_workers

_AHEAD = 256  # images that worker processes decode before they are encoded


def prepare(
    options: PrepareOptions,
    out: str,
    max_bad: float = 0.01,
    batch: int = 32,
    workers: int = 0,
    num_processes: int = 1,
    process_id: int = 0,
    follow_outside: bool = False,
) -> None:
    """Writes this process's shards to the folder `out`, and the manifest once all are complete.

    Args:
      max_bad: the permitted share of bad images: missing or not decodable. They are left out.
      batch: images encoded at a time. Changing it changes rounding in networks.
      workers: processes that decode images; 0 decodes in this one.
      num_processes, process_id: the number of processes that share the work, and this one's number
        from 0.
      follow_outside: see inputs.open_input.
    Raises:
      UserError: more bad images; a folder of another plan; an input or a choice that is not
        understood. Complete shards stay.
    """
    root = epath.Path(out).expanduser()
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id}: expected 0 to {num_processes - 1}, below "
            f"--num_processes={num_processes}"
        )
    given = inputs.open_input(options, follow_outside)
    encoder, everything = Encoder(options, given), make_shards(options, given.items)
    plan, limit = make_plan(options, given, encoder.digest), max_bad * len(given.items)
    plan_hash = lock_plan(root, plan)

    def tallies(some: Sequence[Shard]) -> dict[str, Tally]:
        found = {shard.name: shards.complete(root, shard, plan_hash) for shard in some}
        return {name: tally for name, tally in found.items() if tally}

    mine = everything[process_id::num_processes]
    done, load = tallies(mine), functools.partial(captioned.load, given.read, options.image_size)
    left = [shard for shard in mine if shard.name not in done]
    with start_workers(workers) if workers else contextlib.nullcontext() as pool:
        for number, shard in enumerate(left, 1):
            items = [given.items[row] for row in shard.rows]
            loaded = tqdm(_loaded(pool, load, items), shard.name, len(items), disable=None)
            tally = Tally(plan_hash)
            flip = options.flip and shard.split == "train"
            examples = encoder.examples(iter(loaded), tally, batch, flip)
            shards.write(root, shard, examples, encoder.layout, tally)
            done[shard.name] = tally
            print(f"{shard.name}: {number} of {len(left)} shards", flush=True)
            shards.check_bad(done.values(), limit)
    done = tallies(everything)
    lacking = [shard.name for shard in everything if shard.name not in done]
    if lacking:
        print(
            f"this process is done; {len(lacking)} shards of others are not complete yet, such as "
            f"{lacking[0]}: the last process writes the manifest",
            flush=True,
        )
        return
    shards.check_bad(done.values(), limit)
    made = [(shard, done[shard.name]) for shard in everything]
    _finish(root, options, plan, encoder.layout, made)


def _loaded(
    pool: concurrent.futures.Executor | None, load: Callable[[Item], Loaded], items: Sequence[Item]
) -> Iterator[Loaded]:
    """The items in order, loaded some ahead by the pool, or here if there is none."""
    if pool is None:
        yield from map(load, items)
        return
    ahead = collections.deque()
    for item in items:
        ahead.append(pool.submit(load, item))
        if len(ahead) > _AHEAD:
            yield ahead.popleft().result()
    while ahead:
        yield ahead.popleft().result()


def _finish(
    root: epath.Path,
    options: PrepareOptions,
    plan: dict[str, Any],
    layout: Layout,
    made: Sequence[tuple[Shard, Tally]],
) -> None:
    """Writes the manifest of all shards, with their tallies in order, and prints a summary."""
    splits, tallies = {}, [tally for _, tally in made]
    for shard, tally in made:
        part = splits.setdefault(shard.split, Split())
        part.shards.append(f"{shard.name}.arrayrecord")
        part.counts.append(tally.records)
        part.sha256.append(tally.sha256)
    found = {
        "bad_images": sum(len(tally.bad) for tally in tallies),
        "cut_captions": sum(tally.cut_captions for tally in tallies),
        "null_captions": {
            reason: sum(tally.null_captions[reason] for tally in tallies)
            for reason in shards.NULL_REASONS
        },
    }
    if options.autoencoder:
        mean, std = _moments([tally for shard, tally in made if shard.split == "train"], layout)
        found |= {"latent_mean": mean, "latent_std": std}
        if options.latent_scale == "measured":
            layout = dataclasses.replace(layout, mean=mean, std=std)
    together = hashlib.sha256("".join(tally.sha256 for tally in tallies).encode()).hexdigest()
    about = plan | found | {"records_sha256": together}
    write_manifest(str(root), dataclasses.replace(layout, choices=about), splits)
    for part in root.glob(f"{files.PART}*[0-9].*-*"):  # of killed calls
        part.unlink(missing_ok=True)

    counts = ", ".join(f"{sum(part.counts)} in {split}" for split, part in splits.items())
    size, bad = sum(tally.bytes for tally in tallies) / 2**20, shards.bad_images(tallies)
    null = ", ".join(f"{count} {reason}" for reason, count in found["null_captions"].items())
    captions = (f"null captions: {null}\ncaptions cut: {found['cut_captions']}\n"
                if layout.captions else f"captions: none; classes: {layout.num_classes}\n")
    text = f" '--config.data.text_encoder={options.text}'" if options.text else ""
    print(
        f"records: {counts}; {len(tallies)} shards, {size:.1f} MiB\n"
        f"bad images left out: {len(bad)} of {plan['images']}{': ' if bad else ''}"
        f"{few(bad, shards.NAMED)}\n"
        f"{captions}"
        f"to train on them: --config.data.source=records:{root}{text}",
        flush=True,
    )


def _moments(training: Sequence[Tally], layout: Layout) -> tuple[list[float], list[float]]:
    """The mean and standard deviation of the training latents by channel."""
    training = [tally for tally in training if tally.records]
    height, width, _ = layout.image_shape
    count = sum(tally.records for tally in training) * height * width
    mean = np.sum([tally.sums for tally in training], 0) / count
    square = np.sum([tally.squares for tally in training], 0) / count
    std = np.sqrt(np.maximum(square - mean**2, 1e-12))
    return mean.tolist(), std.tolist()
