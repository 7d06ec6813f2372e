"""Several sources: shares as asked at every moment, an order without luck, and early ends."""

import json
import re
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import killed_after_commit
from tokenizers import Tokenizer, models, pre_tokenizers

from peptrain.data import Corpus, PrepareConfig, prepare
from peptrain.data.index import Index
from peptrain.data.sources.base import Piece, Taken
from peptrain.data.sources.mixture import mixed
from peptrain.errors import ConfigError, DataError

END = 50


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """Words w0 to w49: one token each."""
    words = {f"w{number}": number for number in range(END)} | {"</s>": END}
    made = Tokenizer(models.WordLevel(words, "w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return path


def write(path: Path, word: int, lengths: list[int]) -> Path:
    """Documents of one repeated word, so that the source of every token is known."""
    lines = [json.dumps({"text": " ".join([f"w{word}"] * length)}) for length in lengths]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def config(tmp_path, tokenizer) -> PrepareConfig:
    """Three sources, 100 documents of 1 to 9 words each; none is held out."""
    draw = np.random.default_rng(0)
    files = [
        write(tmp_path / f"{n}.jsonl", 10 + n, draw.integers(1, 10, 100).tolist()) for n in range(3)
    ]
    return PrepareConfig(
        inputs=tuple(files),
        out=tmp_path / "out",
        tokenizer=tokenizer,
        held_out=0,
        shard_tokens=100,
        weights=(0.6, 0.3, 0.1),
    )


def stream(config: PrepareConfig) -> list[int]:
    corpus = Corpus.open(config.out)
    shards = sorted(config.out.glob("train-*.bin"))
    assert len(shards) > 1
    tokens = np.concatenate([np.fromfile(shard, "<u2") for shard in shards]).tolist()
    assert len(tokens) == corpus.train_tokens
    return tokens


def documents(tokens: list[int]) -> list[tuple[int, int]]:
    """(word, bytes of text) of each document, and that no other lies inside it."""
    ends = [-1, *(place for place, token in enumerate(tokens) if token == END)]
    assert ends[-1] == len(tokens) - 1
    found = []
    for before, end in pairwise(ends):
        (word,) = set(tokens[before + 1 : end])
        found.append((word, 4 * (end - before - 1) - 1))
    return found


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


class Words:
    """A source of documents of given lengths, in pieces of at most three letters."""

    name, size = "words", None

    def __init__(self, lengths: list[int]):
        self.all = []
        for length in lengths:
            whole = [
                Piece("é" * min(3, length - at), at + 3 >= length) for at in range(0, length, 3)
            ]
            self.all += whole
        self.all = [piece._replace(position=n) for n, piece in enumerate(self.all, start=1)]

    def pieces(self, position):
        return iter(self.all[position or 0 :])


def naive(lengths: list[list[int]], weights: list[float]) -> list[int]:
    """Whose turn it is, document by document, told in words: the largest debt goes first."""
    paid, order = [0] * len(weights), []
    queues = [list(each) for each in lengths]
    while True:
        debts = [w * sum(paid) - p for w, p in zip(weights, paid, strict=True)]
        chosen = debts.index(max(debts))
        if not queues[chosen]:
            return order
        paid[chosen] += 2 * queues[chosen].pop(0)  # bytes of é
        order.append(chosen)


mixtures = st.integers(2, 5).flatmap(
    lambda n: st.tuples(
        st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=30), min_size=n, max_size=n),
        st.lists(st.integers(1, 20), min_size=n, max_size=n),
    )
)


@settings(max_examples=200, deadline=None)
@given(mixtures, st.data())
def test_the_order_is_the_naive_one_from_wherever_it_goes_on(mixture, data):
    lengths, parts = mixture
    weights = [part / sum(parts) for part in parts]
    sources = [Words(each) for each in lengths]
    whole = list(mixed(sources, weights, [Taken() for _ in sources]))
    assert [n for n, piece in whole if piece.ends] == naive(lengths, weights)
    stop = data.draw(st.integers(0, len(whole)))
    taken = [Taken() for _ in sources]
    for number, piece in whole[:stop]:
        taken[number].add(piece, 0)
    assert list(mixed(sources, weights, taken)) == whole[stop:]


@settings(max_examples=200, deadline=None)
@given(mixtures)
def test_no_source_gets_ahead_of_its_share_by_more_than_a_document(mixture):
    lengths, parts = mixture
    weights = [part / sum(parts) for part in parts]
    counts = np.zeros(len(weights))
    for number, piece in mixed([Words(each) for each in lengths], weights, [Taken()] * len(parts)):
        counts[number] += len(piece.text.encode())
        ahead = counts - np.array(weights) * counts.sum()
        longest = [2 * max(each) for each in lengths]
        assert (ahead <= np.array(longest) + 1e-9).all()
        if len(parts) == 2 and piece.ends:  # then no source is behind by more either
            assert (-ahead <= max(longest) + 1e-9).all()


def test_the_corpus_is_the_mixture(config, caplog):
    made = prepare(config)
    counts: dict[int, int] = {10: 0, 11: 0, 12: 0}
    for word, size in documents(stream(config)):
        counts[word] += size
        total = sum(counts.values())
        for each, weight in zip(counts, config.weights, strict=True):
            assert abs(counts[each] - weight * total) <= 2 * 35
    assert made.text_bytes == sum(counts.values())
    recorded = Index.load(config.out).sources
    assert [source["text_bytes"] for source in recorded] == list(counts.values())
    assert sum(source["tokens"] for source in recorded) == made.train_tokens
    assert len({source["source"] for source in recorded}) == 3


def test_the_mixture_ends_with_the_first_source_that_does_and_says_so(config, caplog):
    write(config.inputs[1], 11, [5] * 10)
    made = prepare(config)
    words = [word for word, _ in documents(stream(config))]
    assert words.count(11) == 10
    said = ended(caplog)
    assert len(said) == 1
    begin = f"weights: {config.inputs[1]} ended after 190 bytes of text"
    assert said[0].startswith(begin) and f" {made.train_tokens} training tokens" in said[0]
    assert "more than once" in said[0]
    caplog.clear()
    wanted = replace(config, out=config.out.with_name("wanted"))
    wanted = replace(wanted, max_tokens=int(said[0].partition("--max-tokens ")[2]))
    prepare(wanted)
    assert stream(wanted) == stream(config)
    assert not ended(caplog)


def ended(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if " ended after " in r.getMessage()]


def test_shares_that_long_documents_upset_are_named(config, caplog):
    a, b, _ = config.inputs
    write(a, 10, [900])
    write(b, 11, [1] * 900)
    two = replace(config, inputs=(a, b), weights=(0.25, 0.75), max_tokens=1100)
    prepare(two)
    (said,) = [r.getMessage() for r in caplog.records if "actual shares" in r.getMessage()]
    assert re.search(r"weights: the actual shares are 0\.9\d 0\.0\d, .* --max-tokens", said)


def test_a_source_listed_twice_goes_in_twice(config):
    a, b, _ = config.inputs
    write(b, 11, [5] * 10)
    prepare(replace(config, inputs=(a, b, b), weights=(0.6, 0.2, 0.2)))
    words = [word for word, _ in documents(stream(config))]
    assert words.count(11) == 20


def test_a_document_of_a_source_listed_twice_is_held_out_in_both_places(config, tmp_path):
    """Held out in one and trained on in the other, it would flatter the held-out loss."""
    lines = [json.dumps({"text": f"w{n % END} w{n // END}"}) for n in range(1000)]
    file = tmp_path / "all.jsonl"
    file.write_text("\n".join(lines))
    twice = {"inputs": (file, file), "weights": (0.5, 0.5), "held_out": 0.3}
    made = prepare(replace(config, **twice))
    corpus = Corpus.open(made.path)
    train = np.concatenate([np.asarray(shard) for shard in corpus._shards])
    pairs = [set(zip(ids[::3], ids[1::3], strict=True)) for ids in (train, corpus.held_out())]
    assert len(pairs[0] | pairs[1]) == 1000 and len(pairs[1]) > 200
    assert not pairs[0] & pairs[1]


@pytest.mark.parametrize("weights", [(), (0.6, 0.3, 0.1)])
@pytest.mark.parametrize("wanted", [1, 150, 333])
def test_max_tokens_ends_with_the_document_that_reaches_it(
    config, tmp_path, caplog, weights, wanted
):
    config = replace(config, weights=weights, shard_tokens=20)
    prepare(replace(config, out=tmp_path / "whole"))
    whole = stream(replace(config, out=tmp_path / "whole"))
    caplog.clear()
    made = prepare(replace(config, max_tokens=wanted, shard_tokens=1))
    assert made.train_tokens == whole.index(END, wanted - 1) + 1
    shards = [np.fromfile(p, "<u2") for p in sorted(config.out.glob("train-*.bin"))]
    assert np.concatenate(shards).tolist() == whole[: made.train_tokens]
    wanted = ("held_out", "weights: the actual shares are")
    assert all(record.getMessage().startswith(wanted) for record in caplog.records)


def test_max_tokens_counts_no_held_out_token_and_held_out_inputs_come_whole(config, tmp_path):
    apart = write(tmp_path / "apart.jsonl", 20, [7] * 9)
    by_hash = replace(config, held_out=0.3, max_tokens=200)
    made = prepare(by_hash)
    assert 200 <= made.train_tokens < 210 and made.held_out_tokens > 10
    by_files = replace(config, held_out_inputs=(apart,), max_tokens=200, out=tmp_path / "files")
    made = prepare(by_files)
    assert 200 <= made.train_tokens < 210 and made.held_out_tokens == 9 * 8
    assert set(Corpus.open(made.path).held_out().tolist()) == {20, END}


def test_inputs_that_hold_fewer_tokens_than_wanted_are_warned_of(config, caplog):
    made = prepare(replace(config, weights=(), max_tokens=10**6))
    said = f"max_tokens: 1000000 requested, but the inputs have {made.train_tokens}"
    assert [r.getMessage() for r in caplog.records if r.getMessage().startswith(said)]


@pytest.mark.parametrize("weights", [(), (0.6, 0.3, 0.1)])
@pytest.mark.parametrize("max_tokens", [None, 500])
@pytest.mark.parametrize("held_out", [pytest.param(0, marks=pytest.mark.slow), 0.2])
def test_killed_after_any_commit_it_ends_with_the_same_bytes(
    config, tmp_path, monkeypatch, weights, max_tokens, held_out
):
    monkeypatch.setattr("peptrain.data.sources.text.PIECE_BYTES", 30)
    (tmp_path / "long.txt").write_text("w13 w14\n" * 60)  # a document that shards cut
    inputs = (*config.inputs[:2], tmp_path / "long.txt")
    config = replace(config, inputs=inputs, weights=weights, max_tokens=max_tokens)
    config = replace(config, held_out=held_out, shard_tokens=40)
    prepare(config)
    for number in range(1000):
        struck = replace(config, out=tmp_path / f"struck-{number}")
        if not killed_after_commit(number, struck):
            break
        assert prepare(struck).resumed
        assert content(struck.out) == content(config.out)
    assert number >= len(Index.load(config.out).train)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"weights": (0.6, 0.3, 0.2)},
            r"weights: \[0\.6, 0\.3, 0\.2\] sum to 1\.1, not 1;"
            r" give --weights 0\.545454545 0\.272727273 0\.181818182$",
        ),
        (
            {"weights": (0.6, 0.4)},
            r"weights: must be one for each of the 3 inputs \(got \[0\.6, 0\.4\]",
        ),
        ({"weights": (0.6, 0.6, -0.2)}, r"weights: .* positive numbers"),
        ({"weights": (1.0, 0.0, 0.0)}, r"weights: .* positive numbers"),
        ({"weights": (0.5, 0.5, float("nan"))}, r"weights: .* positive numbers"),
        ({"weights": (0.5, 0.5, float("inf"))}, r"weights: .* positive numbers"),
        ({"max_tokens": 0}, r"max_tokens: must be >= 1 \(got 0\)"),
    ],
)
def test_impossible_mixtures_are_refused(config, change, message):
    with pytest.raises(ConfigError, match=message):
        replace(config, **change)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20))
def test_the_weights_given_to_paste_are_taken(values):
    inputs = tuple(map(str, range(len(values))))
    try:
        PrepareConfig(inputs=inputs, out=Path("out"), weights=tuple(values))
    except ConfigError as error:
        pasted = str(error).partition("--weights ")[2].split()
        PrepareConfig(inputs=inputs, out=Path("out"), weights=tuple(map(float, pasted)))


def test_a_source_of_a_mixture_that_has_no_text_is_named(config, tmp_path):
    config.inputs[2].write_text("")
    with pytest.raises(DataError, match=r"inputs: no text in .*2\.jsonl$"):
        prepare(config)
    with pytest.raises(
        DataError, match=r"inputs: .*0\.jsonl is also in held_out_inputs; remove it"
    ):
        prepare(replace(config, held_out_inputs=config.inputs[:1]))
    assert not config.out.exists()


def test_an_unfinished_mixture_goes_on_only_with_its_weights(config):
    assert killed_after_commit(2, config)
    with pytest.raises(ConfigError, match=r"weights: \[0\.6, 0\.2, .* but .* has \[0\.6, 0\.3"):
        prepare(replace(config, weights=(0.6, 0.2, 0.2)))
    with pytest.raises(ConfigError, match=r"max_tokens: 100, but .* has None"):
        prepare(replace(config, max_tokens=100))


def test_a_tokenizer_learns_from_each_source_by_its_weight(config, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules[prepare.__module__], "SAMPLE_CHARACTERS", 400)
    seen: list[str] = []
    train = sys.modules[prepare.__module__].train_tokenizer

    def watched(texts, *options):
        seen.extend(texts)
        return train(iter(seen), *options)

    monkeypatch.setattr(sys.modules[prepare.__module__], "train_tokenizer", watched)
    prepare(replace(config, tokenizer=None, vocab_size=260))
    letters = [sum(len(text) for text in seen if f"w{10 + n}" in text) for n in range(3)]
    assert letters == pytest.approx([240, 120, 40], abs=3)


@pytest.mark.parametrize("words", [2, 3, 4, 30])
def test_a_tiny_corpus_holds_out_two_tokens_or_says_that_it_does_not(
    tmp_path, tokenizer, caplog, words
):
    source = write(tmp_path / "a.jsonl", 1, [words - 1])
    made = prepare(PrepareConfig(inputs=(source,), out=tmp_path / "out", tokenizer=tokenizer))
    assert made.held_out_tokens == (2 if words >= 4 else 1)
    assert made.train_tokens == words - made.held_out_tokens
    said = [record.getMessage() for record in caplog.records]
    assert [("--held-out" in text) for text in said] == ([] if words >= 4 else [True])
