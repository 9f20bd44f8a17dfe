"""The source `records:PATH`: records that launch/prepare.py or `records.write_records` wrote.

Splits: those in the manifest, and all.
"""

import dataclasses
from collections.abc import Sequence

from ntm_jax.data.records import Records, read_manifest
from ntm_jax.data.sources.source import Source, check_split


@dataclasses.dataclass(frozen=True)
class _Captions(Sequence):
    """The captions of records, each read with its record."""

    records: Records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> str:
        return self.records[index]["caption"]


def open_records(where: str, split: str) -> Source:
    """Opens a split of the records in the folder `where`."""
    layout, splits, version = read_manifest(where)
    check_split(f"records:{where}", split, dict.fromkeys([*splits, "all"]))
    parts = [splits[split]] if split in splits else list(splits.values())
    records = Records(where, layout, parts)
    names = layout.choices.get("classes", ())
    named = len(names) == layout.num_classes and not all(str(name).isdecimal() for name in names)
    return Source(
        records,
        layout.image_shape,
        pixel_levels=layout.pixel_levels,
        num_classes=layout.num_classes,
        class_names=tuple(map(str, names)) if named else (),
        version=version,
        text_tokens=layout.text_tokens,
        text_width=layout.text_width,
        text=layout.text,
        captions=_Captions(records) if layout.captions else None,
        mean=layout.mean,
        std=layout.std,
    )
