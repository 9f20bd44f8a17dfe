"""Captions to the text states that FLUX.2 klein is told, through its text encoder in PyTorch (transformers' Qwen3).

Source: diffusers' Flux2KleinPipeline and black-forest-labs/flux2, src/flux2/text_encoder.py. M = 512 tokens, E three times Qwen3's width.
"""

import numpy as np

from ntm_jax.data import pretrained

TOKENS = 512
LAYERS = (9, 18, 27)  # the states after these many layers, side by side


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
