"""The source `records:PATH`: records that launch/prepare.py wrote.

Splits: those in the manifest, and all.
"""

import functools
from typing import Any

from ntm_jax.data.records import MANIFEST, Records, read_manifest
from ntm_jax.data.sources.source import Lazy, Source, check_split
from ntm_jax.errors import UserError, abbreviate


def _caption(records: Records, index: int) -> str:
    """A record's caption, which is read with its record."""
    return records[index]["caption"]


def open_records(where: str, split: str) -> Source:
    """Opens a split of the records in the folder `where`."""
    layout, splits, version = read_manifest(where)
    check_split(f"records:{where}", split, dict.fromkeys([*splits, "all"]))
    parts = [splits[split]] if split in splits else list(splits.values())
    records = Records(where, layout, parts)
    captions = Lazy(functools.partial(_caption, records), range(len(records)))
    names = layout.choices.get("classes", [])
    if not isinstance(names, list):
        raise UserError(f"{MANIFEST} of records:{where} has choices.classes {abbreviate(names)}: "
                        "expected a list of names; prepare the records again")
    named = len(names) == layout.num_classes and not all(str(name).isdecimal() for name in names)
    shared: dict[str, Any] = vars(layout) | {"captions": captions if layout.captions else None}
    del shared["choices"]
    class_names = tuple(map(str, names)) if named else ()
    return Source(records, **shared, class_names=class_names, version=version)
