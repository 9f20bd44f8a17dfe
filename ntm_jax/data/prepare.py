"""Captioned images to records of pixels or latents, text states, captions and labels: what launch/prepare.py runs.

A plan cuts the input into shards, by nothing but the input and the choices; any number of processes work on their own shards of it. A
shard is whole when its .json lies beside it, which counts what was found, so that a stopped run goes on where it was, to the same bits. A
process verifies the SHA-256 of its own shards that are there, and makes those anew that are not as their .json and the manifest say.
The process that finds all shards whole writes the manifest. S image side, C channels, M, E text tokens and width. No jax is imported.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing import connection
from typing import Any

import numpy as np
import PIL
from etils import epath
from tqdm import tqdm

from ntm_jax import files, typed
from ntm_jax.data import captioned, latents, pretrained, regular, text
from ntm_jax.data.records import MANIFEST, Layout, read_manifest, sha256, write_manifest, write_shard
from ntm_jax.errors import UserError, shown

_PLAN = "plan.json"
_CHUNK = 16  # images that a worker takes at a time
_NAMED = 10  # bad images, or shards, that are named
_NULL = ("empty", "not UTF-8")  # why a caption is the null caption


@dataclasses.dataclass(frozen=True)
class Choices:
    """What makes the records what they are; each field is a flag of launch/prepare.py, and a key of the manifest's choices.

    input, captions, caption_feature, tfds_split: see captioned.open_input. image_size: S. flip: after every training image its mirror
    image, twice the records. latents: '' for pixels, or flux2:FOLDER. latent_scale: 'measured', to be read at mean 0 and variance 1 by
    channel over the training records, or 'encoder', as the autoencoder gives them, which a pretrained network was trained on. text: the
    encoder of captions, '' for none. test: the share of the images held out, or, from 1 on, their number. shard_size: images a shard.
    """

    input: str
    captions: str = ""
    caption_feature: str = "caption"
    tfds_split: str = "train"
    image_size: int = 256
    flip: bool = False
    latents: str = ""
    latent_scale: str = "measured"
    text: str = ""
    test: float = 0.05
    shard_size: int = 2000


@dataclasses.dataclass(frozen=True)
class _Shard:
    name: str  # of its file, without .arrayrecord
    split: str
    rows: Sequence[int]  # of the input's items


@dataclasses.dataclass
class _Tally:
    """What a shard was made of; written beside it."""

    plan: str  # its hash
    images: int = 0  # good and bad ones
    records: int = 0
    bad: list = dataclasses.field(default_factory=list)  # [key, reason]
    null_captions: dict = dataclasses.field(default_factory=lambda: dict.fromkeys(_NULL, 0))
    cut_captions: int = 0  # longer than M tokens
    bytes: int = 0
    sha256: str = ""
    sums: list = dataclasses.field(default_factory=list)  # of latents, by channel
    squares: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Before:
    """What the manifest says that is in the folder already: the SHA-256 of each shard's file, by name, and of all of them together."""

    shards: dict[str, str]
    together: str


def prepare(choices: Choices, out: str, max_bad: float = 0.01, batch: int = 32, workers: int = 0, num_processes: int = 1,
            process_id: int = 0, follow_outside: bool = False) -> None:
    """Writes this process's shards of the records to the folder `out`, and the manifest if all shards are then whole.

    Where there is a manifest already, shards that are missing, damaged or exchanged are made again, to the same bits.

    Args:
      max_bad: the share of the images that may be bad: not there, or not to be decoded. They are left out.
      batch: images encoded at a time; networks round otherwise with another. workers: processes that decode images; 0: this one does.
      follow_outside: see captioned.open_input.
    Raises:
      UserError: more bad images; a folder of another plan; an input or a choice that is not understood; shards that come out otherwise than
        the manifest says. What is whole stays.
    """
    root = epath.Path(out).expanduser()
    if not 0 <= process_id < num_processes:
        raise UserError(f"--process_id={process_id}: expected 0 to {num_processes - 1}, below --num_processes={num_processes}")
    given = captioned.open_input(choices.input, choices.captions, choices.caption_feature, choices.tfds_split, follow_outside)
    encoder, shards = _Encoder(choices, given.classes), _shards(choices, given.items)
    plan = _plan(choices, given, encoder)
    name, limit, before = _claim(root, plan), max_bad * len(given.items), _before(root)
    mine = shards[process_id::num_processes]
    whole = {shard.name: tally for shard in mine if (tally := _verified(root, shard, name, before))}
    again = [shard.name for shard in mine if before and shard.name not in whole]
    if again:
        print(f"not as {MANIFEST} says, and made again: {_few(again)}", flush=True)
    _check_bad(whole.values(), limit, root)
    with _pool(workers) as pool, _Progress(mine, whole) as progress:
        for shard in mine:
            if shard.name not in whole:
                items = _loaded(pool, workers, functools.partial(captioned.load, given.read, choices.image_size),
                                [given.items[row] for row in shard.rows])
                tally = _Tally(name)
                examples = encoder.examples(items, tally, batch, choices.flip and shard.split == "train")
                _write(root, shard, _watched(examples, tally, progress, list(whole.values()), limit, root), encoder.layout, tally)
                whole[shard.name] = tally
                progress.done(shard)
    tallies = {shard.name: _whole(root, shard, name) for shard in shards}
    lacking = [shard for shard, tally in tallies.items() if tally is None]
    if lacking:
        print(f"this process is done; {len(lacking)} shards of others are not whole yet, such as {lacking[0]}: the last process writes the "
              "manifest", flush=True)
    else:
        _finish(root, choices, plan, encoder.layout, shards, list(tallies.values()), limit, before)
        if before:
            print(f"the {len(mine)} shards of this process are as {MANIFEST} said before; made again: {_few(again) or 'none'}", flush=True)


def _watched(examples: Iterator, tally: "_Tally", progress: "_Progress", before: list["_Tally"], limit: float, root) -> Iterator:
    """The examples; in passing, progress is told, and too many bad images end it."""
    for example in examples:
        progress.at(tally.images)
        _check_bad([*before, tally], limit, root)
        yield example
    _check_bad([*before, tally], limit, root)


# The plan: the same in every process.


def _shards(choices: Choices, items: Sequence[captioned.Item]) -> list[_Shard]:
    """Test and training shards. An item is held out by the hash of its key alone, so that all with one key are of one split."""
    values = [int.from_bytes(hashlib.sha256(item.key.encode(errors="surrogateescape")).digest()[:8], "big") for item in items]
    number = round(choices.test * len(items)) if choices.test < 1 else int(choices.test)
    if not 0 <= number < len(items) or (choices.test >= 1 and choices.test != number):
        raise UserError(f"--test={choices.test:g} holds out {choices.test:g} of {len(items)} images: expected a share below 1, or a whole "
                        "number below theirs")
    last = sorted(values)[number - 1] if number else -1
    splits = {"train": [row for row, value in enumerate(values) if value > last],
              "test": [row for row, value in enumerate(values) if value <= last]}
    return [_Shard(f"{split}-{i:05}", split, rows[start : start + choices.shard_size])
            for split, rows in splits.items() for i, start in enumerate(range(0, len(rows), choices.shard_size))]


def _plan(choices: Choices, given: captioned.Input, encoder: "_Encoder") -> dict[str, Any]:
    """All that the records follow from, as JSON."""
    rows = hashlib.sha256()
    for item in given.items:
        rows.update(json.dumps([item.key, item.caption, item.label]).encode())
    return dataclasses.asdict(choices) | {"images": len(given.items), "rows_sha256": rows.hexdigest(), "classes": list(given.classes),
                                          "autoencoder_sha256": encoder.digest, "pillow": PIL.__version__}


def _claim(root: epath.Path, plan: dict) -> str:
    """The plan's hash, once it is the folder's plan. UserError where the folder has another."""
    name = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]
    there = _plan_there(root, plan)
    if there is None:
        if (root / MANIFEST).exists():
            raise UserError(f"{root} holds records that another program wrote: choose another --out, or remove it")
        root.mkdir(parents=True, exist_ok=True)
    else:
        other = next((key for key in sorted(plan | there) if key not in there or key not in plan or plan[key] != there[key]), None)
        if other:
            raise UserError(f"{root} is being prepared with {other}={shown(there.get(other))}, and this call has "
                            f"{shown(plan.get(other))}: choose another --out, or remove it; nothing was overwritten")
    if not (root / _PLAN).exists():
        files.write_json(root / _PLAN, plan, sealed=True)
    return name


def _plan_there(root: epath.Path, plan: dict) -> dict | None:
    """The folder's plan, from its manifest where the plan's own file is gone; None where it has none."""
    if (root / _PLAN).exists():
        return files.read_json(root / _PLAN, "remove it and give the same command again, which keeps the shards that are whole, or choose "
                                             "another --out")
    with contextlib.suppress(UserError):
        made = read_manifest(str(root))[0].choices
        return {key: made[key] for key in plan if key in made} or None
    return None


def _before(root: epath.Path) -> _Before | None:
    """What the folder's manifest says; None without one, or where it is damaged and will be written again."""
    with contextlib.suppress(UserError):
        layout, splits, _ = read_manifest(str(root))
        shards = {name: digest for part in splits.values() for name, digest in zip(part["shards"], part.get("sha256", ()), strict=False)}
        return _Before(shards, str(layout.choices.get("records_sha256", "")))
    return None


def _whole(root: epath.Path, shard: _Shard, plan: str) -> _Tally | None:
    """The shard's tally, if it is whole and of this plan, going by the size of its file."""
    with contextlib.suppress(OSError, ValueError):
        tally = typed.read(_Tally, files.parse_json(regular.read(root / f"{shard.name}.json")), shard.name)
        file = root / f"{shard.name}.arrayrecord"
        if tally.plan == plan and _is_sound(tally) and regular.is_regular(file) and file.stat().length == tally.bytes:
            return tally
    return None


def _is_sound(tally: _Tally) -> bool:
    """Whether a tally's lists and counts hold what they should."""
    bad = all(isinstance(entry, list) and len(entry) == 2 and all(isinstance(text, str) for text in entry) for entry in tally.bad)
    null = tally.null_captions.keys() == set(_NULL) and all(type(count) is int for count in tally.null_captions.values())
    return bad and null and all(type(number) in (int, float) for number in [*tally.sums, *tally.squares])


def _verified(root: epath.Path, shard: _Shard, plan: str, before: _Before | None) -> _Tally | None:
    """The shard's tally, if it is whole and its file is the one that the tally and the manifest mean, by its SHA-256."""
    tally, file = _whole(root, shard, plan), f"{shard.name}.arrayrecord"
    said = before.shards.get(file) if before else None
    if tally and said in (None, tally.sha256) and sha256(root / file) == tally.sha256:
        return tally
    return None


def _check_bad(tallies, limit: float, root) -> None:
    bad = _bad(tallies)
    if len(bad) > limit:
        raise UserError(f"{len(bad)} images are bad, and --max_bad allows {int(limit)}: {_few(bad)}; mend them and give another "
                        f"--out, or allow more, to leave them out; the shards that are whole stay in {root}")


def _bad(tallies) -> list[str]:
    texts = (f"{key} ({reason})" for tally in tallies for key, reason in tally.bad)
    # Of a name that is not UTF-8, or breaks lines, what can be printed in one.
    return [text if text.isprintable() else ascii(text)[1:-1] for text in texts]


def _few(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")


# A shard: loaded, encoded, written.


@contextlib.contextmanager
def _pool(workers: int):
    """Worker processes, which end with this one however it ends; None for no workers."""
    if not workers:
        yield None
        return
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _follow)
    try:
        yield pool
    except concurrent.futures.BrokenExecutor:
        raise UserError(f"one of the {workers} worker processes was killed, perhaps for memory: start again with the same command, or with "
                        "fewer --workers; the shards that are whole stay") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _follow() -> None:
    """In a worker: Ctrl-C is for the parent, and when the parent is gone, so is this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch():
        connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _load_all(load, items):
    return [load(item) for item in items]


def _loaded(pool, workers: int, load, items: Sequence[captioned.Item]) -> Iterator[captioned.Loaded]:
    """The items in order, loaded by the pool a few chunks ahead."""
    if pool is None:
        yield from map(load, items)
        return
    ahead = collections.deque()
    for start in range(0, len(items), _CHUNK):
        ahead.append(pool.submit(_load_all, load, items[start : start + _CHUNK]))
        if len(ahead) > 2 * workers:
            yield from ahead.popleft().result()
    while ahead:
        yield from ahead.popleft().result()


class _Encoder:
    """Images and captions to what records hold: pixels or latents, and text states. layout: of the records, but for their scale."""

    def __init__(self, choices: Choices, classes: Sequence[str]):
        kind, _, folder = choices.latents.partition(":")
        if choices.latents and (kind != "flux2" or not folder):
            raise UserError(f"--latents={choices.latents} is not known: expected flux2:FOLDER, or nothing for pixels")
        device = "cuda" if folder and pretrained.module("torch").cuda.is_available() else "cpu"
        self._autoencoder = latents.Autoencoder(folder, device) if folder else None
        self.digest = _digest(pretrained.find(folder, "vae").glob("*.safetensors")) if folder else ""
        self._text = text.open_encoder(choices.text) if choices.text else None
        shape = (choices.image_size, choices.image_size, 3)
        self.layout = Layout(
            self.image(np.zeros((1, *shape), np.uint8)).shape[1:], levels=0 if folder else 256, num_classes=len(classes),
            text_tokens=self._text.tokens if self._text else 0, text_width=self._text.width if self._text else 0, text=choices.text,
            captions=True)

    def image(self, images: np.ndarray) -> np.ndarray:
        """[n, S, S, 3] uint8 -> the same, or latents [n, h, w, C] float16."""
        return self._autoencoder.encode(images).astype(np.float16) if self._autoencoder else images

    def examples(self, loaded: Iterator[captioned.Loaded], tally: _Tally, batch: int, flip: bool) -> Iterator[dict[str, Any]]:
        """Examples of a shard, counted in the tally."""
        channels = self.layout.image_shape[-1]
        sums, squares = np.zeros(channels), np.zeros(channels)
        while several := list(itertools.islice(loaded, batch)):
            tally.images += len(several)
            tally.bad += [[item.key, item.bad] for item in several if item.bad]
            good = [item for item in several if not item.bad]
            if not good:
                continue
            for item in good:
                if item.null:
                    tally.null_captions[item.null] += 1
            images = np.stack([item.image for item in good])
            views = [self.image(view) for view in ((images, images[:, :, ::-1]) if flip else (images,))]
            states = self._states([item.caption for item in good], tally)
            for i, item in enumerate(good):
                label = {"label": item.label} if self.layout.num_classes else {}
                told = {"text": states[i]} if self._text else {}
                for view in views:
                    tally.records += 1
                    if self._autoencoder:
                        values = view[i].reshape(-1, channels).astype(np.float64)
                        sums, squares = sums + values.sum(0), squares + (values**2).sum(0)
                    yield {"image": view[i], "caption": item.caption, **label, **told}
        if self._autoencoder:
            tally.sums, tally.squares = sums.tolist(), squares.tolist()

    def _states(self, captions: list[str], tally: _Tally) -> list[np.ndarray] | None:
        """The states [m, E] float16 of each caption; of the null caption what the encoder says of '', most say none."""
        if not self._text:
            return None
        states, cut = self._text.encode(captions)
        tally.cut_captions += sum(cut)
        return states


def _digest(paths) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _write(root: epath.Path, shard: _Shard, examples, layout: Layout, tally: _Tally) -> None:
    """Writes the shard, and then its tally: what says that it is whole."""
    file = root / f"{shard.name}.arrayrecord"
    write_shard(file, examples, layout)
    tally.bytes, tally.sha256 = file.stat().length, sha256(file)
    files.write_json(root / f"{shard.name}.json", dataclasses.asdict(tally), sealed=True)


class _Progress:
    """A bar of the images of a process's shards on a terminal, a line a shard elsewhere."""

    def __init__(self, shards: list[_Shard], whole):
        self._before = sum(len(shard.rows) for shard in shards if shard.name in whole)
        self._bar = tqdm(total=sum(len(shard.rows) for shard in shards), initial=self._before, desc="prepare", unit="image", disable=None)
        self._begin, self._first = time.perf_counter(), self._before

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()

    def at(self, images: int) -> None:
        """So many images of the shard in work are done."""
        self._bar.update(self._before + images - self._bar.n)

    def done(self, shard: _Shard) -> None:
        self._before += len(shard.rows)
        if self._bar.disable:
            rate = (self._before - self._first) / (time.perf_counter() - self._begin)
            print(f"{shard.name}: {self._before} of {self._bar.total} images, {rate:.0f} images/s", flush=True)


# The end.


def _finish(root: epath.Path, choices: Choices, plan: dict, layout: Layout, shards: list[_Shard], tallies: list[_Tally], limit: float,
            before: _Before | None):
    """The manifest and what is said of it."""
    _check_bad(tallies, limit, root)
    splits = {}
    for shard, tally in zip(shards, tallies, strict=True):
        part = splits.setdefault(shard.split, {"shards": [], "counts": [], "sha256": []})
        part["shards"].append(f"{shard.name}.arrayrecord")
        part["counts"].append(tally.records)
        part["sha256"].append(tally.sha256)
    if not sum(splits["train"]["counts"]):
        raise UserError(f"{root} has no record to train on: expected at least one good image")
    content = hashlib.sha256("".join(tally.sha256 for tally in tallies).encode()).hexdigest()
    if before and before.together not in ("", content):
        other = [shard.name for shard, tally in zip(shards, tallies, strict=True)
                 if before.shards.get(f"{shard.name}.arrayrecord", tally.sha256) != tally.sha256]
        named = f" ({_few(other)})" if other else ""
        raise UserError(f"{root} came out otherwise than its {MANIFEST} says{named}, so its images or the programs that encode them have "
                        f"changed since: choose another --out, or remove {MANIFEST} and give the command again to keep what came out")
    found = {"bad_images": sum(len(tally.bad) for tally in tallies), "cut_captions": sum(tally.cut_captions for tally in tallies),
             "null_captions": {why: sum(tally.null_captions[why] for tally in tallies) for why in tallies[0].null_captions}}
    if choices.latents:
        training = [tally for shard, tally in zip(shards, tallies, strict=True) if shard.split == "train" and tally.records]
        count = sum(tally.records for tally in training) * layout.image_shape[0] * layout.image_shape[1]
        mean, square = (np.sum([getattr(tally, key) for tally in training], 0) / count for key in ("sums", "squares"))
        std = np.sqrt(np.maximum(square - mean**2, 1e-12))
        found |= {"latent_mean": mean.tolist(), "latent_std": std.tolist()}
        if choices.latent_scale == "measured":
            layout = dataclasses.replace(layout, mean=mean.tolist(), std=std.tolist())
    write_manifest(str(root), dataclasses.replace(layout, choices=plan | found | {"records_sha256": content}), splits)
    for rest in root.glob(".part*"):  # of calls that were killed; a manifest's may be of a process that ends in this moment too
        if rest.is_dir():
            rest.rmtree(missing_ok=True)
        elif not rest.name.startswith(f".part-{MANIFEST}"):
            rest.unlink(missing_ok=True)
    counts = ", ".join(f"{sum(part['counts'])} in {split}" for split, part in splits.items())
    bad, told = _bad(tallies), f" '--config.data.text={choices.text}'" if choices.text else ""
    print(f"records: {counts}; {len(shards)} shards, {sum(tally.bytes for tally in tallies) / 2**20:.1f} MiB\n"
          f"bad images left out: {len(bad)} of {plan['images']}{': ' if bad else ''}{_few(bad)}\n"
          f"null captions: {', '.join(f'{count} {why}' for why, count in found['null_captions'].items())}\n"
          f"captions cut: {found['cut_captions']}\nto train on them: --config.data.source=records:{root}{told}", flush=True)
