"""Records with the text states of their captions.

M, E text tokens and width. No jax is imported before an encoder needs it: grain's worker processes
run this.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from ntm_jax.data import text
from ntm_jax.data.records import pad_text
from ntm_jax.errors import UserError

_MAX_CAPTIONS = 100_000  # that are encoded when a source is opened
_AT_ONCE = 1_000  # captions whose states are in memory while captions are checked


@dataclasses.dataclass(frozen=True)
class _EncodedCaptions:
    """Records with the text states of their captions, M = `tokens`.

    encoder: encodes captions as they are read; None if `states` holds the states of all captions,
    {caption: [m, E]}.
    """

    records: Any
    tokens: int
    encoder: text.Encoder | None
    states: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        caption = record["caption"]
        encoder = self.encoder
        if encoder is None:
            own = self.states[caption]
        else:
            (own,), _ = text.encode(encoder, [caption])
        return record | pad_text(own, self.tokens)


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
    if encoder.at_read:
        if len(captions) <= _MAX_CAPTIONS:
            some, cut = sorted(set(captions)), []
            for start in range(0, len(some), _AT_ONCE):
                cut += text.encode(encoder, some[start : start + _AT_ONCE])[1]
            text.warn_of_cut(encoder, some, cut)
        return _EncodedCaptions(records, encoder.tokens, encoder, {}), encoder
    if len(captions) > _MAX_CAPTIONS:
        raise UserError(
            f"{name} has {len(captions)} captions, and {encoder_name} encodes at most "
            f"{_MAX_CAPTIONS} when a source is opened: prepare them with launch/prepare.py"
        )
    states = _encode_all(encoder_name, tuple(sorted(set(captions))))
    return _EncodedCaptions(records, encoder.tokens, None, states), encoder


@functools.cache
def _encode_all(name: str, captions: tuple[str, ...]) -> dict[str, np.ndarray]:
    encoder = text.open_encoder(name)
    states, cut = text.encode(encoder, captions)
    text.warn_of_cut(encoder, captions, cut)
    return dict(zip(captions, states, strict=True))
