"""What the tests of data share: records that are made up."""

import numpy as np

from ntm_jax.data.records import Split, sha256, write_manifest, write_shard


def write_records(path, splits, layout, shard_size=100):
    """Writes the examples of each split in shards, and then their manifest."""
    written = {name: Split() for name in splits}
    for name, split in written.items():
        for start in range(0, len(splits[name]), shard_size):
            file = path / f"{name}-{len(split.shards):05}.arrayrecord"
            split.shards.append(file.name)
            split.counts.append(
                write_shard(file, splits[name][start : start + shard_size], layout))
            split.sha256.append(sha256(file))
    write_manifest(str(path), layout, written)


def latents(count, dtype=np.float16, shape=(2, 2, 4)):
    random = np.random.default_rng(1)
    return [{"image": random.normal(size=shape).astype(dtype)} for _ in range(count)]


def captioned(count):
    """Record i has i % 7 tokens."""
    random = np.random.default_rng(2)
    return [
        {**example, "text": random.normal(size=(i % 7, 8)).astype(np.float16)}
        for i, example in enumerate(latents(count))
    ]
