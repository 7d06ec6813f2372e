"""Text and JSON Lines: nothing is lost or added, and what can't be read is named."""

import bz2
import contextlib
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

PACKERS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
with contextlib.suppress(ImportError):
    import pyarrow

    PACKERS[".zst"] = lambda content: pyarrow.compress(content, "zstd", asbytes=True)


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
@pytest.mark.parametrize("kind", [".json", ".JSONL", ".ndjson", ".jsonlines", ".jsonl-00000-of-2"])
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


@pytest.mark.parametrize("suffix", [*PACKERS][1:])
def test_damaged_compression_is_named(tmp_path, suffix):
    whole = PACKERS[suffix](b"some text\n" * 1000)
    for content in (whole[: len(whole) // 2], b"no packed file", whole[:20] + b"??" + whole[22:]):
        path = write(tmp_path / f"a.txt{suffix}", content)
        with pytest.raises(DataError, match=rf"a\.txt\{suffix}: can't be read .*fetch it again"):
            read(path)


@pytest.mark.parametrize("content", [b"text\0text", bytes(range(256)) * 9])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_binary_junk_is_refused(tmp_path, name, content):
    where = name.replace("jsonl", "jsonl:1")
    with pytest.raises(DataError, match=rf"{where}: does not look like text \(\d+ control bytes"):
        read(write(tmp_path / name, content))


@pytest.mark.parametrize("encoding", ["UTF-16", "UTF-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_another_encoding_is_named(tmp_path, name, encoding):
    path = write(tmp_path / name, '{"text": "x"}\n'.encode(encoding))
    with pytest.raises(DataError, match=rf"{name}: {encoding}, not UTF-8; .*iconv -f {encoding} "):
        read(path)


def test_a_byte_order_mark_is_no_text(tmp_path):
    mark = "\ufeff"
    assert read(write(tmp_path / "a.txt", f"{mark}one{mark}".encode())) == [f"one{mark}"]
    assert read(write(tmp_path / "b.txt", mark.encode())) == []
    lines = f'{mark}{{"text": "one"}}\n{mark}{{"text": "{mark}two"}}\n{mark}\n'  # of two files
    assert read(write(tmp_path / "a.jsonl", lines.encode())) == ["one", f"{mark}two"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textfiles, "PIECE_BYTES", 1)
        assert read(write(tmp_path / "a.txt", f"{mark}one".encode())) == ["one"]


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


def test_broken_utf8_in_json_lines_names_the_line(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: invalid UTF-8 at byte 10 of the line "):
        read(path)
    assert read(path, errors="replace") == ["x", "�"]


def test_a_null_text_is_no_document(tmp_path):
    lines = b'{"text": null}\n{"text": "good"}\n{"text": ""}\n'
    assert read(write(tmp_path / "a.jsonl", lines)) == ["good"]


DEEP = '{"text": "x", "more": ' + "[" * 100_000 + "]" * 100_000 + "}"
BAD_LINES = {
    '{"text": ': r"not JSON \(Expecting value\) at character \d+ \(got '.{9,12}'\); each line must",
    "[": r"not JSON",
    '["text"]': r"a JSON list \(got \['text'\]\); each line must be one object",
    "3": r"a JSON int \(got 3\); each line",
    '{"content": "x", "id": 1}': r"no field 'text' \(fields: 'content', 'id'\); .*--text-field",
    "{}": r"no field 'text' \(fields: none\)",
    '{"text": ["x"]}': r"'text' is list, not a string \(got \['x'\]\); choose another --text-field",
    '{"text": 3}': r"'text' is int, not a string \(got 3\)",
    json.dumps({"text": ["y" * 999] * 99}): r"'text' .* \(got \['y+\.\.\.y+\.\.\.\); c",
    json.dumps(
        dict.fromkeys("k" * 99 + str(n) for n in range(99))
    ): r"no field 'text' .{409}\.\.\.\)",
    DEEP: r"nested too deeply",
    '{"text": "x", "id": ' + "9" * 5000 + "}": r"an integer of thousands of digits",
    r'{"text": "\ud800"}': r"half a surrogate pair .*--on-bad-utf8 replace",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=BAD_LINES.values())
def test_a_bad_json_line_is_named_or_skipped(tmp_path, line):
    path = write(tmp_path / "a.jsonl", f'{{"text": "good"}}\n\n{line}\n{{"text": "last"}}'.encode())
    with pytest.raises(DataError, match=rf"a\.jsonl:3: {BAD_LINES[line]}.* --skip-bad$") as raised:
        read(path)
    first, bad, last = read_pieces(path, "text", "strict", skip_bad=True)
    assert (first.text, bad.text, last.text) == ("good", "", "last")
    assert bad.bad and str(raised.value).startswith(bad.bad)


@pytest.mark.parametrize("content", ['[{"text": "x"}]', '[\n{"text": "x"}\n]', '{\n"text": "x"\n}'])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_json_over_several_lines_is_refused_as_a_whole(tmp_path, content, skip_bad):
    path = write(tmp_path / "a.json", b"\n" + content.encode())
    with pytest.raises(
        DataError, match=r"a\.json:2: a JSON (array|object) ?.*: jq -c '\.(\[\])?' OLD"
    ):
        list(read_pieces(path, "text", "strict", skip_bad))


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("end", ["", "\n"])
def test_a_line_that_would_fill_the_memory_is_named_or_skipped(tmp_path, monkeypatch, suffix, end):
    monkeypatch.setattr("peptrain.data.sources.base.LARGEST_RECORD", 30)
    monkeypatch.setattr(textfiles, "PIECE_BYTES", 7)
    good = json.dumps({"text": "x" * 17}) + "\n"
    assert len(good) == 30
    for length in range(19, 60):
        bad = json.dumps({"text": "x" * length}) + "\n"
        content = PACKERS[suffix]((good + bad + good + bad.removesuffix("\n") + end).encode())
        path = write(tmp_path / f"a.jsonl{suffix}", content)
        with pytest.raises(DataError, match=r"a\.jsonl.*:2: longer than 30 bytes; split it"):
            read(path)
        pieces = list(read_pieces(path, "text", "strict", skip_bad=True))
        assert [bool(piece.bad) for piece in pieces] == [False, True, False, True]


def test_another_text_field_and_replaced_half_pairs(tmp_path):
    path = write(tmp_path / "a.jsonl", json.dumps({"body": "a\ud800b"}).encode())
    (text,) = read(path, field="body", errors="replace")
    assert text.startswith("a�") and text.endswith("�b")
