"""Records with the text states of their captions."""

import dataclasses
import pickle

import numpy as np
import pytest

from ntm_jax.data import text
from ntm_jax.data.pipeline import spec
from ntm_jax.data.records import Layout
from ntm_jax.data.sources import open_source
from ntm_jax.errors import UserError
from tests.data.common import captioned, latents, write_records

TEXT = Layout((2, 2, 4), pixel_levels=0, text_tokens=6, text_width=8)


def test_captions_are_encoded_as_they_are_read(tmp_path, monkeypatch):
    examples = [
        {**example, "caption": caption}
        for example, caption in zip(latents(3), ("a red circle", "", "a blau circle"), strict=True)
    ]
    layout = Layout((2, 2, 4), pixel_levels=0, captions=True)
    write_records(tmp_path, {"test": examples}, layout)
    name = "words:4:a red circle"
    source = pickle.loads(pickle.dumps(open_source(f"records:{tmp_path}", "test[:2]", text=name)))
    assert list(source.captions) == ["a red circle", ""]
    found = spec(source, 1)
    assert (found.text, found.text_tokens, found.text_width) == (name, 4, 10)
    first, empty = source.records[0], source.records[1]
    assert (first["caption"], first["text"].shape) == ("a red circle", (4, 10))
    assert (first["text_mask"].sum(), empty["text_mask"].sum()) == (3, 0)
    np.testing.assert_array_equal(first["text"].argmax(1)[:3], [0, 1, 2])
    with monkeypatch.context() as patch:  # a slow encoder's states are made when it is opened
        patch.setattr(text.Words, "at_read", False)
        slow = open_source(f"records:{tmp_path}", "test[:2]", text=name)
        patch.setattr(text.Words, "encode", None)
        np.testing.assert_array_equal(slow.records[0]["text"], first["text"])
    with pytest.raises(UserError, match="'blau', which the model does not know"):
        open_source(f"records:{tmp_path}", "test", text=name)
    with pytest.warns(UserWarning, match=r"^1 of 2 captions are cut to the 2 tokens of words:2:"):
        open_source(f"records:{tmp_path}", "test[:2]", text="words:2:a red circle")


def test_states_of_another_encoder_are_refused(tmp_path):
    write_records(tmp_path, {"test": captioned(3)}, dataclasses.replace(TEXT, text="minilm"))
    assert spec(open_source(f"records:{tmp_path}", "test"), 1).text == "minilm"
    with pytest.raises(UserError, match=r"\.text_encoder is 'words:4:a', and .* of 'minilm'"):
        open_source(f"records:{tmp_path}", "test", text="words:4:a")
