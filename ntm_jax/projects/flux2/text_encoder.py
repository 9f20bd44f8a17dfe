"""The text encoder `flux2:FOLDER`: Qwen3's states, as FLUX.2 klein takes them."""

from collections.abc import Sequence

from ntm_jax.data.text_networks import Language

TOKENS = 512
LAYERS = (9, 18, 27)  # their states are concatenated: the width is three times Qwen3's


class Qwen3(Language):
    """Qwen3, reading a caption as a user's turn of a chat without thinking, padded to TOKENS.

    diffusers' Flux2KleinPipeline and black-forest-labs/flux2 (src/flux2/text_encoder.py) encode
    captions in this way. FLUX.2's attention does not mask padding, so the states of all positions
    are kept. The empty caption gives the unconditional states.
    """

    masked = False
    empty = True

    def __init__(self, folder: str):
        super().__init__(f"flux2:{folder}", folder, TOKENS, LAYERS, kind="Qwen3Model")

    def turns(self, captions: Sequence[str]) -> list[str]:
        """The captions, each as a user's turn."""
        return [
            self.tokenizer.apply_chat_template(
                [{"role": "user", "content": caption}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
            for caption in captions
        ]
