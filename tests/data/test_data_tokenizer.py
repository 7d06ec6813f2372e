"""Tokenizers: loaded from every form, trained to the same bytes, and blind to special tokens."""

import json
import lzma
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import killed_after_commit
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from peptrain.data import Corpus, PrepareConfig, prepare
from peptrain.data.index import Index
from peptrain.data.tokenizer import (
    Losses,
    encode,
    end_id,
    load_tokenizer,
    losses,
    train_tokenizer,
    unknown_id,
    vocabulary,
)
from peptrain.errors import ConfigError, DataError
from peptrain.models.hf import save_tokenizer

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


@pytest.mark.parametrize("model", [models.BPE, models.Unigram])
def test_what_varies_is_switched_off_and_said(tmp_path, caplog, model):
    folder = tmp_path / "given"
    folder.mkdir()
    content = json.loads(TRAINED.to_str())
    if model is models.BPE:
        content["model"]["dropout"] = 0.9
    else:
        content = json.loads(Tokenizer(models.Unigram([("</s>", 0.0), ("a", -1.0)], 0)).to_str())
        content["padding"] = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_id": 0}
        content["padding"] |= {"pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "</s>"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "in.txt").write_text("a aa " * 50)
    corpus = prepared(folder)
    kept = json.loads(corpus.tokenizer_file.read_text())
    assert kept["model"].get("dropout") is None and kept["padding"] is None
    what = "dropout" if model is models.BPE else "padding"
    assert caplog.text.count(f"tokenizer: its {what} is switched off") == 1


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["tokenizer.model"],
            r"tokenizer\.model can't be read: convert it .*save_pretrained\(OUT\)",
        ),
        (["vocab.json", "merges.txt"], r"vocab\.json and merges\.txt can't be read: convert it"),
        ([], r"no such file; give a tokenizer\.json or its directory"),
    ],
)
def test_other_forms_of_a_tokenizer_are_to_be_converted(tmp_path, names, said):
    for name in names:
        (tmp_path / name).write_text('{"a": 0}')
        with pytest.raises(DataError, match=rf"{name} is not a tokenizer\.json .*convert it"):
            load_tokenizer(tmp_path / name)
    with pytest.raises(DataError, match=rf"tokenizer: .*{said}"):
        load_tokenizer(tmp_path)


PANICS = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}


@pytest.mark.parametrize(
    "content",
    [
        *("", "null", "[]", "{}", "[" * 100_000, "9" * 5000, TRAINED.to_str()[:-9]),
        json.dumps(json.loads(TRAINED.to_str()) | {"normalizer": PANICS}),
        json.dumps(json.loads(TRAINED.to_str()) | {"model": {"vocab": {"a": 2**32}}}),
    ],
    ids=lambda content: content[:9],
)
def test_any_damage_of_a_tokenizer_is_one_line(tmp_path, content):
    """Also what makes the Rust code panic, which is not even an Exception."""
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer: .* is not a tokenizer\.json") as raised:
        load_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_tokenizer_that_panics_at_a_text_is_one_line(tmp_path):
    content = json.loads(TRAINED.to_str())
    content["normalizer"] = PANICS | {"precompiled_charsmap": "CAAAAAAAAAD/////"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"tokenizer: can't encode the text \(.*give a tokenizer"):
        encode(load_tokenizer(tmp_path), ["abc"], UINT16)


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


def test_a_special_token_is_the_end_before_a_word_that_is_spelled_like_one():
    tokenizer = word_level("a", "</s>", "<|im_end|>")
    assert end_id(tokenizer, None) == 1
    tokenizer.add_special_tokens(["<|im_end|>"])
    assert end_id(tokenizer, None) == 2
    tokenizer.add_special_tokens(["</s>"])
    assert end_id(tokenizer, None) == 1


def test_a_named_end_token_is_taken_before_the_usual_ones():
    assert end_id(word_level("a", "</s>", "[SEP]"), "[SEP]") == 2
    with pytest.raises(ConfigError, match=r"eos_token: '<end>' is not in the tokenizer's vocab"):
        end_id(word_level("a", "</s>"), "<end>")
    with pytest.raises(ConfigError, match=r"eos_token: .*name its end token with --eos-token"):
        end_id(word_level("a"), None)


def test_the_vocabulary_counts_gaps():
    assert vocabulary(Tokenizer(models.WordLevel({"a": 0, "b": 9}, "a"))) == 10


def with_ends(folder: Path, **files: object) -> Path:
    """A tokenizer of several usual end tokens, and what is configured beside it."""
    word_level("a", "<s>", "</s>", "<eos>", "<pad>").save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "in.txt").write_text("a")
    return folder


def prepared(folder: Path, **options: object) -> Corpus:
    given = {"inputs": (folder / "in.txt",), "out": folder / "out", "tokenizer": folder, **options}
    return Corpus.open(prepare(PrepareConfig(**given)).path)


@pytest.mark.parametrize("at", [".", "tokenizer.json"])
@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": "<eos>"}},
        {"tokenizer_config": {"eos_token": {"content": "<eos>"}}},
        {"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": "<eos>"}},
        {"tokenizer_config": {"eos_token": "<eos>"}, "special_tokens_map": {"eos_token": "</s>"}},
    ],
)
def test_the_end_token_is_the_one_that_is_configured(tmp_path, caplog, files, at):
    with_ends(tmp_path, **files)
    assert prepared(tmp_path, tokenizer=tmp_path / at).eos_id == 3
    assert "eos_token" not in caplog.text
    named = prepared(tmp_path, out=tmp_path / "named", eos_token="<pad>")
    assert named.eos_id == 4


def test_a_guess_among_several_end_tokens_is_said(tmp_path, caplog):
    assert prepared(with_ends(tmp_path)).eos_id == 2
    assert "eos_token: </s> is taken, but the tokenizer also has <eos>; give --eos" in caplog.text


def test_configured_tokens_that_cannot_be_used_are_named(tmp_path):
    with_ends(tmp_path, tokenizer_config={"eos_token": "<end>"})
    with pytest.raises(ConfigError, match=r"eos_token: '<end>' is not .*--eos-token"):
        prepared(tmp_path)
    for content in ("[", "[]", "[" * 100_000, "\xff"):
        (tmp_path / "tokenizer_config.json").write_text(content, encoding="latin-1")
        with pytest.raises(DataError, match=r"tokenizer: .*tokenizer_config\.json: "):
            prepared(tmp_path)
    assert not (tmp_path / "out").exists()


def test_other_special_tokens_and_the_chat_template_reach_a_run(tmp_path):
    from transformers import AutoTokenizer

    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    own = {"bos_token": "<s>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<new>"}
    with_ends(tmp_path, tokenizer_config=own | {"chat_template": template, "auto_map": {"a": "b"}})
    corpus = prepared(tmp_path)
    run = tmp_path / "run"
    save_tokenizer(corpus.tokenizer_file, corpus.eos_id, corpus.special_tokens, run)
    saved = AutoTokenizer.from_pretrained(run)
    assert (saved.bos_token, saved.eos_token, saved.pad_token) == ("<s>", "<eos>", "<pad>")
    assert saved.chat_template == template and len(saved) == 5 and not saved.unk_token
    assert (
        saved("a a").input_ids == Tokenizer.from_file(str(corpus.tokenizer_file)).encode("a a").ids
    )


# What a tokenizer loses.

LETTERS = "abcdefghijklmnopqrstuvwxyz "


def numbered(*tokens: str) -> dict[str, int]:
    return {token: i for i, token in enumerate(tokens)}


def of_characters() -> Tokenizer:
    """A BPE without merges or an unknown token: what is not in its alphabet vanishes."""
    tokenizer = Tokenizer(models.BPE(numbered(*LETTERS, "</s>"), []))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def of_bytes() -> Tokenizer:
    """Like Llama's: characters, and bytes for what is not in its alphabet."""
    known = numbered("<unk>", "</s>", *LETTERS, *(f"<0x{n:02X}>" for n in range(256)))
    tokenizer = Tokenizer(models.BPE(known, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def like_t5() -> Tokenizer:
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    tokenizer = Tokenizer(models.Unigram([*scores, *((c, -3.0) for c in LETTERS[:-1])], 2))
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def like_bert() -> Tokenizer:
    pieces = [*LETTERS[:-1], *(f"##{c}" for c in LETTERS[:-1])]
    tokenizer = Tokenizer(models.WordPiece(numbered("[UNK]", "</s>", *pieces), unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def of_words() -> Tokenizer:
    tokenizer = word_level("[UNK]", "if", "return", "NKU", "</s>")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "text", "expected"),
    [
        (TRAINED, "Crème brûlée\n\t🙂 ﬁ\0", (0, 0)),
        (of_bytes(), "Crème brûlée\n\t🙂 ﬁ\0", (0, 0)),
        (of_characters(), "crème brûlée", (0, 3)),
        (of_characters(), "ÄÖÜ", (0, 3)),
        (like_t5(), "if a {\n    return b\n}", (2, 2 + 2 + 2)),  # braces, newlines, spaces
        (like_t5(), "if a return b", (0, 0)),
        (like_bert(), "If a, return", (1, 2)),  # the comma; I became i
        (like_bert(), "né", (0, 1)),
        (of_words(), "if NKU\nreturn [UNK-NK]", (1, 1 + 8)),  # letters of [UNK] do not count
        (of_words(), "", (0, 0)),
    ],
)  # fmt: skip
def test_what_a_tokenizer_loses(tokenizer, text, expected):
    encoded = encode(tokenizer, [text], UINT16)
    (found,) = losses(tokenizer, [text], encoded, unknown_id(tokenizer))
    assert found == Losses(expected[0], len(text), expected[1])


def test_the_share_that_a_tokenizer_loses_is_said_and_kept(tmp_path, caplog, capsys):
    from peptrain.cli.app import main

    code = "if a {\n  return b\n}\n\n" * 20
    (tmp_path / "code.jsonl").write_text(f"{json.dumps({'text': code})}\n" * 20)
    like_t5().save(str(tmp_path / "t5.json"))
    flags = ["data", "prepare", str(tmp_path / "code.jsonl"), "--held-out", "0.1"]
    flags += ["--tokenizer", str(tmp_path / "t5.json"), "--out"]
    assert main([*flags, str(tmp_path / "out")]) == 0
    assert "unknown tokens, " in (said := capsys.readouterr().out)
    config = PrepareConfig(
        inputs=(tmp_path / "code.jsonl",), held_out=0.1, tokenizer=tmp_path / "t5.json",
        out=tmp_path / "resumed", shard_tokens=2000,
    )  # fmt: skip
    assert killed_after_commit(1, config)
    made = prepare(config)
    assert made.resumed and made.losses in said
    (counts,) = Index.load(tmp_path / "resumed").sources
    (whole,) = Index.load(tmp_path / "out").sources
    assert counts == whole and counts["characters"] == 20 * len(code)
    assert (counts["unknown"], counts["lost"]) == (800, 2400)
    assert made.unknown == 800 / counts["tokens"] and made.lost == 2400 / counts["characters"]
    warning = f"{100 * made.unknown:.1f} % of the tokens are the unknown token"
    assert warning in " ".join(caplog.text.split())


def test_a_tokenizer_that_loses_nothing_is_not_warned_of(tmp_path, caplog):
    (tmp_path / "in.txt").write_text("Crème brûlée\n\t🙂")
    made = prepare(PrepareConfig(inputs=(tmp_path / "in.txt",), out=tmp_path / "o", vocab_size=300))
    assert made.losses == "0.00% unknown tokens, 0.00% of the characters lost"
    assert "represent" not in caplog.text


def test_text_that_a_tokenizer_cannot_encode_is_an_error(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, "<unk>"))
    with pytest.raises(DataError, match=r"tokenizer: can't encode .* unknown token"):
        encode(tokenizer, ["b"], UINT16)


def test_a_tokenizer_of_a_newer_library_says_to_upgrade(tmp_path):
    content = json.loads(TRAINED.to_str()) | {"pre_tokenizer": {"type": "Future"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"newer version, upgrade: pip install -U tokenizers"):
        load_tokenizer(tmp_path)
