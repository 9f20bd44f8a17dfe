"""Shards on disk: whether they are complete and undamaged, and how they are written.

A shard is complete when its tally, a .json file, lies beside it. A stopped run therefore continues
where it was.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath

from ntm_jax import files, typed
from ntm_jax.data import regular
from ntm_jax.data.prepare.plan import Shard
from ntm_jax.data.records import Layout, read_manifest, sha256, write_shard
from ntm_jax.errors import UserError

NULL_REASONS = ("empty", "not UTF-8")  # why a caption is the null caption
_NAMED = 10  # bad images, or shards, that a message names


@dataclasses.dataclass
class Tally:
    """What a shard was made of; written beside it.

    plan: the plan's hash.
    images: the number of images, good and bad. records: the number of records.
    bad: [key, reason] of each bad image.
    null_captions: the number of null captions by reason.
    cut_captions: the number of captions longer than M tokens.
    bytes, sha256: of the shard's file.
    sums, squares: of latents, by channel.
    """

    plan: str
    images: int = 0
    records: int = 0
    bad: list = dataclasses.field(default_factory=list)
    null_captions: dict = dataclasses.field(default_factory=lambda: dict.fromkeys(NULL_REASONS, 0))
    cut_captions: int = 0
    bytes: int = 0
    sha256: str = ""
    sums: list = dataclasses.field(default_factory=list)
    squares: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class PreviousManifest:
    """The SHA-256 in a manifest that was there before.

    shards: of each shard, by its file's name. together: of all shards; '' if unknown.
    """

    shards: dict[str, str]
    together: str


def read_previous(root: epath.Path) -> PreviousManifest | None:
    """The SHA-256 in the folder's manifest; None if it is missing or damaged."""
    with contextlib.suppress(UserError):
        layout, splits, _ = read_manifest(str(root))
        shards = {}
        for part in splits.values():
            shards.update(zip(part["shards"], part.get("sha256", ()), strict=False))
        return PreviousManifest(shards, str(layout.choices.get("records_sha256", "")))
    return None


def complete(root: epath.Path, shard: Shard, plan_hash: str) -> Tally | None:
    """The shard's tally, if the shard is complete and of this plan, judged by its file's size."""
    with contextlib.suppress(OSError, ValueError):
        content = files.parse_json(regular.read(root / f"{shard.name}.json"))
        tally = typed.parse_dataclass(Tally, content, shard.name)
        file = root / f"{shard.name}.arrayrecord"
        sound = tally.plan == plan_hash and _is_sound(tally) and regular.is_regular(file)
        if sound and file.stat().length == tally.bytes:
            return tally
    return None


def verified(
    root: epath.Path, shard: Shard, plan_hash: str, previous: PreviousManifest | None
) -> Tally | None:
    """The shard's tally, if its file also has the SHA-256 of the tally and of the manifest."""
    tally, file = complete(root, shard, plan_hash), f"{shard.name}.arrayrecord"
    expected = previous.shards.get(file) if previous else None
    if tally and expected in (None, tally.sha256) and sha256(root / file) == tally.sha256:
        return tally
    return None


def _is_sound(tally: Tally) -> bool:
    """Whether a tally's lists and counts have the right types."""
    for entry in tally.bad:
        if not isinstance(entry, list) or len(entry) != 2:
            return False
        if not all(isinstance(text, str) for text in entry):
            return False
    counts = tally.null_captions
    null = counts.keys() == set(NULL_REASONS)
    null = null and all(type(count) is int for count in counts.values())
    return null and all(type(number) in (int, float) for number in [*tally.sums, *tally.squares])


def write(
    root: epath.Path,
    shard: Shard,
    examples: Iterable[dict[str, Any]],
    layout: Layout,
    tally: Tally,
) -> None:
    """Writes the shard, and then its tally, whose presence marks it as complete."""
    file = root / f"{shard.name}.arrayrecord"
    write_shard(file, examples, layout)
    tally.bytes, tally.sha256 = file.stat().length, sha256(file)
    files.write_json(root / f"{shard.name}.json", dataclasses.asdict(tally), sealed=True)


@dataclasses.dataclass(frozen=True)
class BadLimit:
    """Ends a preparation with more than `count` bad images in the folder `root`."""

    count: float
    root: epath.Path

    def check(self, tallies: Iterable[Tally]) -> None:
        """Raises UserError, naming the first few, if the tallies have too many bad images."""
        bad = bad_images(tallies)
        if len(bad) > self.count:
            raise UserError(
                f"{len(bad)} images are bad, and --max_bad allows {int(self.count)}: {few(bad)}; "
                "mend them and give another --out, or allow more, to leave them out; complete "
                f"shards stay in {self.root}"
            )

    def watch(self, examples: Iterator[dict], tally: Tally, others: list[Tally]) -> Iterator[dict]:
        """The examples of the shard of `tally`, with a check before each one and at the end."""
        for example in examples:
            self.check([*others, tally])
            yield example
        self.check([*others, tally])


def bad_images(tallies: Iterable[Tally]) -> list[str]:
    """ "key (reason)" of every bad image, in characters that can be printed in one line."""
    texts = [f"{key} ({reason})" for tally in tallies for key, reason in tally.bad]
    return [text if text.isprintable() else ascii(text)[1:-1] for text in texts]


def few(names: list[str]) -> str:
    """The first names, for a message."""
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
