"""The text states of the captions of a source.

M, E text tokens and width. No jax is imported before an encoder needs it: grain's worker processes
run this.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

from ntm_jax.data import text
from ntm_jax.errors import UserError

_MAX_CAPTIONS = 100_000  # that are encoded when a source is opened


def encode_captions(
    name: str, captions: Sequence[str], encoder_name: str
) -> tuple[Callable[[str], np.ndarray], text.Encoder]:
    """(a function from a caption to its states [m, E], the encoder that makes them).

    The function can be pickled to worker processes. Warns of captions that are cut.

    Args:
      name: what errors call the records.
      captions: the caption of every record.

    Raises:
      UserError: as `text.open_encoder`; a caption that cannot be encoded; too many captions for a
        slow encoder. With more captions than are encoded here, reading a record raises the second.
    """
    encoder = text.open_encoder(encoder_name)
    distinct = tuple(sorted(set(captions))) if len(captions) <= _MAX_CAPTIONS else ()
    if encoder.at_read:
        cut = [encoder.encode([caption])[1][0] for caption in distinct]
        text.warn_of_cut(encoder, distinct, cut)
        states = functools.partial(_encode_one, encoder)
    elif distinct:
        states = _encode_all(encoder_name, distinct).__getitem__
    else:
        raise UserError(
            f"{name} has {len(captions)} captions, and {encoder_name} encodes at most "
            f"{_MAX_CAPTIONS} when a source is opened: prepare them with launch/prepare.py"
        )
    return states, encoder


def _encode_one(encoder: text.Encoder, caption: str) -> np.ndarray:
    return encoder.encode([caption])[0][0]


@functools.cache
def _encode_all(name: str, captions: tuple[str, ...]) -> dict[str, np.ndarray]:
    encoder = text.open_encoder(name)
    states, cut = encoder.encode(captions)
    text.warn_of_cut(encoder, captions, cut)
    return dict(zip(captions, states, strict=True))
