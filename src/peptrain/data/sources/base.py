"""What a preparation reads from: anything that yields documents and can go on where it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple, Protocol

from peptrain.errors import DataError

PIECE_BYTES = 1 << 20  # of a text file; bounds memory, and one cut in 1 MB costs a token or two


class Piece(NamedTuple):
    """A document, or a part of one that is longer than PIECE_BYTES. `text` is never empty."""

    text: str
    ends: bool
    """Whether the document ends with this piece."""
    bytes_read: int = 0
    """Of what lies on the disk, packed or not, read so far; stays 0 for a stream."""
    position: Any = None
    """What `Source.pieces` takes to go on after this piece; JSON. Single files have none."""


class Source(Protocol):
    """One input, whatever it is made of. Its pieces are the same in the same order each time."""

    @property
    def name(self) -> str:
        """As it was given."""

    @property
    def size(self) -> int | None:
        """Bytes on the disk; None for a stream."""

    def describe(self) -> str:
        """Tells its content apart from other content, without reading it."""

    def pieces(self, position: Any) -> Iterator[Piece]:
        """All pieces after `position`, which is that of an earlier piece, or None for the start.

        One such iterator at a time. Raises DataError for what can't be read.
        """

    def sample(self, characters: int) -> Iterator[str]:
        """Up to about so many characters of its text, for training a tokenizer."""


@dataclass
class Taken:
    """What a preparation has taken from one source."""

    position: Any = None
    inside: bool = False
    """Whether the last piece was not the end of its document."""
    bytes_read: int = 0
    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0

    def add(self, piece: Piece, tokens: int) -> None:
        """Count a piece and the tokens made of it."""
        self.position, self.inside = piece.position, not piece.ends
        self.bytes_read = piece.bytes_read
        self.documents += piece.ends
        self.text_bytes += len(piece.text.encode())
        self.tokens += tokens


def first_characters(pieces: Iterator[Piece], characters: int) -> Iterator[str]:
    """The text of `pieces` up to so many characters."""
    for piece in pieces:
        yield piece.text[:characters]
        characters -= len(piece.text)
        if characters <= 0:
            return


def field_of(record: Mapping[str, Any], field: str, where: str) -> Any:
    """The value of the text field; DataError that names the fields there are."""
    if field not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise DataError(f"{where}: no field {field!r} (fields: {keys}); name it with --text-field")
    return record[field]


def not_a_string(where: str, field: str, kind: str) -> DataError:
    """What to say of a text field that holds something else."""
    return DataError(f"{where}: {field!r} is {kind}, not a string; choose another --text-field")


def imported(module: str, needed_by: str) -> Any:
    """A module of the extra `data`; DataError with the repair where it isn't installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise DataError(
            f"{needed_by}: reading it needs the package {error.name};"
            " install it with: pip install 'peptrain[data]'"
        ) from error
