"""The plan of a preparation: which records are made, in which shards.

A plan follows from the input and the options alone, the same in every process. The folder's
plan.json holds it, so that a folder is never filled by two plans.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import PIL
from etils import epath

from ntm_jax import files
from ntm_jax.data.records import MANIFEST
from ntm_jax.errors import UserError, abbreviate
from ntm_jax.tools.prepare.captioned import Input, Item

_PLAN = "plan.json"


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """What determines the records: the flags of launch/prepare.py, and keys in the manifest.

    input: folder:PATH, tfds:NAME_OR_BUILDER_DIR or tars:GLOB.
    captions: for a folder, the .jsonl or .csv file with file_name (or image), caption (or text) and
      optionally label in every row; by default metadata.jsonl or metadata.csv in the folder. File
      names are relative to the folder.
    caption_feature: for tfds, the feature that holds the caption; a/b is the feature b in a. Of
      several captions the first is taken.
    tfds_split: for tfds, the records to take.
    test_input: the input of the split test, as `input`; then all images of `input` are in train.
    test_labels: for a test input without labels, a file of the class of each image on a line, in
      the order of the images' names, or ImageNet's devkit.
    test_tfds_split: for a test input of tfds, the records to take.
    image_size: S, the images' side.
    flip: adds the mirror image of every training image, which doubles the training records.
    autoencoder: '' for pixels, or what encodes them to latents, such as kl:FOLDER.
    latent_scale: 'measured' normalises latents to mean 0 and variance 1 by channel over the
      training records; 'encoder' keeps the autoencoder's scale, which pretrained networks expect.
    text: the encoder of captions; '' for none.
    test: without test_input, below 1 the share of the images held out, otherwise their number.
    shard_size: the number of images in a shard.
    """

    input: str
    captions: str = ""
    caption_feature: str = "caption"
    tfds_split: str = "train"
    test_input: str = ""
    test_labels: str = ""
    test_tfds_split: str = "validation"
    image_size: int = 256
    flip: bool = False
    autoencoder: str = ""
    latent_scale: str = "measured"
    text: str = ""
    test: float = 0.05
    shard_size: int = 2000


@dataclasses.dataclass(frozen=True)
class Shard:
    """A shard: some of the input's items, of one split.

    name: of its file, without .arrayrecord. rows: indices of the items.
    """

    name: str
    split: str
    rows: Sequence[int]


def make_shards(options: PrepareOptions, items: Sequence[Item]) -> list[Shard]:
    """The training and test shards.

    Without a test input the hash of its key alone decides an item's split, so that all items of
    one key have the same split.
    """
    splits = _divided(options, items) if not options.test_input else {
        split: [row for row, item in enumerate(items) if item.held_out == (split == "test")]
        for split in ("train", "test")
    }
    size = options.shard_size
    return [
        Shard(f"{split}-{i:05}", split, rows[start : start + size])
        for split, rows in splits.items()
        for i, start in enumerate(range(0, len(rows), size))
    ]


def _divided(options: PrepareOptions, items: Sequence[Item]) -> dict[str, list[int]]:
    """The rows of train and test, by the hashes of their keys."""
    digests = [hashlib.sha256(item.key.encode(errors="surrogateescape")).digest() for item in items]
    values = [int.from_bytes(digest[:8], "big") for digest in digests]
    share = options.test < 1
    number = round(options.test * len(items)) if share else int(options.test)
    last = sorted(values)[min(number, len(values)) - 1] if number else -1
    splits = {
        "train": [row for row, value in enumerate(values) if value > last],
        "test": [row for row, value in enumerate(values) if value <= last],
    }
    if not splits["train"] or (not share and options.test != number):
        raise UserError(
            f"--test={options.test:g} holds out {len(splits['test'])} of {len(items)} images, "
            "those of one name together: expected a share below 1, or a whole number, that leaves "
            "some"
        )
    return splits


def make_plan(options: PrepareOptions, given: Input, autoencoder_sha256: str) -> dict[str, Any]:
    """Everything that determines the records, as JSON."""
    rows = hashlib.sha256()
    for item in given.items:
        rows.update(json.dumps([item.key, item.caption, item.label]).encode())
    return dataclasses.asdict(options) | {
        "images": len(given.items),
        "rows_sha256": rows.hexdigest(),
        "classes": list(given.classes),
        "autoencoder_sha256": autoencoder_sha256,
        "pillow": PIL.__version__,
    }


def lock_plan(root: epath.Path, plan: dict) -> str:
    """Makes `plan` the folder's plan and returns its hash.

    Raises:
      UserError: the folder has another plan, or records that another program wrote.
    """
    if (root / _PLAN).exists():
        existing = files.read_json(
            root / _PLAN,
            "remove it and give the same command again, which keeps the complete shards, or choose "
            "another --out",
        )
        for key in sorted(plan | existing):
            if plan.get(key) != existing.get(key):
                raise UserError(
                    f"{root} is being prepared with {key}={abbreviate(existing.get(key))}, and "
                    f"this call has {abbreviate(plan.get(key))}: choose another --out, or remove "
                    "it; nothing was overwritten"
                )
    elif (root / MANIFEST).exists():
        raise UserError(
            f"{root} holds records that another program wrote: choose another --out, or remove it"
        )
    else:
        root.mkdir(parents=True, exist_ok=True)
        files.write_json(root / _PLAN, plan)
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]
