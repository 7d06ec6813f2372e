"""What can't be prepared, or resumed: named, skipped where asked to, and never half taken."""

import json
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from peptrain.cli.app import main
from peptrain.data import PrepareConfig, prepare
from peptrain.data.tokenizer import train_tokenizer
from peptrain.data.writer import Writer
from peptrain.errors import ConfigError, DataError, PeptrainError

DOCUMENTS = [f"document {n} " + "the cat sat. " * (n % 7) for n in range(40)]
BAD = ('{"text": ', '{"body": "x"}', '{"text": 3}', "\xff", "[]")


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(iter(["the cat sat on the mat. " * 5]), 265).save(str(path))
    return path


def lines(texts: list[str]) -> list[bytes]:
    return [json.dumps({"text": text}).encode() for text in texts]


@pytest.fixture
def config(tmp_path, tokenizer, monkeypatch) -> PrepareConfig:
    """40 documents in two files, five bad lines between them and at the end, several shards."""
    monkeypatch.setattr(sys.modules[prepare.__module__], "BATCH_CHARACTERS", 100)
    bad = [line.encode("latin-1") for line in BAD]
    content = lines(DOCUMENTS)
    (tmp_path / "in").mkdir()
    first, second = [*content[:15], *bad[:2], *content[15:20]], [*content[20:], *bad[2:]]
    (tmp_path / "in" / "a.jsonl").write_bytes(b"\n".join(first))
    (tmp_path / "in" / "b.jsonl").write_bytes(b"\n".join(second))
    return PrepareConfig(
        inputs=(tmp_path / "in",),
        out=tmp_path / "out",
        tokenizer=tokenizer,
        held_out=0.1,
        shard_tokens=100,
        skip_bad=True,
    )


@pytest.fixture
def good(config, tmp_path) -> dict[str, bytes]:
    """The files of the corpus of the good documents alone."""
    (tmp_path / "good").mkdir()
    for name, part in (("a", DOCUMENTS[:20]), ("b", DOCUMENTS[20:])):
        (tmp_path / "good" / f"{name}.jsonl").write_bytes(b"\n".join(lines(part)))
    out = tmp_path / "expected"
    prepare(replace(config, inputs=(tmp_path / "good",), out=out, skip_bad=False))
    return tokens(out)


def tokens(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.bin")}


@contextmanager
def killed_after(commits: int) -> Iterator[None]:
    """Let the process die after that number of commits."""
    left, commit = iter(range(commits)), Writer.commit

    def struck(self: Writer) -> None:
        commit(self)
        if next(left, None) is None:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Writer, "commit", struck)
        yield


def test_bad_records_are_skipped_counted_and_the_first_is_named(config, good, caplog):
    made = prepare(config)
    assert tokens(config.out) == good
    assert (made.documents, made.skipped) == (40, 5)
    (said,) = [message for message in caplog.messages if "skip_bad" in message]
    assert "a.jsonl:16: not JSON (Expecting value)" in said
    index = json.loads((config.out / "index.json").read_text())
    assert index["sources"][0]["skipped"] == 5 and index["settings"]["skip_bad"]


@pytest.mark.parametrize("commits", range(6))
def test_a_resumed_preparation_skips_and_counts_the_same(config, good, commits):
    with killed_after(commits):
        prepare(config)
    made = prepare(config)
    assert made.resumed and made.skipped == 5
    assert tokens(config.out) == good


def test_skipping_may_be_added_after_an_error_but_not_taken_back(config, good, tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl:16: not JSON .*--skip-bad"):
        prepare(replace(config, skip_bad=False))
    with killed_after(5):
        prepare(config)
    with pytest.raises(ConfigError, match=r"^skip_bad: False, but the unfinished .* has True;"):
        prepare(replace(config, skip_bad=False))
    with pytest.raises(ConfigError, match=r"^on_bad_utf8: 'replace', but .* has 'error'"):
        prepare(replace(config, on_bad_utf8="replace"))
    made = prepare(config)
    assert made.resumed and made.skipped == 5
    assert tokens(config.out) == good


def test_a_mixture_skips_too(config, tmp_path):
    (tmp_path / "c.jsonl").write_bytes(b"\n".join([b"{}", *lines(DOCUMENTS), b"}"]))
    inputs = (*config.inputs, tmp_path / "c.jsonl")
    made = prepare(replace(config, inputs=inputs, weights=(0.5, 0.5)))
    assert made.skipped in (6, 7) and made.documents >= 78


def test_an_input_of_bad_records_only_is_an_error_with_the_first(config, tmp_path):
    (tmp_path / "c.jsonl").write_text("{}\n3\n")
    with pytest.raises(DataError, match=r"no text in .*c\.jsonl; .*c\.jsonl:1: no field 'text'"):
        prepare(replace(config, inputs=(tmp_path / "c.jsonl",)))


def test_the_command_says_how_many_it_skipped(config, capsys):
    args = ["--tokenizer", str(config.tokenizer), "--held-out", "0.2", "--skip-bad"]
    assert main(["data", "prepare", str(config.inputs[0]), "--out", str(config.out), *args]) == 0
    assert "1 shard, 5 bad records skipped" in capsys.readouterr().out


DAMAGES = {
    "deleted": None,
    "empty": b"",
    "random": np.random.default_rng(0).bytes(500),
    "brackets": b"[" * 100_000,
    "integer": b'{"settings": ' + b"9" * 5000 + b"}",
    **{text: text.encode() for text in ("null", "[]", "{}", '{"taken": 3}', '{"taken": [null]}')},
}


@pytest.mark.parametrize("damage", [*DAMAGES, "half", "directory"])
def test_a_damaged_journal_is_named_and_nothing_else_prepared(config, damage, capsys):
    with killed_after(2):
        prepare(config)
    journal, before = config.out / "journal.json", tokens(config.out)
    content = DAMAGES.get(damage) if damage != "half" else journal.read_bytes()[:200]
    journal.unlink()
    if damage == "directory":
        journal.mkdir()
    elif content is not None:
        journal.write_bytes(content)
    with pytest.raises(PeptrainError, match=r"journal\.json.*; delete (it|/\S+) (to start|and)"):
        prepare(config)
    assert tokens(config.out) == before


def test_a_tokenizer_that_changed_meanwhile_is_named(config, tmp_path):
    """Its ids would not be those in the finished shards."""
    with killed_after(2):
        prepare(config)
    train_tokenizer(iter(["other words entirely"]), 265).save(str(config.out / "tokenizer.json"))
    with pytest.raises(DataError, match=r"out/tokenizer\.json: changed since it was written"):
        prepare(config)


FIELDS = (
    *("settings", "taken", "held_out_documents", "held_out_tokens", "shards", "more"),
    *("taken.position", "taken.inside", "taken.documents", "taken.skipped", "taken.more"),
)
VALID = (("shards", []), ("shards", [7, 0]), ("inside", True), ("position", None))
WRONG = (None, "x", -1, 10**30, 1.5, True, [], {}, [0, "x"], [7, 0], [None])


@pytest.mark.parametrize("key", FIELDS)
def test_a_wrong_value_in_a_journal_without_checksum_is_named(config, key):
    """Journals of 0.1.0 have none."""
    with killed_after(2):
        prepare(config)
    path, before = config.out / "journal.json", tokens(config.out)
    whole = path.read_text()
    for value in WRONG:
        content = json.loads(whole)
        del content["settings"]["checksum"]
        place = content["taken"][0] if "taken." in key else content
        name = key.removeprefix("taken.")
        if (name, value) in VALID:
            continue  # of the right type; what then doesn't fit the files is named at the end
        place[name] = value
        path.write_text(json.dumps(content))
        with pytest.raises(PeptrainError, match=r"(journal\.json: damaged|journal is damaged)"):
            prepare(config)
        assert tokens(config.out) == before


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let writing past `size` bytes fail, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("room", ["nothing", "a shard", "a journal"])
def test_a_full_disk_is_one_line_and_resumed_from(config, good, room):
    size = 0 if room == "nothing" else 100
    if size:
        with killed_after(1):
            prepare(config)
    if room == "a journal":
        size = (config.out / "journal.json").stat().st_size
    with file_size_limit(size), pytest.raises(DataError, match=r"^out: .* large: '.*; f.*ix this"):
        prepare(config)
    prepare(config)
    assert tokens(config.out) == good


@pytest.mark.parametrize("name", ["file", "file/below", "pipe", "nowhere-link"])
def test_an_impossible_output_directory_is_named(config, tmp_path, name):
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nowhere-link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(PeptrainError, match=r"^out: "):
        prepare(replace(config, out=tmp_path / name))


@pytest.mark.parametrize("change", [{"inputs": ("",)}, {"eos_token": ""}, {"eos_token": "\udcff"}])
def test_names_that_a_shell_left_empty_or_garbled_are_refused(config, change):
    with pytest.raises(ConfigError, match=f"^{next(iter(change))}: must be "):
        replace(config, **change)
