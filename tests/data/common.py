"""What the tests of data share: records that are made up, and files that are not JSON objects."""

import numpy as np

NOT_AN_OBJECT = [b"[]", b"null", b"", b"\xff", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]


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
