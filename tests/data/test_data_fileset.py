"""Files of an input: which ones, in which order, and going on in the middle of them."""

import gzip
import hashlib
import json
import os
import socket
from pathlib import Path

import pytest

from peptrain.data.sources.files import FileSet, describe_files, find_files, warn_of_formats
from peptrain.data.sources.names import content_suffix
from peptrain.errors import DataError


def write(path: Path, content: bytes = b"") -> Path:
    path.write_bytes(content)
    return path


@pytest.fixture
def source(tmp_path, monkeypatch) -> FileSet:
    """A long text in pieces, two JSON Lines documents, and a file without text."""
    monkeypatch.setattr("peptrain.data.sources.text.PIECE_BYTES", 10)
    lines = [json.dumps({"text": text}) for text in ("one", "two")]
    write(tmp_path / "a.txt", b"a line of it\n" * 5)
    write(tmp_path / "b.txt")
    write(tmp_path / "c.jsonl", "\n".join(lines).encode())
    return FileSet("all", find_files(tmp_path, "inputs"), "text", "strict")


NAMES = {
    ".jsonl": (
        *(
            "a.jsonl",
            "A.JSONL.GZ",
            "a.jsonl-00000-of-00002",
            "a.jsonl-00000-of-00002.xz",
            "a.jsonl.1",
        ),
        *("a.jsonl.gz-00000-of-00002", "a.jsonl.00000", "a.jsonl.part-1", "a.jsonl.part00001.zst"),
        *(
            "a-00000-of-00002.jsonl",
            "a.v1.5.jsonl.bz2",
            "a.jsonl.2024-01-31",
            "a.jsonl_03",
            "1.jsonl",
        ),
    ),
    ".ndjson": ("a.ndjson", "a.ndjson.zst", "a.ndjson.part_2.gz"),
    ".jsonlines": ("a.jsonlines",),
    ".json": ("a.json", "c4-train.00000-of-01024.json.gz", "part-00000-0fc1.c000.json"),
    ".txt": ("a.txt", "a.txt.gz.7", "a.txt-1-of-2"),
    ".parquet": ("a.parquet", "a.parquet-00001-of-00002", "part-0-c000.snappy.parquet"),
    ".csv": ("a.csv.1",),
    ".tar": ("a.tar.gz", "a.tar.xz.001"),
    "": ("a", "part-00000", "a.gz", ".jsonl", "notes-2024"),
}


@pytest.mark.parametrize("suffix", NAMES)
def test_a_name_has_one_format_whatever_part_or_compression(suffix):
    assert {name: content_suffix(Path(name)) for name in NAMES[suffix]} == dict.fromkeys(
        NAMES[suffix], suffix
    )


def found(directory: Path) -> list[str]:
    return [str(path.relative_to(directory)) for path in find_files(directory, "inputs")]


def test_a_directory_means_its_known_files_sorted_and_says_what_it_passes_over(tmp_path, caplog):
    names = ("b.txt", "a.md", "c.jsonl.xz", "d.json.gz", "e.csv", "e2.csv", "f.py", "g.xz")
    for name in (*names, "h.parquet", "i.ndjson-00000-of-00002", "._b.txt", "README.md"):
        write(tmp_path / name)
    (tmp_path / "folder.txt").mkdir()
    write(tmp_path / "folder.txt" / "deeper.txt")
    known = ["a.md", "b.txt", "c.jsonl.xz", "d.json.gz", "h.parquet", "i.ndjson-00000-of-00002"]
    assert found(tmp_path) == known
    assert caplog.messages == [
        f"inputs: {tmp_path}: files to read: 6; passed over: 2 .csv (e.csv, e2.csv), 1 .py (f.py),"
        " 1 .xz (g.xz), 1 describing the data (README.md), 1 hidden (._b.txt), 1 more"
    ]


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["README.md", "a.jsonl", "LICENSE.txt", "dataset_infos.json"], ["a.jsonl"]),
        (["README.md", "a.parquet", "data/b.parquet"], ["a.parquet"]),
        (["README.md", "data/b.parquet", "data/a/x.txt", "more/c.jsonl", "x/README.md"], None),
        (["README.md", "guide.md", "state.json"], ["README.md", "guide.md"]),
        (["README.md", "figures/a.svg"], ["README.md"]),
        (["b/1.txt", "a/9.txt", "a-/5.txt", ".cache/2.txt"], ["a/9.txt", "a-/5.txt", "b/1.txt"]),
        (["a/b/c/d.jsonl"], ["a/b/c/d.jsonl"]),
    ],
)
def test_descriptions_are_no_data_and_subdirectories_stand_in_for_files(tmp_path, names, read):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / name)
    assert found(tmp_path) == (read or ["data/b.parquet", "more/c.jsonl"])


def test_links_to_directories_are_not_followed(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"it contains 1 subdirectory \(a/loop\)$"):
        find_files(tmp_path, "inputs")


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["pipe", "socket", "link to nothing", "device"])
def test_what_is_not_a_file_is_named_and_not_opened(tmp_path, monkeypatch, kind, inside):
    monkeypatch.chdir(tmp_path)  # a socket's name must be short
    path = Path("a.jsonl")
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    else:
        path.symlink_to("nowhere" if kind == "link to nothing" else "/dev/null")
    message = rf"a\.jsonl is a {kind}.*; save its content to a file"
    if kind == "link to nothing":
        message = r"a\.jsonl: (no such file|can't be read)"
    with pytest.raises(DataError, match=message):
        find_files(Path() if inside else path, "inputs")


def test_plain_text_that_looks_like_records_is_warned_of_once_a_format(tmp_path, caplog):
    write(tmp_path / "plain", b"words {} [] <b>")
    write(tmp_path / "export", b'\xef\xbb\xbf{"text": "x"}\n')
    write(tmp_path / "export2.gz", gzip.compress(b'[{"text": "x"}]'))
    write(tmp_path / "page", b"<!DOCTYPE html>\n<p>")
    write(tmp_path / "a.csv"), write(tmp_path / "b.csv.1"), write(tmp_path / "a.jsonl", b'{"')
    warn_of_formats(sorted(tmp_path.iterdir()))
    assert [message.partition(", but")[0] for message in caplog.messages] == [
        f"inputs: {tmp_path}/a.csv and 1 more: CSV",
        f"inputs: {tmp_path}/export and 1 more: JSON",
        f"inputs: {tmp_path}/page: HTML",
    ]


def test_a_name_that_is_not_utf8_and_one_in_a_subdirectory_are_described(tmp_path):
    (tmp_path / "a").mkdir()
    paths = [write(tmp_path / os.fsdecode(b"\xff\n.txt"), b"x"), write(tmp_path / "a/b.txt", b"x")]
    descriptions = {describe_files(files) for files in (paths, paths[::-1], paths[:1], paths[1:])}
    assert len(descriptions) == 4
    digest = hashlib.sha256(b"b.txt 1").hexdigest()[:16]  # as in 0.1.0
    assert describe_files(paths[1:]) == f"1 files, 1 bytes, {digest}"


def test_files_that_are_held_out_are_left_out_by_whatever_path(tmp_path):
    kept, apart = write(tmp_path / "a.txt"), write(tmp_path / "b.txt")
    (tmp_path / "folder").mkdir()
    roundabout = tmp_path / "folder" / ".."
    assert find_files(roundabout, "inputs", {apart.resolve()}) == [roundabout / kept.name]


@pytest.mark.parametrize("name", ["test.jsonl", "wiki-valid-00000-of-00001.txt", "VAL/a.txt"])
def test_a_held_out_set_among_the_inputs_is_named(tmp_path, caplog, name):
    """A word of its name says so. One that is given apart, or alone, is what was asked for."""
    parts = ["train.jsonl", "latest.txt", "devices.txt"] if "/" not in name else ["train/b.txt"]
    for part in (*parts, name):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        write(tmp_path / part, b"{}")
    file = tmp_path / name
    assert file in find_files(tmp_path, "inputs")
    (said,) = [r.getMessage() for r in caplog.records if "trained on" in r.getMessage()]
    assert said.startswith(f"inputs: {file} is trained on too")
    assert said.endswith(f"give `--held-out-inputs {file}`")
    caplog.clear()
    find_files(tmp_path, "inputs", [file.resolve()])
    find_files(file, "inputs")
    find_files(tmp_path, "held_out_inputs")
    assert not [r for r in caplog.records if "trained on" in r.getMessage()]


def test_missing_foreign_and_empty_inputs_are_named(tmp_path):
    with pytest.raises(DataError, match=r"inputs: .*nowhere: no such file"):
        find_files(tmp_path / "nowhere", "inputs")
    with pytest.raises(DataError, match=r"inputs: .* contains no \.jsonl, .*it contains nothing$"):
        find_files(tmp_path, "inputs")
    for name in ("a.zip", "a.parquet.gz", "a.tar.gz"):
        with pytest.raises(
            DataError, match=rf"held_out_inputs: .*{name} has an unsupported format"
        ):
            find_files(write(tmp_path / name), "held_out_inputs")
    with pytest.raises(DataError, match=r"it contains 1 \.tar \(a\.tar\.gz\), 1 \.zip \(a\.zip\)$"):
        (tmp_path / "a.parquet.gz").unlink()
        find_files(tmp_path, "inputs")


def test_reading_goes_on_after_any_piece(source):
    whole = list(source.pieces(None))
    assert len(whole) > 6 and whole[-1].bytes_read == source.size
    read = [piece.bytes_read for piece in whole]
    assert read == sorted(read)
    for number, piece in enumerate(whole):
        assert list(source.pieces(piece.position)) == whole[number + 1 :]


def test_a_file_that_was_finished_is_not_read_again(source):
    *_, last = source.pieces(None)
    write(source.files[0], b"\0" * source.files[0].stat().st_size)
    assert [piece.text for piece in source.pieces([last.position[0], 0])] == ["one", "two"]


def test_a_sample_takes_an_equal_share_of_each_file_and_ends_at_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr("peptrain.data.sources.files.PIECE_BYTES", 1)
    files = [write(tmp_path / f"{n}.txt", str(n).encode() * 100) for n in range(4)]
    text = "".join(FileSet("all", files, "text", "strict").sample(40))
    assert sorted(text) == sorted("0" * 10 + "1" * 10 + "2" * 10 + "3" * 10)
    assert len("".join(FileSet("all", files, "text", "strict").sample(2))) == 2
