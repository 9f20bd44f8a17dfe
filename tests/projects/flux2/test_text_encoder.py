"""FLUX.2's text encoder against the klein pipeline's, with a tiny random Qwen3."""

import numpy as np
import pytest

from ntm_jax.data import text
from tests.data.test_text import CAPTIONS, folder  # noqa: F401  (a fixture)

pytestmark = pytest.mark.filterwarnings("default")  # deprecations in other packages


def test_states_equal_the_pipelines(folder):  # noqa: F811
    import torch
    import transformers
    from diffusers import Flux2KleinPipeline

    encoder = text.open_encoder(f"flux2:{folder}")
    # Short captions are padded in their own batch.
    parts = encoder.places(CAPTIONS[:3]), encoder.places(CAPTIONS[3:])
    found, mask, _ = (np.concatenate(part) for part in zip(*parts, strict=True))
    assert found.shape == (4, 512, 48) == (4, encoder.tokens, encoder.width)
    assert mask.all()
    with torch.inference_mode():
        expected = Flux2KleinPipeline._get_qwen3_prompt_embeds(
            transformers.Qwen3ForCausalLM.from_pretrained(folder / "text_encoder"),
            transformers.AutoTokenizer.from_pretrained(folder / "tokenizer"),
            CAPTIONS,
        ).numpy()
    assert np.abs(expected[0] - expected[1]).max() > 0.5
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    states, cut = encoder.encode(CAPTIONS)  # the empty caption is encoded as itself
    np.testing.assert_array_equal(np.stack(states), found.astype(np.float16))
    assert cut == [False, False, False, True]
