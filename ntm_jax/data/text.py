"""Captions to text states, by encoders of a name: `words:M:VOCABULARY`, and `flux2:FOLDER`, what FLUX.2 klein is told.

An encoder has a name, `tokens` M and `width` E, the sizes of its states, and `encode`. The states of a caption are those of its own
tokens, without padding; the empty caption has none, which is the null caption. No jax is imported before an encoder needs it: grain's
worker processes run this.
"""

import functools
import re
from collections.abc import Sequence

import numpy as np

from ntm_jax.data import pretrained
from ntm_jax.errors import UserError


@functools.cache
def open_encoder(name: str):
    """The encoder of this name, opened once. UserError where there is none, or it lacks what it needs."""
    kind, _, rest = name.partition(":")
    match kind:
        case "words":
            return Words(name, rest)
        case "flux2":
            return TextEncoder(rest)
    raise UserError(f"the text encoder {name!r} is not known: expected words:M:VOCABULARY or flux2:FOLDER")


class Words:
    """A trainable embedding of a small vocabulary, `words:M:a red circle`: a token is a word, its state one number 1 for the word and one
    for its place, so that the model's first product with it is the sum of a learned row for either. E = words + M."""

    at_read = True  # encodes in microseconds: captions are encoded as they are read

    def __init__(self, name: str, rest: str):
        tokens, _, words = rest.partition(":")
        if not tokens.isdecimal() or int(tokens) < 1 or not words.split():
            raise UserError(f"the text encoder {name!r} is not understood: expected words:M:VOCABULARY, such as words:8:a red blue circle")
        self.name, self.tokens, self._places = name, int(tokens), {word: i for i, word in enumerate(words.split())}
        self.width = len(self._places) + self.tokens

    def encode(self, captions: Sequence[str]) -> tuple[list[np.ndarray], list[bool]]:
        """Captions -> their states, [m, E] float16 each, m <= M, and which of them were cut to M tokens. UserError: an unknown word."""
        states, cut = [], []
        for caption in captions:
            words = re.findall(r"[\w']+", caption.lower())
            unknown = [word for word in words if word not in self._places]
            if unknown:
                known = ", ".join(self._places)
                raise UserError(f"the caption {caption!r} has the word {unknown[0]!r}, which the model does not know: expected {known}")
            cut.append(len(words) > self.tokens)
            rows = np.zeros((min(len(words), self.tokens), self.width), np.float16)
            for place, word in enumerate(words[: self.tokens]):
                rows[place, [self._places[word], len(self._places) + place]] = 1
            states.append(rows)
        return states, cut


# FLUX.2 klein: Qwen3 in PyTorch (transformers), as diffusers' Flux2KleinPipeline and black-forest-labs/flux2, src/flux2/text_encoder.py.

TOKENS = 512
LAYERS = (9, 18, 27)  # the states after these many layers, side by side: E is three times Qwen3's width


class TextEncoder:
    """Qwen3 in the checkpoint's dtype and its tokenizer, from a local folder with text_encoder/ and tokenizer/.

    device: torch's name of one. UserError: see pretrained.load.
    """

    def __init__(self, path: str, device: str = "cpu"):
        self._torch, self._device = pretrained.module("torch"), device
        self._tokenizer = pretrained.tokenizer(path, "tokenizer")
        self._model = pretrained.load("transformers", "Qwen3Model", path, "text_encoder", dtype="auto").to(device)

    def encode(self, captions: list[str]) -> np.ndarray:
        """Captions, each a user's turn of a chat without thinking, cut or padded to M tokens -> states [n, M, E] float32.

        Padding is not masked in FLUX.2's attention: the states of all M places are what it was trained on, so all are to be written, and
        the mask is True throughout. Its unconditional states are those of the caption "".
        """
        texts = [self._tokenizer.apply_chat_template(
            [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, enable_thinking=False)
            for caption in captions]
        tokens = self._tokenizer(texts, return_tensors="pt", padding="max_length", truncation=True, max_length=TOKENS).to(self._device)
        with self._torch.inference_mode():
            states = self._model(**tokens, output_hidden_states=True, use_cache=False).hidden_states
            return self._torch.cat([states[layer] for layer in LAYERS], -1).float().cpu().numpy()
