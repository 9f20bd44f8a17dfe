"""Shards on disk. A shard is complete when its tally, a .json file, lies beside it.

A stopped preparation therefore continues where it was.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from etils import epath

from ntm_jax import files, typed
from ntm_jax.data.records import Layout, sha256, write_shard
from ntm_jax.errors import UserError, few
from ntm_jax.tools.prepare.plan import Shard

NULL_REASONS = ("empty", "not UTF-8")  # why a caption is the null caption
NAMED = 10  # bad images that a message names


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


def complete(root: epath.Path, shard: Shard, plan_hash: str) -> Tally | None:
    """The shard's tally, if the shard is complete and of this plan, judged by its file's size."""
    beside, file = root / f"{shard.name}.json", root / f"{shard.name}.arrayrecord"
    if not beside.exists() or not file.exists():
        return None
    content = files.read_json(beside, "remove it; the same command makes its shard again")
    tally = typed.parse_dataclass(Tally, content, shard.name)
    return tally if tally.plan == plan_hash and files.stat(file)[0] == tally.bytes else None


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
    tally.bytes, tally.sha256 = files.stat(file)[0], sha256(file)
    files.write_json(root / f"{shard.name}.json", dataclasses.asdict(tally))


def check_bad(tallies: Iterable[Tally], limit: float) -> None:
    """Raises UserError, naming the first few, if there are more than `limit` bad images."""
    bad = bad_images(tallies)
    if len(bad) > limit:
        raise UserError(
            f"{len(bad)} images are bad, and --max_bad allows {int(limit)}: {few(bad, NAMED)}; "
            "mend them and give another --out, or allow more, to leave them out; complete shards "
            "stay"
        )


def bad_images(tallies: Iterable[Tally]) -> list[str]:
    """"key (reason)" of every bad image."""
    return [f"{key} ({reason})" for tally in tallies for key, reason in tally.bad]
