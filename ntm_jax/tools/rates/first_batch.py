"""What training reads of prepared records before its first batch, the row `records` of a benchmark.

A set of many shards is made in a temporary folder, and a pipeline with worker processes started on
it. Linux counts the bytes that each thread reads.
"""

import dataclasses
import os
import pathlib
import tempfile
import threading
import time
from typing import Any

import numpy as np

from ntm_jax.data import pipeline
from ntm_jax.data.records import Layout, Split, sha256, write_manifest, write_shard
from ntm_jax.data.sources import open_source

SHARDS, MIB, WORKERS, BATCH = 40, 64, 8, 8
_SHAPE = (16, 16, 64)  # of a record's latents: 32 KiB


@dataclasses.dataclass(frozen=True)
class _Counted:
    """Records that write the bytes read for each to a file of their thread in `folder`."""

    records: Any
    folder: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int):
        before = _read_by_thread()
        record = self.records[index]
        with open(f"{self.folder}/{os.getpid()}-{threading.get_native_id()}", "a") as file:
            file.write(f"{_read_by_thread() - before}\n")
        return record


def _read_by_thread() -> int:
    return int(pathlib.Path("/proc/thread-self/io").read_text().split()[1])  # rchar


def measure() -> dict[str, float]:
    """{"mib" that all workers read before the first batch, "of_mib", "seconds", ...}.

    The shards are one file under many names, so that they need little space.
    """
    draw = np.random.default_rng(0)
    layout = Layout(_SHAPE, pixel_levels=0)
    records = [{"image": draw.standard_normal(_SHAPE).astype(np.float16)}] * (MIB * 2**20 // 2**15)
    names = [f"train-{i:05}.arrayrecord" for i in range(SHARDS)]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as counts:
        write_shard(f"{folder}/{names[0]}", records, layout)
        for name in names[1:]:
            os.link(f"{folder}/{names[0]}", f"{folder}/{name}")
        digest = sha256(f"{folder}/{names[0]}")
        write_manifest(folder, layout, {
            "train": Split(names, [len(records)] * SHARDS, [digest] * SHARDS)})
        begin = time.perf_counter()
        source = open_source(f"records:{folder}", "train")
        source = dataclasses.replace(source, records=_Counted(source.records, counts))
        batches = pipeline.TrainIterator(source, 1, BATCH, 0, WORKERS)
        try:
            next(batches)
            seconds = time.perf_counter() - begin
            read = sum(int(line) for file in pathlib.Path(counts).iterdir()
                       for line in file.read_text().splitlines())
        finally:
            batches.close()
    return {"mib": read / 2**20, "of_mib": SHARDS * MIB, "seconds": seconds, "shards": SHARDS,
            "workers": WORKERS}
