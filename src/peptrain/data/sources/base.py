"""The interface of a text source, which yields documents and resumes from a position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from reprlib import Repr
from typing import Any, NamedTuple, Protocol

from peptrain.errors import DataError

LARGEST_RECORD = 1 << 28  # bytes: its encoding takes about 50 times as much memory
LONGEST_VALUE, LONGEST_NAMES = 80, 400  # characters in a message
PIECE_BYTES = 1 << 20  # bounds memory for text files; a cut in each 1 MB costs a token or two


class Piece(NamedTuple):
    """A document, or a part of one that is longer than PIECE_BYTES, or a record to skip.

    `text` is empty only for a record to skip.
    """

    text: str
    ends: bool
    """Whether a document ends with this piece."""
    bytes_read: int = 0
    """Bytes read from disk so far, before decompression; 0 for a stream."""
    position: Any = None
    """JSON that `Source.pieces` takes to resume after this piece; None when reading one file."""
    bad: str = ""
    """Why a record is skipped, with its file and line or row; "" for a document."""

    @property
    def continues(self) -> bool:
        """Whether the next piece belongs to the same document."""
        return not (self.ends or self.bad)


class Source(Protocol):
    """One input of any kind. It yields the same pieces in the same order each time."""

    @property
    def name(self) -> str:
        """The input as the user gave it."""

    @property
    def size(self) -> int | None:
        """Bytes on disk; None for a stream."""

    def describe(self) -> str:
        """Return a string that identifies the content, without reading it."""

    def pieces(self, position: Any) -> Iterator[Piece]:
        """Yield all pieces after `position`, that of an earlier piece, or None for the start.

        Only one such iterator may be used at a time. Raises DataError for unreadable input.
        """

    def sample(self, characters: int) -> Iterator[str]:
        """Yield at most about `characters` characters of its text, to train a tokenizer on."""


@dataclass
class Taken:
    """How much of one source a preparation has read."""

    position: Any = None
    inside: bool = False
    """Whether the last piece did not end its document."""
    bytes_read: int = 0
    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    unknown: int = 0
    """Unknown tokens among them."""
    characters: int = 0
    lost: int = 0
    """Characters that the tokens don't contain (data/tokenizer.py: `Losses`)."""
    skipped: int = 0
    """Records that could not be used (--skip-bad)."""

    def add(self, piece: Piece, tokens: int, unknown: int = 0, lost: int = 0) -> None:
        """Add a piece, the number of its tokens, and what they don't contain of it."""
        self.position, self.inside = piece.position, piece.continues
        self.bytes_read = piece.bytes_read
        self.documents += piece.ends
        self.text_bytes += len(piece.text.encode())
        self.tokens += tokens
        self.unknown += unknown
        self.characters += len(piece.text)
        self.lost += lost
        self.skipped += bool(piece.bad)


def bad_position(name: str, position: Any) -> DataError:
    """Return the error for a position that can't be one of this source."""
    return DataError(
        f"{name}: the unfinished preparation was at {shown(position)}, which is not a position"
        " in this input; its journal is damaged: delete the directory of --out to start over"
    )


def first_characters(pieces: Iterator[Piece], characters: int) -> Iterator[str]:
    """Yield the text of `pieces`, up to `characters` characters."""
    for piece in pieces:
        yield piece.text[:characters]
        characters -= len(piece.text)
        if characters <= 0:
            return


class BadRecord(DataError):
    """One record can't be used, while others in its file can."""

    def __init__(self, where: str, what: str, repair: str):
        super().__init__(f"{where}: {what}; {repair}, or skip bad records with --skip-bad")
        self.reason = f"{where}: {what}"

    @property
    def piece(self) -> Piece:
        """What stands for the record if it is skipped."""
        return Piece("", False, bad=self.reason)


def text_in(record: Mapping[str, Any], field: str, where: str) -> str:
    """Return the text of a record, "" for null. Raise BadRecord if there is no such string."""
    if field not in record:
        raise BadRecord(where, *_missing(record, field))
    text = record[field]
    if not isinstance(text, str | None):
        what = f"{field!r} is {type(text).__name__}, not a string (got {shown(text)})"
        raise BadRecord(where, what, "choose another --text-field")
    check_length(text or "", where)
    return text or ""


def type_of(types: Mapping[str, Any], field: str, where: str) -> Any:
    """Return the type of the column `field`, or raise DataError with the columns that exist."""
    if field not in types:
        raise DataError(f"{where}: {'; '.join(_missing(types, field))}")
    return types[field]


def _missing(record: Mapping[str, Any], field: str) -> tuple[str, str]:
    names = ", ".join(map(repr, islice(record, LONGEST_NAMES)))
    what = f"no field {field!r} (fields: {_cut(names, LONGEST_NAMES) or 'none'})"
    return what, "name it with --text-field"


def not_a_string(where: str, field: str, kind: str) -> DataError:
    """Return the error for a column of another type."""
    return DataError(f"{where}: {field!r} is {kind}, not a string; choose another --text-field")


def shown(value: Any) -> str:
    """Return `value` for a message, shortened."""
    short = Repr()  # also limits the depth
    short.maxstring = short.maxother = LONGEST_VALUE
    return _cut(short.repr(value), LONGEST_VALUE)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def check_length(content: str | bytes, where: str) -> None:
    """Raise BadRecord for a record that might not fit into memory when it is tokenized."""
    if len(content) > LARGEST_RECORD:
        raise BadRecord(where, f"longer than {LARGEST_RECORD:,} bytes", "split it")


def imported(module: str, needed_by: str) -> Any:
    """Import a module of the extra `data`. Raise DataError if it isn't installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise DataError(
            f"{needed_by}: reading it needs the package {error.name};"
            " install it with: pip install 'peptrain[data]'"
        ) from error
