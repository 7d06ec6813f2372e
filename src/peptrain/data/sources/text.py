"""Read the documents of one text or JSON Lines file, plain or compressed, in bounded pieces."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from peptrain.data.sources import base
from peptrain.data.sources.base import (
    LONGEST_VALUE,
    PIECE_BYTES,
    BadRecord,
    Piece,
    check_length,
    imported,
    shown,
    text_in,
)
from peptrain.data.sources.names import JSON_SUFFIXES, content_suffix, split_name
from peptrain.errors import DataError

UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)
CONTROL_BYTES = bytes(set(range(32)) - set(b"\t\n\v\f\r"))
MARK = "\ufeff"  # the byte order mark, which some programs write first
ENCODINGS = {
    **dict.fromkeys((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "UTF-32"),  # begins as UTF-16 does
    **dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "UTF-16"),
}
BEGINNINGS = {
    "JSON": rb'\s*\[?\s*\{\s*"[^"\n]*"\s*:',
    "HTML": rb"\s*<(!doctype html|html)\b",
    "XML": rb"\s*<\?xml\b",
}
BEGINNING_BYTES = 4096
BEFORE = 20  # characters shown before an error


def read_bytes(path: Path) -> bytes:
    """Return the content of a plain or packed file. Raise DataError if it can't be read."""
    try:
        with path.open("rb") as raw:
            return _unpacked(raw, path).read()
    except UNREADABLE as error:
        raise unreadable(path, error) from error


def looks_like(path: Path) -> str | None:
    """Return the format that the beginning of a text file has, None for plain text."""
    try:
        with path.open("rb") as raw:
            start = _unpacked(raw, path).read(BEGINNING_BYTES).removeprefix(codecs.BOM_UTF8)
    except UNREADABLE as error:
        raise unreadable(path, error) from error
    found = (kind for kind, form in BEGINNINGS.items() if re.match(form, start, re.IGNORECASE))
    return next(found, None)


def read_pieces(
    path: Path, text_field: str, errors: str, skip_bad: bool = False
) -> Iterator[Piece]:
    """Yield the documents of one file: each line of JSON Lines, or any other file as one document.

    `errors` is how to decode invalid UTF-8: "strict" (DataError) or "replace". Documents without
    text are skipped. Raises DataError for anything that isn't readable text, and BadRecord for a
    line that can't be used. With `skip_bad` that is a piece instead.
    """
    try:
        with path.open("rb") as raw:
            stream = _unpacked(raw, path)
            if content_suffix(path) in JSON_SUFFIXES:
                pieces = _records(
                    _checked(_lines(stream), path), path, text_field, errors, skip_bad
                )
            else:
                pieces = _parts(_decoded(_checked(_chunks(stream), path), path, errors))
            for piece in pieces:
                yield piece._replace(bytes_read=raw.tell())
    except UNREADABLE as error:
        raise unreadable(path, error) from error


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield each line of a plain or packed file. Raise DataError if it can't be read as UTF-8.

    A line that is too long is cut off (`LARGEST_RECORD`).
    """
    try:
        with path.open("rb") as raw:
            yield from _checked(_lines(_unpacked(raw, path)), path)
    except UNREADABLE as error:
        raise unreadable(path, error) from error


def _unpacked(raw: BinaryIO, path: Path) -> BinaryIO:
    packer = split_name(path)[1]
    if packer == ".zst":  # the standard library has it since Python 3.14
        return io.BufferedReader(imported("pyarrow", str(path)).CompressedInputStream(raw, "zstd"))
    unpackers: dict[str, Callable[..., Any]]
    unpackers = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
    return unpackers[packer](raw) if packer else raw


def unreadable(path: Path, error: Exception) -> DataError:
    """Return the error for a file that is damaged or can't be opened."""
    return DataError(f"{path}: can't be read ({error}); if it is damaged, fetch it again")


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    """Yield about PIECE_BYTES at a time, cut at line ends; a longer line is cut anywhere."""
    return iter(lambda: stream.read(PIECE_BYTES) + stream.readline(PIECE_BYTES), b"")


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Yield each line. One that is too long is cut off, after more than LARGEST_RECORD bytes."""
    while line := stream.readline(base.LARGEST_RECORD + 1):
        yield line
        if len(line) > base.LARGEST_RECORD:
            while line and not line.endswith(b"\n"):
                line = stream.readline(PIECE_BYTES)


def _checked(chunks: Iterator[bytes], path: Path) -> Iterator[bytes]:
    """Yield `chunks`. Raise DataError if the first is in another encoding than UTF-8."""
    first = next(chunks, b"")
    for mark, encoding in ENCODINGS.items():
        if first.startswith(mark):
            raise DataError(
                f"{path}: {encoding}, not UTF-8; convert it: iconv -f {encoding} -t UTF-8 OLD > NEW"
            )
    return chain([first] if first else [], chunks)


def _decoded(chunks: Iterable[bytes], path: Path, errors: str) -> Iterator[str]:
    """Yield the text of each chunk, and of a final empty chunk, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    offset, begun = 0, False
    for chunk in chain(chunks, [b""]):
        if controls := _controls(chunk):
            raise DataError(f"{path}: {'; '.join(controls)}")
        undecoded = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: invalid UTF-8 at byte {offset - undecoded + error.start} (unpacked);"
                " fix it, or replace it by U+FFFD with --on-bad-utf8 replace"
            ) from error
        yield text if begun else text.removeprefix(MARK)
        begun = begun or bool(text)
        offset += len(chunk)


def _controls(chunk: bytes) -> tuple[str, str] | None:
    """Return what shows that `chunk` isn't text, and the repair."""
    controls = len(chunk) - len(chunk.translate(None, CONTROL_BYTES))
    # Real text may contain a stray escape or end-of-file mark, but no NUL and not 1 byte in 100.
    if controls and (b"\0" in chunk or controls > 1 + len(chunk) // 100):
        what = f"does not look like text ({controls} control bytes in {len(chunk)})"
        return what, "give UTF-8 text or JSON Lines, plain or packed"
    return None


def _parts(texts: Iterator[str]) -> Iterator[Piece]:
    """Yield one document in pieces."""
    waiting = ""
    for text in filter(None, texts):
        if waiting:
            yield Piece(waiting, False)
        waiting = text
    if waiting:
        yield Piece(waiting, True)


def _records(
    lines: Iterator[bytes], path: Path, field: str, errors: str, skip_bad: bool
) -> Iterator[Piece]:
    begun = False
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        if not begun and (begun := bool(line.strip())):
            _check_is_lines(line, where)
        try:
            if text := _text_of(line, where, field, errors):
                yield Piece(text, True)
        except BadRecord as error:
            if not skip_bad:
                raise
            yield error.piece


def _check_is_lines(line: bytes, where: str) -> None:
    """Raise DataError if a file begins with an array, or with an object in several lines."""
    start = line.removeprefix(codecs.BOM_UTF8).strip()
    if start.startswith(b"[") or start == b"{":
        kind, query = (
            ("array", ".[]") if start.startswith(b"[") else ("object in several lines", ".")
        )
        raise DataError(
            f"{where}: a JSON {kind}, but each line must be one object; convert it:"
            f" jq -c '{query}' OLD > NEW"
        )


def _text_of(line: bytes, where: str, field: str, errors: str) -> str:
    check_length(line, where)
    if controls := _controls(line):
        raise BadRecord(where, *controls)
    try:
        content = line.decode("utf-8", errors).lstrip(MARK)
    except UnicodeDecodeError as error:
        raise BadRecord(
            where,
            f"invalid UTF-8 at byte {error.start} of the line ({line[error.start :][:4]!r})",
            "fix it, replace it by U+FFFD with --on-bad-utf8 replace",
        ) from error
    if not content.strip():
        return ""
    record = _parsed(content, where)
    if not isinstance(record, dict):
        what = f"a JSON {type(record).__name__} (got {shown(record)})"
        raise BadRecord(where, what, "each line must be one object")
    return _whole_characters(text_in(record, field, where), where, errors)


def _parsed(content: str, where: str) -> Any:
    try:
        return json.loads(content)
    except RecursionError as error:
        raise BadRecord(where, "nested too deeply", "remove the nested value") from error
    except json.JSONDecodeError as error:
        got = shown(content[max(0, error.pos - BEFORE) :][:LONGEST_VALUE])
        what = f"not JSON ({error.msg}) at character {error.pos} (got {got})"
        raise BadRecord(where, what, "each line must be one object") from error
    except ValueError as error:
        raise BadRecord(where, "an integer of thousands of digits", "make it a string") from error


def _whole_characters(text: str, where: str, errors: str) -> str:
    r"""JSON can spell half a surrogate pair (\ud800), which UTF-8 can't encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if errors == "strict":
            what = f"half a surrogate pair ({text[error.start]!r})"
            raise BadRecord(where, what, "fix it, use --on-bad-utf8 replace") from error
        return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return text
