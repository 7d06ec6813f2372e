"""Tokenizers of every kind, from text to an export: the ids are the same at each station."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support import tiny
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from peptrain.data import Corpus, PrepareConfig, prepare
from peptrain.data.tokenizer import load_tokenizer
from peptrain.exporting.export import export
from peptrain.training.loop import train

TEXT = "A naïve café, 東京! It's 3.14:\n\tdef f(x):\n        return x  # <ok>\n\nTwo  words.\n" * 30
SPECIAL = {"special_tokens": ["<unk>", "</s>"], "show_progress": False}


def characters() -> Tokenizer:
    """A token for each character, and spaces are kept."""
    made = Tokenizer(models.WordLevel({}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("(?m:.)"), "isolated")
    made.decoder = decoders.Fuse()
    made.train_from_iterator([TEXT], trainers.WordLevelTrainer(**SPECIAL))
    return made


def word_pieces() -> Tokenizer:
    """Like BERT's: lower case, without accents, and no spaces."""
    made = Tokenizer(models.WordPiece({}, unk_token="<unk>"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator([TEXT], trainers.WordPieceTrainer(vocab_size=150, **SPECIAL))
    return made


def unigrams() -> Tokenizer:
    """Like T5's: NFKC, and spaces are a part of the next word."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=150, unk_token="<unk>", **SPECIAL)
    made.train_from_iterator([TEXT], trainer)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("kind", [characters, word_pieces, unigrams])
def test_ids_are_the_same_in_a_corpus_a_run_and_an_export(
    kind: Callable[[], Tokenizer], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    kind().save(str(tmp_path / "tokenizer.json"))
    given = {"inputs": (tmp_path / "text.txt",), "tokenizer": tmp_path / "tokenizer.json"}
    corpus = prepare(PrepareConfig(out=tmp_path / "corpus", held_out=0.1, **given)).path
    model = {"vocab_size": None, "hidden_size": 16}
    train(tiny("full", corpus, run := tmp_path / "run", model=model, train={"steps": 1}))
    export(run, out := tmp_path / "out")
    ids = load_tokenizer(tmp_path / "tokenizer.json").encode(TEXT, add_special_tokens=False).ids
    assert load_tokenizer(run / "tokenizer").encode(TEXT, add_special_tokens=False).ids == ids
    loaded = AutoTokenizer.from_pretrained(out)
    assert loaded(TEXT)["input_ids"] == ids and loaded.eos_token == "</s>"
    opened = Corpus.open(corpus)
    (shard,) = corpus.glob("train-*.bin")
    tokens = [int(t) for t in memoryview(shard.read_bytes()).cast("H")]
    assert tokens == ids[: len(tokens)] and len(tokens) > 100
    assert opened.eos_id == loaded.eos_token_id
