"""Prepared records: sharded ArrayRecord files under one manifest, written once, read at random.

PATH/manifest.json names the shards of every split, the number of records and the SHA-256 of each
shard's file, and the layout that all records share. A record is the bytes of a safetensors file:

    "image"    [H, W, C], uint8 pixels, or latents in float16, bfloat16 or float32
    "label"    int32, if there are classes
    "text"     [m, E] float16, the states of the record's own m <= M tokens, if there is text
    "caption"  UTF-8 bytes, if there are captions

H, W, C image height, width, channels; V pixel levels; M, E text tokens and width. No jax is
imported: grain's worker processes run this.
"""

from ntm_jax.data.records.layout import MANIFEST, Layout, read_manifest, write_manifest
from ntm_jax.data.records.reading import Records, pad_text, sha256, verify
from ntm_jax.data.records.writing import write_records, write_shard

__all__ = [
    "MANIFEST",
    "Layout",
    "Records",
    "pad_text",
    "read_manifest",
    "sha256",
    "verify",
    "write_manifest",
    "write_records",
    "write_shard",
]
