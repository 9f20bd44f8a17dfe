"""Encoders: words by their own definition, FLUX.2 klein's states against the pipeline's own prompt encoding with a tiny random Qwen3."""

import numpy as np
import pytest

from ntm_jax.data import text
from ntm_jax.errors import UserError

pytestmark = pytest.mark.filterwarnings("default")  # others' deprecations
CAPTIONS = ["a red fox", "", "two owls on a branch, at night", "fox " * 600]
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n"
            "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of the pipeline's layout with a byte tokenizer and a Qwen3 of 28 layers of width 16, as that of klein is saved."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    import tokenizers

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    bpe.pre_tokenizer, bpe.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=28, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, initializer_range=0.3, tie_word_embeddings=True))
    path = tmp_path_factory.mktemp("flux2")
    model.save_pretrained(path / "text_encoder")
    tokenizer.save_pretrained(path / "tokenizer")
    return path


def test_states_are_the_pipelines(folder):
    import torch
    import transformers
    from diffusers import Flux2KleinPipeline

    encoder = text.TextEncoder(str(folder))
    found = np.concatenate([encoder.encode(CAPTIONS[:3]), encoder.encode(CAPTIONS[3:])])  # the short ones are padded by themselves
    assert found.shape == (4, 512, 48)
    assert found.dtype == np.float32
    with torch.inference_mode():
        expected = Flux2KleinPipeline._get_qwen3_prompt_embeds(
            transformers.Qwen3ForCausalLM.from_pretrained(folder / "text_encoder"),
            transformers.AutoTokenizer.from_pretrained(folder / "tokenizer"), CAPTIONS).numpy()
    assert expected.std() > 0.5
    assert np.abs(expected[0] - expected[1]).max() > 0.5
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())  # float32 products


def test_a_folder_that_is_not_whole_is_refused(folder, tmp_path):
    import torch
    import transformers

    with pytest.raises(UserError, match="nothing is not there"):
        text.TextEncoder(str(tmp_path / "nothing"))
    (tmp_path / "tokenizer").mkdir()
    with pytest.raises(UserError, match="not read as a tokenizer"):
        text.TextEncoder(str(tmp_path))
    for file in (folder / "tokenizer").iterdir():
        (tmp_path / "tokenizer" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_bytes((folder / "text_encoder" / "config.json").read_bytes())
    torch.save(transformers.Qwen3ForCausalLM.from_pretrained(folder / "text_encoder").state_dict(),
               tmp_path / "text_encoder" / "pytorch_model.bin")
    with pytest.raises(UserError, match="not read as a Qwen3Model in safetensors") as error:
        text.TextEncoder(str(tmp_path))
    assert "\n" not in str(error.value)


def test_words_are_two_ones_each():
    encoder = text.open_encoder("words:4:a red blue circle")
    (states, empty), cut = encoder.encode(["A red, red circle", ""])
    expected = np.zeros((4, 8))
    expected[range(4), [0, 1, 1, 3]] = expected[range(4), [4, 5, 6, 7]] = 1
    np.testing.assert_array_equal(states, expected)
    assert (states.dtype, empty.shape, cut) == (np.float16, (0, 8), [False, False])
    (short,), cut = encoder.encode(["a red circle a blue circle"])
    assert (short.shape, cut) == ((4, 8), [True])


@pytest.mark.parametrize(("name", "line"), [
    ("words:8", "expected words:M:VOCABULARY"), ("words:x:a b", "is not understood"), ("bert", "'bert' is not known: expected words")])
def test_encoders_that_are_none_are_refused(name, line):
    with pytest.raises(UserError, match=line):
        text.open_encoder(name)


def test_a_word_that_is_not_known_is_named():
    with pytest.raises(UserError, match="has the word 'green', which the model does not know: expected a, red"):
        text.open_encoder("words:4:a red").encode(["a green"])
