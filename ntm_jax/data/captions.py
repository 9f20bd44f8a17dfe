"""Records with the text states of their captions.

M, E text tokens and width. No jax is imported before an encoder needs it: grain's worker processes
run this.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ntm_jax.data import text
from ntm_jax.data.text import pad_text
from ntm_jax.errors import UserError

_MAX_CAPTIONS = 100_000  # that are encoded when a source is opened


@dataclasses.dataclass(frozen=True)
class _EncodedCaptions:
    """Records with the text states of their captions, M = `tokens`.

    states: caption -> [m, E]. It is pickled to worker processes.
    """

    records: Any
    tokens: int
    states: Callable[[str], np.ndarray]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        return record | pad_text(self.states(record["caption"]), self.tokens)


def encode_captions(
    name: str, records: Any, captions: Sequence[str], encoder_name: str
) -> tuple[_EncodedCaptions, text.Encoder]:
    """(records with "text" [M, E] float16 and "text_mask" [M] bool, the encoder that made them).

    Args:
      name: what errors call the records.
      records: random access to records with "caption".
      captions: the caption of every record.
    Warns of captions that are cut.

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
    return _EncodedCaptions(records, encoder.tokens, states), encoder


def _encode_one(encoder: text.Encoder, caption: str) -> np.ndarray:
    return encoder.encode([caption])[0][0]


@functools.cache
def _encode_all(name: str, captions: tuple[str, ...]) -> dict[str, np.ndarray]:
    encoder = text.open_encoder(name)
    states, cut = encoder.encode(captions)
    text.warn_of_cut(encoder, captions, cut)
    return dict(zip(captions, states, strict=True))
