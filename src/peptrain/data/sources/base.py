"""The interface of a text source, which yields documents and resumes from a position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple, Protocol

from peptrain.errors import DataError

PIECE_BYTES = 1 << 20  # bounds memory for text files; a cut in each 1 MB costs a token or two


class Piece(NamedTuple):
    """A document, or a part of one that is longer than PIECE_BYTES. `text` is never empty."""

    text: str
    ends: bool
    """Whether the document ends with this piece."""
    bytes_read: int = 0
    """Bytes read from disk so far, before decompression; 0 for a stream."""
    position: Any = None
    """JSON that `Source.pieces` takes to resume after this piece; None when reading one file."""


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

    def add(self, piece: Piece, tokens: int, unknown: int = 0, lost: int = 0) -> None:
        """Add a piece, the number of its tokens, and what they don't contain of it."""
        self.position, self.inside = piece.position, not piece.ends
        self.bytes_read = piece.bytes_read
        self.documents += piece.ends
        self.text_bytes += len(piece.text.encode())
        self.tokens += tokens
        self.unknown += unknown
        self.characters += len(piece.text)
        self.lost += lost


def first_characters(pieces: Iterator[Piece], characters: int) -> Iterator[str]:
    """Yield the text of `pieces`, up to `characters` characters."""
    for piece in pieces:
        yield piece.text[:characters]
        characters -= len(piece.text)
        if characters <= 0:
            return


def field_of(record: Mapping[str, Any], field: str, where: str) -> Any:
    """Return the value of the text field, or raise DataError with the fields that exist."""
    if field not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise DataError(f"{where}: no field {field!r} (fields: {keys}); name it with --text-field")
    return record[field]


def not_a_string(where: str, field: str, kind: str) -> DataError:
    """Return the error for a text field of another type."""
    return DataError(f"{where}: {field!r} is {kind}, not a string; choose another --text-field")


def imported(module: str, needed_by: str) -> Any:
    """Import a module of the extra `data`. Raise DataError if it isn't installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise DataError(
            f"{needed_by}: reading it needs the package {error.name};"
            " install it with: pip install 'peptrain[data]'"
        ) from error
