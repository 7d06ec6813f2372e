"""Files of an input: which ones, in which order, and going on in the middle of them."""

import json
from pathlib import Path

import pytest

from peptrain.data.sources.files import FileSet, find_files
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


def test_a_directory_means_its_known_files_sorted(tmp_path):
    names = ("b.txt", "a.md", "c.jsonl.xz", "d.json.gz", "e.csv", "f.py", "g.xz", "h.parquet")
    for name in names:
        write(tmp_path / name)
    (tmp_path / "folder.txt").mkdir()
    found = [path.name for path in find_files(tmp_path, "inputs")]
    assert found == ["a.md", "b.txt", "c.jsonl.xz", "d.json.gz", "h.parquet"]


def test_files_that_are_held_out_are_left_out_by_whatever_path(tmp_path):
    kept, apart = write(tmp_path / "a.txt"), write(tmp_path / "b.txt")
    (tmp_path / "folder").mkdir()
    roundabout = tmp_path / "folder" / ".."
    assert find_files(roundabout, "inputs", {apart.resolve()}) == [roundabout / kept.name]


def test_missing_foreign_and_empty_inputs_are_named(tmp_path):
    with pytest.raises(DataError, match=r"inputs: .*nowhere: no such file"):
        find_files(tmp_path / "nowhere", "inputs")
    known = r"\.jsonl, \.json, \.txt, \.md, \.parquet"
    with pytest.raises(DataError, match=rf"inputs: .* contains no {known} file.*not searched\)$"):
        find_files(tmp_path, "inputs")
    for name in ("a.zst", "a.parquet.gz"):
        with pytest.raises(
            DataError, match=rf"held_out_inputs: .*{name} has an unsupported format"
        ):
            find_files(write(tmp_path / name), "held_out_inputs")


def test_the_folders_of_a_directory_without_files_are_named(tmp_path):
    for number in range(7):
        (tmp_path / f"part-{number}").mkdir()
    (tmp_path / ".cache").mkdir()
    write(tmp_path / "README.rst")
    named = ", ".join(str(tmp_path / f"part-{number}") for number in range(5))
    with pytest.raises(DataError, match=rf"give one of them: {named} and 2 more$"):
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
