"""Streamed and saved datasets: what breaks goes on where it was, and what can't be is named.

No test needs a network: streams are made of local rows behind the functions that would reach it.
"""

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from support import killed_after_commit

from peptrain.data import Corpus, PrepareConfig, prepare
from peptrain.data.index import Index
from peptrain.data.sources import hub as huggingface
from peptrain.data.sources.hub import HubStream, SavedDataset, parse
from peptrain.data.tokenizer import train_tokenizer
from peptrain.errors import ConfigError, DataError

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
TEXTS = [f"document {n} " + "the cat sat. " * (n % 7) for n in range(60)]
ROWS = [{"id": n, "text": text} for n, text in enumerate(TEXTS)]
COMMIT = "c0ffee"
LOAD = datasets.load_dataset


class Hub:
    """A hub of one dataset that breaks when it is told to, and counts the rows it gives."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.stream = lambda: datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=4)
        self.asked: list[tuple[Any, ...]] = []
        self.breaks: list[int] = []
        """After so many more rows, the connection breaks; and again, for each number."""
        self.given = 0
        self.commit = COMMIT

    def dataset_info(self, repository: str, revision: str | None) -> Any:
        return SimpleNamespace(sha=revision or self.commit)

    def load_dataset(
        self, path: str, name: str | None, *, split: str, revision: str, streaming: bool
    ) -> Any:
        self.asked.append((path, name, split, revision, streaming))
        stream = self.stream()
        iterate = type(stream).__iter__

        class Breaking(type(stream)):  # type: ignore[misc]
            def __iter__(breaking) -> Any:
                for row in iterate(breaking):
                    if self.breaks and not self.breaks[0]:
                        self.breaks.pop(0)
                        raise ConnectionError("reset by peer")
                    if self.breaks:
                        self.breaks[0] -= 1
                    self.given += 1
                    yield row

        stream.__class__ = Breaking
        return stream


@pytest.fixture
def hub(monkeypatch) -> Hub:
    made = Hub(ROWS)
    monkeypatch.setattr(datasets, "load_dataset", made.load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", made.dataset_info)
    return made


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The waits that weren't waited."""
    waited: list[float] = []
    monkeypatch.setattr(huggingface, "sleep", waited.append)
    return waited


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_tokenizer(iter(["the cat sat on the mat. " * 5]), 265).save(str(path))
    return path


@pytest.fixture
def config(tmp_path, tokenizer) -> PrepareConfig:
    inputs = ("hf:some/texts:en",)
    return PrepareConfig(
        inputs=inputs, out=tmp_path / "out", tokenizer=tokenizer, held_out=0.1, shard_tokens=200
    )


@pytest.fixture
def by_file(config, tmp_path) -> PrepareConfig:
    """The same text from a file."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return replace(config, inputs=(source,), out=tmp_path / "by-file")


def tokens(config: PrepareConfig) -> dict[str, bytes]:
    """The corpus without its index, which names the inputs."""
    return {p.name: p.read_bytes() for p in config.out.iterdir() if p.suffix == ".bin"}


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def texts(source: Any, position: Any = None) -> list[str]:
    return [piece.text for piece in source.pieces(position)]


def test_a_stream_makes_the_corpus_that_a_file_makes(hub, config, by_file):
    seen: list[Any] = []
    made = prepare(config, seen.append)
    prepare(by_file)
    assert tokens(config) == tokens(by_file)
    assert Corpus.open(config.out).fingerprint == Corpus.open(by_file.out).fingerprint
    assert hub.asked == [("hf://datasets/some/texts", "en", "train", COMMIT, True)]
    assert seen[-1].documents == made.documents == 60 and seen[-1].share is None
    index = Index.load(config.out)
    assert index.settings["inputs"] == f"hf:some/texts@{COMMIT}:en:train"
    assert index.sources[0]["source"] == index.settings["inputs"]


def test_with_max_tokens_a_stream_has_an_end_to_progress_to(hub, config):
    seen: list[Any] = []
    prepare(replace(config, max_tokens=300), seen.append)
    assert seen[-1].share == 1


@pytest.mark.parametrize("breaks", [[0], [25], [3, 0, 0], [20, 7, 0, 20]])
def test_a_stream_that_breaks_goes_on_where_it_was(hub, waits, config, breaks):
    whole = prepare(replace(config, out=config.out.with_name("whole")))
    hub.breaks = list(breaks)
    prepare(config)
    assert not hub.breaks and len(waits) == len(breaks)
    assert content(config.out) == content(whole.path)


def test_waits_grow_start_anew_after_success_and_end(hub, waits, config, caplog):
    hub.breaks = [5, 0, 0, 7, 0]
    source = HubStream("hf:some/texts", "inputs", "text")
    assert texts(source) == TEXTS
    five, twenty, eighty = huggingface.WAITS
    assert waits == [five, twenty, eighty, five, twenty] and five < twenty < eighty
    assert "ConnectionError: reset by peer; retrying in 5 s" in caplog.text
    hub.breaks = [9, 0, 0, 0]
    with pytest.raises(DataError, match=r"texts: the stream broke 4 times .* same command again"):
        texts(source)


def test_reading_goes_on_after_any_row(hub):
    source = HubStream("hf:some/texts", "inputs", "text")
    for number, piece in enumerate(list(source.pieces(None))):
        position = json.loads(json.dumps(piece.position))
        again = HubStream("hf:some/texts", "inputs", "text")
        assert texts(again, position) == TEXTS[number + 1 :]


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_reading_goes_on_after_any_row_of_streamed_files(hub, tmp_path, monkeypatch, kind):
    files = [str(tmp_path / f"{number}.{kind}") for number in range(3)]
    for number, file in enumerate(files):
        part = datasets.Dataset.from_list(ROWS[20 * number : 20 * number + 20])
        getattr(part, f"to_{kind}")(file)
    options = {"data_files": files, "cache_dir": str(tmp_path), "split": "train"}
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: LOAD(kind, streaming=True, **options)
    )
    source = HubStream("hf:some/texts", "inputs", "text")
    whole = list(source.pieces(None))
    assert [piece.text for piece in whole] == TEXTS
    for number in range(0, 60, 7):
        position = json.loads(json.dumps(whole[number].position))
        assert texts(source, position) == TEXTS[number + 1 :]


def test_killed_after_any_commit_it_goes_on_from_there(hub, config):
    prepare(config)
    for number in range(1000):
        struck = replace(config, out=config.out.with_name(f"struck-{number}"))
        if not killed_after_commit(number, struck):
            break
        taken = json.loads((struck.out / "journal.json").read_text())["taken"][0]
        assert taken["documents"] >= number
        hub.given = 0
        assert prepare(struck).resumed
        assert hub.given == 1 + 60 - taken["documents"]  # one to see that there is any
        assert content(struck.out) == content(config.out)
    assert number > 3


@pytest.mark.slow
def test_killed_in_a_mixture_of_a_stream_and_a_file_it_ends_with_the_same_bytes(
    hub, waits, config, by_file
):
    inputs = (*config.inputs, *by_file.inputs)
    config = replace(config, inputs=inputs, weights=(0.3, 0.7), max_tokens=1500)
    prepare(config)
    for number in range(1000):
        struck = replace(config, out=config.out.with_name(f"struck-{number}"))
        if not killed_after_commit(number, struck):
            break
        hub.breaks = [4]
        assert prepare(struck).resumed
        hub.breaks = []
        assert content(struck.out) == content(config.out)
    assert number > 3


def test_a_dataset_that_changed_is_another_input_unless_its_commit_is_named(hub, config):
    assert killed_after_commit(2, config)
    hub.commit = "later"
    with pytest.raises(ConfigError, match=r"inputs: 'hf:some/texts@later:en:train', but") as caught:
        prepare(config)
    named = str(caught.value).partition(" has '")[2].partition("'")[0]
    assert prepare(replace(config, inputs=(named,))).resumed
    assert hub.asked[-1][3] == COMMIT


def test_a_stream_may_be_held_out(hub, config, by_file):
    config = replace(by_file, held_out_inputs=("hf:some/texts:en:validation",))
    assert prepare(config).documents == 120
    assert hub.asked == [("hf://datasets/some/texts", "en", "validation", COMMIT, True)]
    nothing_left = replace(config, inputs=config.held_out_inputs, out=by_file.out / "other")
    with pytest.raises(DataError, match="no file is left to train on"):
        prepare(nothing_left)


def test_a_tokenizer_is_trained_on_the_beginning_of_a_stream(hub, config, by_file):
    options = {"tokenizer": None, "vocab_size": 280}
    prepare(replace(config, **options))
    prepare(replace(by_file, **options))
    both = [Path(c.out, "tokenizer.json").read_bytes() for c in (config, by_file)]
    assert both[0] == both[1]


def test_rows_without_text_are_left_out_and_foreign_ones_named(hub):
    rows = [
        {"text": None, "n": 1},
        {"text": "a", "n": 2},
        {"text": "", "n": 3},
        {"text": "b", "n": 4},
    ]
    hub.stream = lambda: datasets.Dataset.from_list(rows).to_iterable_dataset()
    assert texts(HubStream("hf:some/texts", "inputs", "text")) == ["a", "b"]
    with pytest.raises(DataError, match=r"hf:x: no field 'body' \(fields: 'text', 'n'\)"):
        texts(HubStream("hf:x", "inputs", "body"))
    with pytest.raises(DataError, match=r"hf:x: 'n' is int, not a string \(got 1\); choose"):
        texts(HubStream("hf:x", "inputs", "n"))
    skipped = list(HubStream("hf:x", "inputs", "n", skip_bad=True).pieces(None))
    assert len([piece for piece in skipped if piece.bad]) == 4


def test_an_id_that_cannot_be_reached_says_what_to_do_offline(config):
    with pytest.raises(DataError) as caught:  # the tests have no network
        prepare(config)
    assert str(caught.value).startswith("inputs: hf:some/texts:en can't be reached (Offline")
    command = "`hf download --repo-type dataset some/texts --local-dir DIR`"
    said = str(caught.value)
    assert command in said and "give the directory of its files as an input" in said
    assert not config.out.exists()


def raising(error: Exception) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise error

    return call


@pytest.mark.parametrize(
    "error",
    [
        ValueError("BuilderConfig 'fr' not found. Available: ['en']"),
        RuntimeError("Dataset scripts are no longer supported, but found texts.py"),
        FileNotFoundError("x"),
    ],
)
def test_what_the_hub_refuses_is_told_in_its_words(hub, monkeypatch, error):
    monkeypatch.setattr(datasets, "load_dataset", raising(error))
    wanted = "can't be reached" if isinstance(error, OSError) else "can't be opened"
    with pytest.raises(DataError, match=rf"inputs: hf:some/texts:fr {wanted}") as caught:
        HubStream("hf:some/texts:fr", "inputs", "text")
    assert str(error) in str(caught.value)


def test_names_are_taken_apart():
    assert parse("hf:a/b", "inputs") == ("a/b", None, None, "train")
    assert parse("hf:a/b:c", "inputs") == ("a/b", None, "c", "train")
    assert parse("hf:a/b:c:d", "inputs") == ("a/b", None, "c", "d")
    assert parse("hf:a/b::d", "inputs") == ("a/b", None, None, "d")
    assert parse("hf:a/b@0f:c", "inputs") == ("a/b", "0f", "c", "train")
    for name in ("hf:", "hf:a:b:c:d"):
        with pytest.raises(ConfigError, match=rf"inputs: must be hf:ID or .*got '{name}'"):
            parse(name, "inputs")


def test_without_the_package_the_repair_is_named(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"hf:some/texts:en: .*pip install 'peptrain\[data\]'"):
        prepare(config)


@pytest.fixture
def saved(tmp_path) -> Path:
    datasets.Dataset.from_list([*ROWS, {"id": 60, "text": None}]).save_to_disk(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_dataset_makes_the_corpus_that_a_file_makes(saved, config, by_file):
    config = replace(config, inputs=(saved,))
    seen: list[Any] = []
    prepare(config, seen.append)
    prepare(by_file)
    assert tokens(config) == tokens(by_file)
    assert 0.9 < seen[-1].share <= 1


def test_a_saved_dataset_goes_on_after_any_row(saved, config, monkeypatch):
    monkeypatch.setattr(huggingface, "ROWS_AT_ONCE", 7)
    source = SavedDataset(saved, "text")
    for number, piece in enumerate(list(source.pieces(None))):
        assert texts(source, piece.position) == TEXTS[number + 1 :]
    config = replace(config, inputs=(saved,))
    prepare(config)
    struck = replace(config, out=config.out.with_name("struck"))
    assert killed_after_commit(3, struck) and prepare(struck).resumed
    assert content(struck.out) == content(config.out)


def test_the_splits_of_a_saved_dataset_are_named_and_so_are_its_faults(saved, config, tmp_path):
    both = datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))
    both.save_to_disk(tmp_path / "both")
    with pytest.raises(
        DataError, match=r"inputs: .*both contains several splits; give .*both/train$"
    ):
        prepare(replace(config, inputs=(tmp_path / "both",)))
    assert prepare(replace(config, inputs=(tmp_path / "both" / "train",))).documents == 60
    with pytest.raises(DataError, match=r"saved: no field 'body' \(fields: 'id', 'text'\)"):
        texts(SavedDataset(saved, "body"))
    with pytest.raises(DataError, match=r"saved: 'id' is .*int64.*, not a string"):
        texts(SavedDataset(saved, "id"))
    for file in saved.glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=r"saved: can't be read .*fetch it again"):
        SavedDataset(saved, "text")


@pytest.mark.parametrize("content", ["null", "[]", "[" * 100_000, '{"_data_files": 3}', "\xff", ""])
@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
def test_damaged_descriptions_of_a_saved_dataset_are_named(saved, content, name):
    (saved / name).write_bytes(content.encode("latin-1"))
    with contextlib.suppress(DataError):  # the second need not have our fields
        SavedDataset(saved, "text")
        assert (name, content) == ("dataset_info.json", '{"_data_files": 3}')


def test_a_saved_dataset_has_no_data_elsewhere(saved, tmp_path):
    data = next(saved.glob("*.arrow"))
    data.rename(tmp_path / data.name)
    (saved / "other.arrow").touch()
    state = (saved / "state.json").read_text()
    (saved / "state.json").write_text(state.replace(data.name, f"../{data.name}"))
    with pytest.raises(DataError, match=r"state\.json names '\.\./data.*, which isn't in the dir"):
        SavedDataset(saved, "text")


def test_bytes_that_are_no_utf8_are_named_or_skipped_in_a_saved_dataset(tmp_path):
    column = pyarrow.array([b"good", None, b"\xff"]).view(pyarrow.string())
    datasets.Dataset(pyarrow.table({"text": column})).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"saved: row 3: invalid UTF-8 .*--skip-bad"):
        texts(SavedDataset(tmp_path / "saved", "text"))
    good, bad = SavedDataset(tmp_path / "saved", "text", skip_bad=True).pieces(None)
    assert (good.text, bad.text, bad.position) == ("good", "", 3)
    assert texts(SavedDataset(tmp_path / "saved", "text", "replace")) == ["good", "\ufffd"]
