"""Batches: a pure function of seed, step and rank, over windows that tile the token stream."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from peptrain.data import Corpus, PrepareConfig, prepare
from peptrain.data.index import read_checked, write_checked
from peptrain.errors import ConfigError, DataError

WORDS = 400


def make(folder: Path, documents: int = 40, **options) -> Path:
    """A corpus in which every id but the end token occurs once, so that each window is unique."""
    words = {f"w{number}": number for number in range(WORDS)} | {"</s>": WORDS}
    tokenizer = Tokenizer(models.WordLevel(words, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    each = WORDS // documents
    lines = [" ".join(f"w{each * d + n}" for n in range(each)) for d in range(documents)]
    source = folder / "in.jsonl"
    source.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    options = {"held_out": 0.1, "shard_tokens": 50, **options}
    return prepare(
        PrepareConfig(inputs=(source,), out=folder / "out", tokenizer=folder, **options)
    ).path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    """About 400 training tokens in 8 shards."""
    return Corpus.open(make(tmp_path_factory.mktemp("corpus")))


@pytest.fixture
def damaged(tmp_path) -> Path:
    """The directory of a corpus of its own, to damage."""
    return make(tmp_path)


def stream(corpus: Corpus) -> list[int]:
    shards = sorted(corpus.path.glob("train-*.bin"))
    return np.concatenate([np.fromfile(shard, "<u2") for shard in shards]).tolist()


def batch(corpus: Corpus, step: int = 0, *, seed=0, rank=0, world=1, batch_size=6, seq_len=16):
    return corpus.batch(
        seed=seed, step=step, rank=rank, world=world, batch_size=batch_size, seq_len=seq_len
    )


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    seq_len=st.integers(1, 200),
    batch_size=st.integers(1, 9),
    epoch=st.integers(0, 3),
)
def test_each_epoch_visits_each_window_exactly_once(corpus, seed, seq_len, batch_size, epoch):
    tokens, windows = stream(corpus), corpus.windows(seq_len)
    first, last = epoch * windows, (epoch + 1) * windows
    rows = [
        row
        for step in range(first // batch_size, -(-last // batch_size))
        for row in batch(corpus, step, seed=seed, batch_size=batch_size, seq_len=seq_len).tolist()
    ]
    skipped = first % batch_size
    seen = rows[skipped : skipped + windows]
    tiles = [tokens[w * seq_len : w * seq_len + seq_len + 1] for w in range(windows)]
    assert sorted(seen) == sorted(tiles)


def test_windows_tile_the_stream_across_shard_borders(corpus):
    assert corpus.train_tokens == len(stream(corpus))
    longest = corpus.train_tokens - 1
    assert corpus.windows(longest) == 1
    assert batch(corpus, batch_size=1, seq_len=longest).tolist() == [stream(corpus)]


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_the_ranks_together_read_what_one_process_would(corpus, world):
    for step in (0, 3, 50):
        parts = [batch(corpus, step, rank=rank, world=world) for rank in range(world)]
        assert torch.equal(torch.cat(parts), batch(corpus, step))


def test_a_batch_depends_on_its_arguments_only(corpus):
    wanted = batch(corpus, 7)
    assert wanted.dtype == torch.int64 and wanted.shape == (6, 17)
    for step in (90, 0, 31):
        batch(corpus, step, seed=step)
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(batch(Corpus.open(corpus.path), 7), wanted)


def test_seeds_and_epochs_have_orders_of_their_own(corpus):
    windows = corpus.windows(16)
    orders = [
        batch(corpus, epoch, seed=seed, batch_size=windows).tolist()
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert all(a != b for n, a in enumerate(orders) for b in orders[:n])


def test_batches_that_cannot_be_are_refused(corpus):
    with pytest.raises(
        ConfigError, match=r"batch_size: .* 4 processes \(got 6\); .* multiple of 4"
    ):
        batch(corpus, world=4)
    total = corpus.train_tokens
    message = rf"seq_len: .*{total} training tokens .* {total} \+ 1; choose"
    with pytest.raises(DataError, match=message):
        corpus.windows(total)


def test_the_attributes_are_those_of_the_data(corpus):
    index = json.loads((corpus.path / "index.json").read_text())
    assert (corpus.vocab_size, corpus.max_id, corpus.eos_id) == (WORDS + 1, WORDS, WORDS)
    assert corpus.tokenizer_file == corpus.path / "tokenizer.json"
    held_out = np.fromfile(corpus.path / "held-out.bin", index["dtype"])
    assert corpus.held_out().tolist() == held_out.tolist() and len(held_out) > 0
    assert Corpus.open(str(corpus.path)).path == corpus.path


def test_the_fingerprint_is_that_of_the_content(corpus, tmp_path, damaged):
    shutil.copytree(corpus.path, tmp_path / "copy")
    assert Corpus.open(tmp_path / "copy").fingerprint == corpus.fingerprint
    shutil.rmtree(damaged)
    assert Corpus.open(make(tmp_path, shard_tokens=60)).fingerprint != corpus.fingerprint
    assert len(corpus.fingerprint) == 16


@pytest.mark.parametrize("name", ["train-00002.bin", "held-out.bin"])
@pytest.mark.parametrize("length", [None, 0, 11])
def test_a_truncated_or_missing_file_is_named(damaged, name, length):
    path = damaged / name
    path.unlink() if length is None else path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=rf"{name}: truncated or missing \({length or 0} bytes"):
        Corpus.open(damaged)


@pytest.mark.parametrize("length", [None, 0, -1])
def test_a_tokenizer_that_is_missing_or_another_is_named(damaged, length):
    path = damaged / "tokenizer.json"
    path.unlink() if length is None else path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(DataError, match=r"tokenizer\.json: missing, or not the tokenizer of this"):
        Corpus.open(damaged)


def flip(path: Path, place: int = 5) -> None:
    """Change one bit without changing size or time."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def rewrite(directory: Path, **changed) -> None:
    """An index that someone else wrote, with a checksum that is right."""
    index = read_checked(directory / "index.json")
    write_checked(directory / "index.json", index | changed)


REPAIR = r"; delete .* and prepare it again with `peptrain data prepare`$"


def test_damage_in_any_file_is_named_at_the_next_open(damaged):
    for name in ("train-00002.bin", "held-out.bin", "index.json"):
        content = (damaged / name).read_bytes()
        flip(damaged / name, content.find(b'"eos_id": ') + 10 if name == "index.json" else 5)
        with pytest.raises(DataError, match=rf"{name}: damaged.*{REPAIR}"):
            Corpus.open(damaged)
        (damaged / name).write_bytes(content)
    Corpus.open(damaged)


def test_shards_are_verified_once_and_again_on_request_or_after_a_change(damaged, monkeypatch):
    hashed = []
    monkeypatch.setattr(
        "peptrain.data.verify.verify", lambda path, sha256: hashed.append(path.name)
    )
    Corpus.open(damaged)
    shards, hashed[:] = sorted(hashed), []
    assert shards == sorted(path.name for path in damaged.glob("train-*"))
    monkeypatch.chdir(damaged.parent)
    Corpus.open(Path(damaged.name))
    assert not hashed
    Corpus.open(damaged, verify_again=True)
    assert sorted(hashed) == shards
    hashed.clear()
    os.utime(damaged / "train-00001.bin", (1, 1))
    Corpus.open(damaged)
    assert sorted(hashed) == shards


def test_a_failed_verification_is_not_forgotten(damaged):
    Corpus.open(damaged)
    flip(damaged / "train-00000.bin")
    for again in (True, False):
        with pytest.raises(DataError, match=r"train-00000\.bin: damaged"):
            Corpus.open(damaged, verify_again=again)


def test_without_a_writable_cache_shards_are_verified_each_time(damaged, monkeypatch):
    monkeypatch.setenv("PEPTRAIN_CACHE", str(damaged / "index.json"))
    Corpus.open(damaged)
    flip(damaged / "train-00000.bin")
    with pytest.raises(DataError, match=r"train-00000\.bin: damaged"):
        Corpus.open(damaged)


def test_a_cache_without_room_for_a_stamp_is_no_cache(damaged, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("PEPTRAIN_CACHE", str(damaged.parent / "cache"))
    monkeypatch.setattr(Path, "touch", full)
    Corpus.open(damaged)
    flip(damaged / "train-00000.bin")
    with pytest.raises(DataError, match=r"train-00000\.bin: damaged"):
        Corpus.open(damaged)


def test_an_id_that_never_occurred_names_the_shard(damaged):
    """Someone may damage a corpus after it was opened."""
    corpus = Corpus.open(damaged)
    for name in ("train-00002.bin", "held-out.bin"):
        ids = np.memmap(damaged / name, "<u2", "r+")
        ids[-1] = WORDS + 1
        ids.flush()
    with pytest.raises(DataError, match=rf"train-00002\.bin: damaged: it contains id {WORDS + 1}"):
        batch(corpus, batch_size=corpus.windows(16))
    with pytest.raises(DataError, match=r"held-out\.bin: damaged"):
        corpus.held_out()


def test_what_is_no_finished_corpus_says_how_to_make_one(tmp_path, damaged):
    for path in (tmp_path / "nowhere", tmp_path, damaged / "index.json"):
        with pytest.raises(DataError, match=r"not a prepared corpus .*peptrain data prepare"):
            Corpus.open(path)
    (damaged / "index.json").rename(damaged / "journal.json")
    with pytest.raises(DataError, match=r"its preparation was interrupted; run the same command"):
        Corpus.open(damaged)


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", "null", '{"format": 1}', '{"format": 1, "train": [3]}', "\xff"),
        *("[" * 100_000, f'{{"format": {"9" * 5000}}}', '{"settings": 3}'),
    ],
)
def test_a_damaged_index_is_named(damaged, content):
    (damaged / "index.json").write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=rf"index\.json: damaged .*{REPAIR}"):
        Corpus.open(damaged)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("dtype", value) for value in ("<f2", ">u2", "<i4", "u1", 3, None, ["<u2"])],
        *[("vocab_size", value) for value in (0, -1, "401", 401.0, 1 << 40, None, True, [])],
        *[("eos_id", value) for value in (-1, WORDS + 1, "0")],
        *[("max_id", value) for value in (-1, WORDS + 1, 1e300)],
        *[("documents", value) for value in (-1, "40", {})],
        *[("held_out_documents", value) for value in (-1, 41)],
        *[("tokenizer_sha256", value) for value in (3, "", "x" * 64)],
        *[("train", value) for value in ("", {}, None, 3, [])],
        *[("settings", []), ("sources", 3), ("text_bytes", None), ("unknown", 1)],
        *[("held_out", value) for value in (None, [], {}, {"name": "held-out.bin"})],
    ],
)
def test_each_value_of_an_index_is_checked(damaged, key, value):
    if key == "settings":
        (damaged / "index.json").write_text(json.dumps(index_of(damaged) | {key: value}))
    else:
        rewrite(damaged, **{key: value})
    with pytest.raises(DataError, match=rf"index\.json: damaged .*{REPAIR}") as caught:
        Corpus.open(damaged)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("name", name) for name in ("/etc/hostname", "../in.jsonl", "tokenizer.json", "", "\0")],
        *[("name", name) for name in ("train-00001.bin", "./train-00000.bin", 3, None, [])],
        *[("tokens", tokens) for tokens in (-1, "3", 50.0, True, 1 << 70)],
        *[("sha256", digest) for digest in (None, "", "0" * 63, "A" * 64, 3)],
    ],
)
def test_each_value_of_a_file_is_checked(damaged, key, value):
    first, *others = index_of(damaged)["train"]
    rewrite(damaged, train=[first | {key: value}, *others])
    with pytest.raises(DataError, match=rf"index\.json: damaged .*{REPAIR}"):
        Corpus.open(damaged)


@pytest.mark.parametrize("name", ["index.json", "tokenizer.json", "train-00000.bin"])
def test_a_link_out_of_a_corpus_is_not_followed(damaged, name):
    (damaged / name).rename(damaged.parent / "elsewhere")
    (damaged / name).symlink_to(damaged.parent / "elsewhere")
    with pytest.raises(DataError, match=rf"{name}: links to a file outside the corpus; copy"):
        Corpus.open(damaged)


@pytest.mark.parametrize("name", ["index.json", "tokenizer.json", "train-00000.bin"])
def test_a_directory_in_the_place_of_a_file_is_named(damaged, name):
    (damaged / name).unlink()
    (damaged / name).mkdir()
    with pytest.raises(DataError, match=name):
        Corpus.open(damaged)


def index_of(directory: Path) -> dict:
    return json.loads((directory / "index.json").read_text())


@pytest.mark.parametrize("name", ["index.json", "train-00000.bin", "held-out.bin"])
def test_a_file_that_may_not_be_read_is_not_to_be_deleted(damaged, name, monkeypatch):
    """Root may read everything, so the answer of the system is replaced."""
    (damaged / name).write_bytes(b"")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != name)
    said = rf"{name}: can't be read: permission denied; change its permissions$"
    with pytest.raises(DataError, match=said):
        Corpus.open(damaged)


def test_an_index_without_a_checksum_is_read(damaged):
    """0.1.0 wrote none."""
    index = index_of(damaged)
    del index["settings"]["checksum"]
    (damaged / "index.json").write_text(json.dumps(index))
    assert Corpus.open(damaged).vocab_size == WORDS + 1


def test_an_index_of_another_format_is_refused(damaged):
    rewrite(damaged, format=99)
    with pytest.raises(DataError, match=r"prepared in format 99, but this version reads format 1"):
        Corpus.open(damaged)
