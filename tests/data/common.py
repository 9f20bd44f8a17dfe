"""What the tests of data share: records that are made up."""

import numpy as np


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
