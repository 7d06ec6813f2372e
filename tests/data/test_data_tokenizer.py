"""Tokenizers: loaded from every form, trained to the same bytes, and blind to special tokens."""

import lzma

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from peptrain.data.tokenizer import encode, end_id, load_tokenizer, train_tokenizer, vocabulary
from peptrain.errors import ConfigError, DataError

TEXTS = ["the cat sat on the mat, the dog on the log. " * 5, "def f(x):\n    return x\n" * 5]
TRAINED = train_tokenizer(iter(TEXTS), 280)
UINT16 = np.dtype("<u2")


def word_level(*words: str) -> Tokenizer:
    return Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, words[0]))


def test_training_twice_gives_the_same_bytes():
    assert train_tokenizer(iter(TEXTS), 280).to_str() == TRAINED.to_str()
    assert vocabulary(TRAINED) == 280
    assert TRAINED.token_to_id("<|endoftext|>") == end_id(TRAINED, None)


def test_too_little_text_gives_a_smaller_vocabulary():
    assert vocabulary(train_tokenizer(iter(["ab"]), 1000)) == 258


@given(st.text())
def test_byte_level_ids_decode_to_the_text(text):
    (ids,) = encode(TRAINED, [text], UINT16)
    assert ids.dtype == UINT16
    assert TRAINED.decode(ids.tolist(), skip_special_tokens=False) == text


def test_a_spelled_special_token_is_plain_text():
    (ids,) = encode(TRAINED, ["an <|endoftext|> in the text"], UINT16)
    assert end_id(TRAINED, None) not in ids


def test_loading_from_a_file_its_packed_form_and_its_directory(tmp_path):
    plain, packed = tmp_path / "tokenizer.json", tmp_path / "other.json.xz"
    plain.write_text(TRAINED.to_str())
    packed.write_bytes(lzma.compress(plain.read_bytes()))
    for path in (plain, packed, tmp_path):
        assert load_tokenizer(path).to_str() == TRAINED.to_str()


def test_truncation_padding_and_special_tokens_of_a_file_are_not_used(tmp_path):
    cutting = Tokenizer.from_str(TRAINED.to_str())
    cutting.enable_truncation(2)
    cutting.enable_padding(length=100)
    cutting.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    for text, ids in zip(TEXTS, encode(loaded, TEXTS, UINT16), strict=True):
        assert loaded.decode(ids.tolist(), skip_special_tokens=False) == text


def test_files_that_are_no_tokenizer_are_named(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer: .*tokenizer\.json: no such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(DataError, match=r"tokenizer: .* is not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "t.json.xz").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"t\.json\.xz: can't be read"):
        load_tokenizer(tmp_path / "t.json.xz")


@pytest.mark.parametrize(
    "name", ["</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>"]
)
def test_the_usual_end_tokens_are_found(name):
    assert end_id(word_level("a", "b", name), None) == 2


def test_a_named_end_token_is_taken_before_the_usual_ones():
    assert end_id(word_level("a", "</s>", "[SEP]"), "[SEP]") == 2
    with pytest.raises(ConfigError, match=r"eos_token: '<end>' is not in the tokenizer's vocab"):
        end_id(word_level("a", "</s>"), "<end>")
    with pytest.raises(ConfigError, match=r"eos_token: .*name its end token with --eos-token"):
        end_id(word_level("a"), None)


def test_the_vocabulary_counts_gaps():
    assert vocabulary(Tokenizer(models.WordLevel({"a": 0, "b": 9}, "a"))) == 10
