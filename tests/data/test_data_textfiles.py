"""Text and JSON Lines: nothing is lost or added, and what can't be read is named."""

import gzip
import json
import lzma
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peptrain.data.sources import text as textfiles
from peptrain.data.sources.text import read_pieces
from peptrain.errors import DataError

PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def read(path: Path, field: str = "text", errors: str = "strict") -> list[str]:
    """The documents of a file."""
    documents, parts = [], []
    for piece in read_pieces(path, field, errors):
        parts.append(piece.text)
        if piece.ends:
            documents.append("".join(parts))
            parts = []
    assert not parts, "a document without an end"
    return documents


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_text_file_is_one_document(tmp_path, suffix):
    path = write(tmp_path / f"a.txt{suffix}", PACKERS[suffix](b"one\n\ntwo\n"))
    assert read(path) == ["one\n\ntwo\n"]


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".JSONL"])
def test_a_json_line_is_one_document(tmp_path, kind, suffix):
    lines = b'{"text": "one\\n", "id": 1}\n\n{"id": 2, "text": "tw\\u00f6"}'
    assert read(write(tmp_path / f"a{kind}{suffix}", PACKERS[suffix](lines))) == ["one\n", "twö"]


def test_documents_without_text_are_left_out(tmp_path):
    assert read(write(tmp_path / "a.txt", b"")) == []
    assert read(write(tmp_path / "a.jsonl", b'{"text": ""}\n{"text": "x"}\n')) == ["x"]


@given(
    text=st.text(st.sampled_from("ab \nö€😀"), min_size=1, max_size=200), size=st.integers(1, 20)
)
def test_a_long_text_comes_in_pieces_that_join_to_it(tmp_path_factory, text, size):
    path = write(tmp_path_factory.mktemp("long") / "a.txt", text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textfiles, "PIECE_BYTES", size)
        pieces = list(read_pieces(path, "text", "strict"))
    assert "".join(p.text for p in pieces) == text
    assert [p.ends for p in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1].bytes_read == path.stat().st_size
    if max(len(line.encode()) for line in text.splitlines(keepends=True)) <= size:
        assert all(p.text.endswith("\n") for p in pieces[:-1])


def test_pieces_are_bounded(tmp_path):
    path = write(tmp_path / "a.txt", b"x" * 5 * textfiles.PIECE_BYTES)
    assert (
        max(len(p.text) for p in read_pieces(path, "text", "strict")) <= 2 * textfiles.PIECE_BYTES
    )


def test_a_file_of_another_name_is_text(tmp_path):
    assert read(write(tmp_path / "LICENSE", b"free")) == ["free"]


@pytest.mark.parametrize("suffix", [".gz", ".xz"])
def test_damaged_compression_is_named(tmp_path, suffix):
    whole = PACKERS[suffix](b"some text\n" * 1000)
    for content in (whole[: len(whole) // 2], b"no packed file", whole[:20] + b"??" + whole[22:]):
        path = write(tmp_path / f"a.txt{suffix}", content)
        with pytest.raises(DataError, match=rf"a\.txt\{suffix}: can't be read .*fetch it again"):
            read(path)


@pytest.mark.parametrize(
    "content", [b"text\0text", bytes(range(256)) * 9, "utf16".encode("utf-16")]
)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_binary_junk_is_refused(tmp_path, name, content):
    with pytest.raises(DataError, match=r"a\.\w+: does not look like text \(\d+ control bytes"):
        read(write(tmp_path / name, content))


def test_a_stray_control_character_is_text(tmp_path):
    assert read(write(tmp_path / "a.txt", b"dos file\r\n\x1a")) == ["dos file\r\n\x1a"]


def test_broken_utf8_names_the_byte(tmp_path):
    path = write(tmp_path / "a.txt", "ö".encode() * 10 + b"\xff" + b"abc")
    with pytest.raises(DataError, match=r"invalid UTF-8 at byte 20 .*--on-bad-utf8 replace"):
        read(path)
    assert read(path, errors="replace") == ["ö" * 10 + "�abc"]


@given(good=st.binary(max_size=0) | st.text("aö€\n", max_size=60).map(str.encode))
def test_broken_utf8_is_found_at_its_byte_wherever_pieces_are_cut(tmp_path_factory, good):
    path = write(tmp_path_factory.mktemp("bad") / "a.txt", good + "€".encode()[:2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textfiles, "PIECE_BYTES", 7)
        with pytest.raises(DataError, match=rf"at byte {len(good)} "):
            read(path)


def test_broken_utf8_in_json_lines_names_the_byte_of_the_file(tmp_path):
    first = b'{"text": "x"}\n'
    path = write(tmp_path / "a.jsonl", first + b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match=rf"a\.jsonl: invalid UTF-8 at byte {len(first) + 10} "):
        read(path)
    assert read(path, errors="replace") == ["x", "�"]


def test_a_null_text_is_no_document(tmp_path):
    lines = b'{"text": null}\n{"text": "good"}\n{"text": ""}\n'
    assert read(write(tmp_path / "a.jsonl", lines)) == ["good"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"not JSON \(Expecting value\); each line must be one object"),
        ("[", r"not JSON"),
        ('["text"]', r"a JSON list; each line must be one object"),
        ("3", r"a JSON int; each line"),
        (
            '{"content": "x", "id": 1}',
            r"no field 'text' \(fields: 'content', 'id'\); name it with --text-field",
        ),
        ("{}", r"no field 'text' \(fields: none\)"),
        ('{"text": ["x"]}', r"'text' is list, not a string; choose another --text-field"),
        (r'{"text": "\ud800"}', r"half a surrogate pair .*--on-bad-utf8 replace"),
    ],
)
def test_a_bad_json_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n\n' + line.encode() + b"\n")
    with pytest.raises(DataError, match=rf"a\.jsonl:3: {message}"):
        read(path)


def test_another_text_field_and_replaced_half_pairs(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"body": "a\ud800b"}).encode())
    (text,) = read(path, field="body", errors="replace")
    assert text.startswith("a�") and text.endswith("�b")
