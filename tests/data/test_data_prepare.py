"""Preparing: every token in its place, the same bytes each time, whatever interrupts it."""

import errno
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from peptrain.cli.app import main
from peptrain.data import Corpus, PrepareConfig, prepare
from peptrain.data.documents import is_held_out
from peptrain.data.tokenizer import train_tokenizer
from peptrain.data.writer import Progress
from peptrain.errors import ConfigError, DataError

TOKENIZER = train_tokenizer(iter(["the cat sat on the mat. " * 5]), 265)
DOCUMENTS = [f"document {n} " + "the cat sat. " * (n % 7) for n in range(60)]


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package may catch it."""


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    TOKENIZER.save(str(path))
    return path


@pytest.fixture
def config(tmp_path, tokenizer) -> PrepareConfig:
    """60 documents, several shards, about 6 documents held out."""
    source = json_lines(tmp_path / "in.jsonl", DOCUMENTS)
    return PrepareConfig(
        inputs=(source,), out=tmp_path / "out", tokenizer=tokenizer, held_out=0.1, shard_tokens=200
    )


def json_lines(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def tokens(config: PrepareConfig) -> list[int]:
    """The training stream, read without `Corpus`."""
    index = json.loads((config.out / "index.json").read_text())
    shards = [np.fromfile(config.out / f["name"], index["dtype"]) for f in index["train"]]
    return np.concatenate(shards).tolist()


def expected(documents: list[str]) -> list[int]:
    end = TOKENIZER.token_to_id("<|endoftext|>")
    return [i for text in documents for i in [*TOKENIZER.encode(text).ids, end]]


@settings(max_examples=20, deadline=None)
@given(
    documents=st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=12),
    shard_tokens=st.integers(1, 50),
    batch=st.integers(1, 60),
)
def test_the_shards_hold_every_document_and_its_end_in_order(
    tmp_path_factory, tokenizer, documents, shard_tokens, batch
):
    folder = tmp_path_factory.mktemp("identity")
    config = PrepareConfig(
        inputs=(json_lines(folder / "in.jsonl", documents),),
        out=folder / "out",
        tokenizer=tokenizer,
        held_out=0,
        shard_tokens=shard_tokens,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[prepare.__module__], "BATCH_CHARACTERS", batch)
        made = prepare(config)
    end = TOKENIZER.token_to_id("<|endoftext|>")
    *ends, last = np.flatnonzero(np.array(tokens(config)) == end) + 1
    parts = [part[:-1] for part in np.split(tokens(config), ends)]
    assert last == len(tokens(config))
    assert [TOKENIZER.decode(ids.tolist(), skip_special_tokens=False) for ids in parts] == documents
    assert made.train_tokens == len(tokens(config)) and made.held_out_tokens == 0
    assert made.documents == len(documents)
    assert made.text_bytes == sum(len(text.encode()) for text in documents)


def test_counts_shards_and_progress(config):
    seen = []
    made = prepare(config, seen.append)
    assert made.documents == 60 and not made.resumed
    assert made.shards == len(list(config.out.glob("train-*.bin"))) > 3
    total = made.train_tokens + made.held_out_tokens
    assert made.bytes_per_token == made.text_bytes / total
    assert made.vocab_size == 265 and made.max_id == max(expected(DOCUMENTS))
    assert (seen[-1].documents, seen[-1].tokens) == (60, total)
    assert seen[-1].share == 1
    index = json.loads((config.out / "index.json").read_text())
    assert all(f["tokens"] >= config.shard_tokens for f in index["train"][:-1])


def test_the_held_out_documents_are_those_the_hash_chooses(config):
    prepare(config)
    chosen = [is_held_out(number, config.held_out) for number in range(60)]
    apart = [text for text, held in zip(DOCUMENTS, chosen, strict=True) if held]
    kept = [text for text, held in zip(DOCUMENTS, chosen, strict=True) if not held]
    assert apart and tokens(config) == expected(kept)
    assert Corpus.open(config.out).held_out().tolist() == expected(apart)


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5])
def test_the_hash_chooses_about_the_fraction(fraction):
    share = np.mean([is_held_out(number, fraction) for number in range(20_000)])
    assert abs(share - fraction) < 4 * (fraction * (1 - fraction) / 20_000) ** 0.5


@pytest.mark.parametrize("shard_tokens", [1, 10_000])
def test_held_out_files_are_not_trained_on_though_named_twice(config, tmp_path, shard_tokens):
    apart = json_lines(tmp_path / "valid.jsonl", ["held out"])
    config = replace(config, inputs=(tmp_path,), held_out_inputs=(apart,))
    config = replace(config, shard_tokens=shard_tokens)
    prepare(config)
    assert tokens(config) == expected(DOCUMENTS)
    assert Corpus.open(config.out).held_out().tolist() == expected(["held out"])
    with pytest.raises(DataError, match="no file is left to train on"):
        prepare(replace(config, inputs=(apart,), out=tmp_path / "other"))


@pytest.mark.parametrize("shard_tokens", [10, 10_000])
def test_of_a_single_document_the_tail_is_held_out(config, tmp_path, shard_tokens):
    (tmp_path / "a.txt").write_text("the cat sat on the mat.\n" * 50)
    inputs = (tmp_path / "a.txt",)
    config = replace(config, inputs=inputs, held_out=0.4, shard_tokens=shard_tokens)
    made = prepare(config)
    stream = expected(["the cat sat on the mat.\n" * 50])
    assert made.held_out_tokens == int(0.4 * len(stream))
    assert tokens(config) + Corpus.open(config.out).held_out().tolist() == stream


def test_nothing_need_be_held_out_but_something_is_always_left(config, tmp_path):
    assert prepare(replace(config, held_out=0)).held_out_tokens == 0
    assert len(Corpus.open(config.out).held_out()) == 0
    nearly_all = replace(config, held_out=0.999, out=tmp_path / "nearly-all")
    assert prepare(nearly_all).train_tokens > 0
    assert tokens(nearly_all)[:20] == expected(DOCUMENTS[:1])[:20]


def test_preparing_again_gives_the_same_bytes(config, tmp_path):
    config = replace(config, tokenizer=None, vocab_size=280)
    prepare(config)
    prepare(replace(config, out=tmp_path / "again"))
    assert content(config.out) == content(tmp_path / "again")


def strike_disk_operation(number: int, error: BaseException, patch: pytest.MonkeyPatch) -> None:
    """Let the disk operation of that number fail with `error`."""
    calls = iter(range(10**9))

    def struck(real):
        def call(*args):
            if next(calls) == number:
                raise error
            return real(*args)

        return call

    for name in ("fsync", "replace", "truncate", "unlink"):
        patch.setattr(os, name, struck(getattr(os, name)))


def held_out_by_hash(config: PrepareConfig, patch: pytest.MonkeyPatch) -> PrepareConfig:
    return replace(config, shard_tokens=400)


def held_out_files(config: PrepareConfig, patch: pytest.MonkeyPatch) -> PrepareConfig:
    apart = json_lines(config.out.with_name("valid.jsonl"), DOCUMENTS[:20])
    return replace(config, held_out_inputs=(apart,), shard_tokens=400)


def held_out_tail(config: PrepareConfig, patch: pytest.MonkeyPatch) -> PrepareConfig:
    patch.setattr("peptrain.data.documents.is_held_out", lambda number, fraction: False)
    few = json_lines(config.out.with_name("few.jsonl"), DOCUMENTS[:9])
    return replace(config, inputs=(few,), held_out=0.3, shard_tokens=30)


def trained_tokenizer(config: PrepareConfig, patch: pytest.MonkeyPatch) -> PrepareConfig:
    return replace(config, tokenizer=None, vocab_size=270)


@pytest.mark.parametrize(
    "case", [held_out_by_hash, held_out_files, held_out_tail, trained_tokenizer]
)
def test_killed_anywhere_the_same_command_ends_with_the_same_bytes(config, monkeypatch, case):
    config = case(config, monkeypatch)
    shards = prepare(config).shards
    resumed = 0
    for number in range(1000):
        struck = replace(config, out=config.out.with_name(f"struck-{number}"))
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            strike_disk_operation(number, Killed(), patch)
            prepare(struck)
        if (struck.out / "index.json").exists():
            break  # only the journal was left to delete
        resumed += prepare(struck).resumed
        assert content(struck.out) == content(config.out)
    assert resumed >= 3 * shards  # a shard, the held-out file, the journal


def test_killed_in_every_call_it_still_ends(config, tmp_path):
    prepare(config)
    struck = replace(config, out=tmp_path / "struck")
    for _ in range(100):
        try:
            with pytest.MonkeyPatch.context() as patch:
                strike_disk_operation(6, Killed(), patch)
                prepare(struck)
        except Killed:
            continue
        break
    assert content(struck.out) == content(config.out)


def interrupted(config: PrepareConfig) -> PrepareConfig:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        strike_disk_operation(30, Killed(), patch)
        prepare(config)
    return config


@pytest.mark.parametrize("content", ["", "null", "[]", "{}", "[" * 100_000, '{"taken": 3}'])
def test_a_damaged_journal_is_named(config, content):
    (interrupted(config).out / "journal.json").write_text(content)
    with pytest.raises(DataError, match=r"journal\.json: damaged .*; delete .* prepare it again"):
        prepare(config)


def test_a_journal_with_another_number_is_named(config):
    path = interrupted(config).out / "journal.json"
    count = str(json.loads(path.read_text())["shards"][-1])
    path.write_text(path.read_text().replace(count, str(int(count) + 1)))
    with pytest.raises(DataError, match=r"journal\.json: damaged \(its content differs"):
        prepare(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_tokens": 300}, r"shard_tokens: 300, but the unfinished preparation .* has 200;"),
        (
            {"held_out": 0.2},
            r"held_out: 0\.2, but .* has 0\.1; use the same settings to resume it, or",
        ),
        ({"tokenizer": None}, r"tokenizer: None, but"),
        ({"eos_token": "the"}, r"eos_token: 'the', but .* has None"),
    ],
)
def test_an_unfinished_preparation_goes_on_only_with_its_settings(config, change, message):
    interrupted(config)
    with pytest.raises(ConfigError, match=message):
        prepare(replace(config, **change))


def test_an_unfinished_preparation_goes_on_only_with_its_inputs(config):
    interrupted(config)
    json_lines(config.inputs[0], [*DOCUMENTS, "one more"])
    with pytest.raises(ConfigError, match=r"inputs: '1 files, \d+ bytes, .*', but .* has '1 files"):
        prepare(config)


@pytest.mark.parametrize("name", ["train-00000.bin", "held-out.bin"])
def test_files_lost_between_two_calls_are_named(config, name):
    interrupted(config)
    (config.out / name).unlink()
    with pytest.raises(DataError, match=rf"{name}: changed since it was written; delete"):
        prepare(config)


@pytest.mark.parametrize("name", ["train-00000.bin", "held-out.bin", "tokenizer.json"])
def test_files_changed_between_two_calls_are_named(config, name):
    """The index would have the checksums of the damaged files."""
    interrupted(config)
    whole = (config.out / name).read_bytes()
    changed = whole + b" " if name == "tokenizer.json" else bytes([whole[0] ^ 1]) + whole[1:]
    (config.out / name).write_bytes(changed)
    with pytest.raises(DataError, match=rf"{name}: changed since it was written; delete"):
        prepare(config)
    (config.out / name).write_bytes(whole)
    assert prepare(config).resumed


def test_a_preparation_that_0_1_0_began_is_resumed(config, tmp_path):
    """Its journal has no checksums. Twice, since the first call adds them."""
    prepare(config)
    begun = interrupted(replace(config, out=tmp_path / "begun"))
    journal = begun.out / "journal.json"
    found = json.loads(journal.read_text())
    del found["sums"], found["settings"]["checksum"]
    journal.write_text(json.dumps(found))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        strike_disk_operation(12, Killed(), patch)
        prepare(begun)
    assert json.loads(journal.read_text())["sums"].keys() > {"tokenizer.json", "train-00000.bin"}
    assert prepare(begun).resumed
    assert content(begun.out) == content(config.out)


def test_replacing_a_late_bad_byte_goes_on_from_the_finished_shards(config):
    with config.inputs[0].open("ab") as file:
        file.write(b'{"text": "\xff"}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[prepare.__module__], "BATCH_CHARACTERS", 100)
        with pytest.raises(DataError, match="--on-bad-utf8 replace"):
            prepare(config)
    assert prepare(replace(config, on_bad_utf8="replace")).resumed
    assert tokens(config)[-2:] == expected(["\ufffd"])[-2:]


def test_a_full_disk_says_how_to_go_on(config, tmp_path):
    prepare(config)
    struck = replace(config, out=tmp_path / "struck")
    with pytest.MonkeyPatch.context() as patch:
        strike_disk_operation(18, OSError(errno.ENOSPC, "No space left on device"), patch)
        with pytest.raises(DataError, match=r"struck: the disk is full; .* same command again"):
            prepare(struck)
    assert prepare(struck).resumed
    assert content(struck.out) == content(config.out)


def test_only_a_new_or_empty_directory_is_written_to(config, tmp_path):
    config.out.mkdir()
    prepare(config)
    before = content(config.out)
    with pytest.raises(ConfigError, match=r"out: .*, not a finished corpus \(got .*out.*\)"):
        prepare(config)
    assert content(config.out) == before
    with pytest.raises(ConfigError, match=r"directory, not a file"):
        prepare(replace(config, out=config.inputs[0]))
    with pytest.raises(ConfigError, match=r"but it contains \['in\.jsonl'\]"):
        prepare(replace(config, out=tmp_path))


def test_an_empty_corpus_and_a_wrong_field_leave_nothing_behind(config, tmp_path):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"inputs: no text in .*empty\.txt"):
        prepare(replace(config, inputs=(tmp_path / "empty.txt",), held_out_inputs=config.inputs))
    with pytest.raises(DataError, match=r"in\.jsonl:1: no field 'body'"):
        prepare(replace(config, text_field="body"))
    with pytest.raises(ConfigError, match=r"eos_token: '</s>' is not in"):
        prepare(replace(config, eos_token="</s>"))
    assert not config.out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 300}, r"vocab_size: .*got 300.* tokenizer: .* is given; give one of"),
        (
            {"tokenizer": None, "vocab_size": 256},
            r"vocab_size: .* between 257 and 16777216 .*got 256",
        ),
        ({"tokenizer": None, "vocab_size": 1 << 25}, r"vocab_size: .* 16777216 \(got 33554432"),
        ({"held_out": 1.0}, r"held_out: must be in \[0, 1\) \(got 1\.0"),
        ({"shard_tokens": 0}, r"shard_tokens: must be >= 1 \(got 0"),
        ({"inputs": ()}, r"inputs: .* \(got \(\)\)"),
    ],
)
def test_impossible_settings_are_refused(config, change, message):
    with pytest.raises(ConfigError, match=message):
        replace(config, **change)


@pytest.mark.parametrize(("size", "bytes_each"), [(65_536, 2), (65_537, 4)])
def test_ids_take_four_bytes_where_two_are_too_few(tmp_path, size, bytes_each):
    words = {f"w{number}": number for number in range(size - 1)} | {"</s>": size - 1}
    tokenizer = Tokenizer(models.WordLevel(words, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text(f"w7 w{size - 2}")
    made = prepare(
        PrepareConfig(
            inputs=(tmp_path / "a.txt",), out=tmp_path / "out", tokenizer=tmp_path, held_out=0
        )
    )
    assert (made.vocab_size, made.max_id) == (size, size - 1)
    assert (tmp_path / "out" / "train-00000.bin").stat().st_size == 3 * bytes_each
    row = Corpus.open(made.path).batch(seed=0, step=0, rank=0, world=1, batch_size=1, seq_len=2)
    assert row.tolist() == [[7, size - 2, size - 1]]


def test_a_trained_tokenizer_takes_the_named_end_token(config):
    prepare(replace(config, tokenizer=None, vocab_size=300, eos_token="<end>"))
    corpus = Corpus.open(config.out)
    trained = Tokenizer.from_file(str(corpus.tokenizer_file))
    assert trained.id_to_token(corpus.eos_id) == "<end>"


def test_a_preparation_is_not_resumed_through_a_link(tmp_path):
    """Which resuming would truncate, or append to."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    Progress.open(out, {}, 1)
    elsewhere.write_text("precious")
    (out / "train-00000.bin").symlink_to(elsewhere)
    with pytest.raises(ConfigError, match=r"^out: must be a file in --out, .*train-00000\.bin"):
        Progress.open(out, {}, 1)
    assert elsewhere.read_text() == "precious"


@pytest.mark.parametrize(
    "name", ["journal.json.tmp", ".journal.json.0123456789abcdef.peptrain-tmp"]
)
def test_what_a_kill_left_before_the_first_progress_is_no_obstacle(tmp_path, name):
    (tmp_path / name).touch()
    Progress.open(tmp_path, {}, 1)
    assert (tmp_path / "journal.json").exists()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("exists", [False, True])
def test_an_output_that_can_not_be_written_is_one_line(
    code: int, exists: bool, config: PrepareConfig, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Patched, because root may write everywhere."""
    if exists:
        config.out.mkdir()
    opened, made = os.open, os.mkdir

    def refused(function: Any) -> Any:
        def call(path: Any, *rest: Any, **more: Any) -> Any:
            if Path(path).is_relative_to(config.out) and rest[:1] != (os.O_RDONLY,):
                raise OSError(code, os.strerror(code), str(path))
            return function(path, *rest, **more)

        return call

    monkeypatch.setattr(os, "open", refused(opened))
    monkeypatch.setattr(os, "mkdir", refused(made))
    command = ["data", "prepare", str(config.inputs[0]), f"--out={config.out}"]
    assert main([*command, f"--tokenizer={config.tokenizer}"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: out: {config.out}: [Errno {code}] {os.strerror(code)}")
    assert said.endswith("; fix this, or give another directory\n") and said.count("\n") == 1


def test_inputs_may_begin_at_home(
    config: PrepareConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell expands `~` only at the beginning of a word, so not after `--held-out-inputs=`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    json_lines(tmp_path / "apart.jsonl", DOCUMENTS)
    command = f"data prepare ~/in.jsonl --held-out-inputs=~/apart.jsonl --out={config.out}"
    assert main([*command.split(), f"--tokenizer={config.tokenizer}"]) == 0
    assert json.loads((config.out / "index.json").read_text())["held_out_documents"] == len(
        DOCUMENTS
    )
    with pytest.raises(ConfigError, match="held_out_inputs: '~nobody-at-all/x': "):
        prepare(replace(config, held_out_inputs=("~nobody-at-all/x",)))
