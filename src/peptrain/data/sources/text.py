"""Read the documents of one text or JSON Lines file, plain or compressed, in bounded pieces."""

from __future__ import annotations

import codecs
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from peptrain.data.sources.base import PIECE_BYTES, Piece, field_of, not_a_string
from peptrain.errors import DataError

JSON_SUFFIXES = (".jsonl", ".json")
TEXT_SUFFIXES = (".txt", ".md")
UNPACKERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)
CONTROL_BYTES = bytes(set(range(32)) - set(b"\t\n\v\f\r"))


def content_suffix(path: Path) -> str:
    """Return the suffix in lower case, without that of the compression: ".txt" for A.TXT.gz."""
    packed = path.suffix.lower() in UNPACKERS
    return Path(path.stem if packed else path.name).suffix.lower()


def read_bytes(path: Path) -> bytes:
    """Return the content of a plain, .gz or .xz file. Raise DataError if it can't be read."""
    try:
        with path.open("rb") as raw:
            return _unpacked(raw, path).read()
    except UNREADABLE as error:
        raise unreadable(path, error) from error


def read_pieces(path: Path, text_field: str, errors: str) -> Iterator[Piece]:
    """Yield the documents of one file: each line of JSON Lines, or any other file as one document.

    `errors` is how to decode invalid UTF-8: "strict" (DataError) or "replace". Documents without
    text are skipped. Raises DataError for anything that isn't readable text.
    """
    try:
        with path.open("rb") as raw:
            stream = _unpacked(raw, path)
            if content_suffix(path) in JSON_SUFFIXES:
                texts = _json_texts(_decoded(stream, path, errors), path, text_field, errors)
            else:
                texts = _text_parts(_decoded(_chunks(stream), path, errors))
            for text, ends in texts:
                yield Piece(text, ends, raw.tell())
    except UNREADABLE as error:
        raise unreadable(path, error) from error


def _unpacked(raw: BinaryIO, path: Path) -> BinaryIO:
    unpacker = UNPACKERS.get(path.suffix.lower())
    return unpacker(raw) if unpacker else raw


def unreadable(path: Path, error: Exception) -> DataError:
    """Return the error for a file that is damaged or can't be opened."""
    return DataError(f"{path}: can't be read ({error}); if it is damaged, fetch it again")


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    """Yield about PIECE_BYTES at a time, cut at line ends; a longer line is cut anywhere."""
    return iter(lambda: stream.read(PIECE_BYTES) + stream.readline(PIECE_BYTES), b"")


def _decoded(chunks: Iterable[bytes], path: Path, errors: str) -> Iterator[str]:
    """Yield the text of each chunk, and of a final empty chunk."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    offset = 0
    for chunk in chain(chunks, [b""]):
        _check_is_text(chunk, path)
        undecoded = len(decoder.getstate()[0])
        try:
            yield decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: invalid UTF-8 at byte {offset - undecoded + error.start} (unpacked);"
                " fix it, or replace it by U+FFFD with --on-bad-utf8 replace"
            ) from error
        offset += len(chunk)


def _check_is_text(chunk: bytes, path: Path) -> None:
    controls = len(chunk) - len(chunk.translate(None, CONTROL_BYTES))
    # Real text may contain a stray escape or end-of-file mark, but no NUL and not 1 byte in 100.
    if controls and (b"\0" in chunk or controls > 1 + len(chunk) // 100):
        raise DataError(
            f"{path}: does not look like text ({controls} control bytes in {len(chunk)});"
            " give UTF-8 text or JSON Lines, plain, .gz or .xz"
        )


def _text_parts(texts: Iterator[str]) -> Iterator[tuple[str, bool]]:
    """Yield one document as pairs (part, whether it is the last)."""
    waiting = ""
    for text in filter(None, texts):
        if waiting:
            yield waiting, False
        waiting = text
    if waiting:
        yield waiting, True


def _json_texts(
    lines: Iterator[str], path: Path, field: str, errors: str
) -> Iterator[tuple[str, bool]]:
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        if line.strip() and (text := _text_of(line, where, field)):
            yield _whole_characters(text, where, errors), True


def _text_of(line: str, where: str, field: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        said = getattr(error, "msg", error)
        raise DataError(f"{where}: not JSON ({said}); each line must be one object") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON {type(record).__name__}; each line must be one object")
    text = field_of(record, field, where)
    if not isinstance(text, str | None):
        raise not_a_string(where, field, type(text).__name__)
    return text or ""


def _whole_characters(text: str, where: str, errors: str) -> str:
    r"""JSON can spell half a surrogate pair (\ud800), which UTF-8 can't encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if errors == "strict":
            raise DataError(
                f"{where}: half a surrogate pair ({text[error.start]!r});"
                " fix it, or use --on-bad-utf8 replace"
            ) from error
        return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return text
