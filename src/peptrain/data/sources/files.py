"""Read the files of one input, a file or a directory, one after another."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from peptrain.data.sources.base import PIECE_BYTES, Piece, first_characters
from peptrain.data.sources.parquet import PARQUET_SUFFIX, read_rows
from peptrain.data.sources.text import JSON_SUFFIXES, TEXT_SUFFIXES, content_suffix, read_pieces
from peptrain.errors import DataError

KNOWN_SUFFIXES = (*JSON_SUFFIXES, *TEXT_SUFFIXES, PARQUET_SUFFIX)
UNREAD_PACKERS = (".zst", ".bz2", ".zip", ".7z", ".lz4", ".rar", ".tar", ".tgz")
NAMED_FOLDERS = 5


@dataclass(frozen=True)
class FileSet:
    """A source of files. A position is [index of the file, pieces read of it]."""

    name: str
    files: Sequence[Path]
    text_field: str
    errors: str
    """How to decode invalid UTF-8, as in `bytes.decode`: "strict" or "replace"."""

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def describe(self) -> str:
        return describe_files(self.files)

    def pieces(self, position: Sequence[int] | None) -> Iterator[Piece]:
        first, skipped = position or (0, 0)
        done = sum(path.stat().st_size for path in self.files[:first])
        for number, path in enumerate(self.files[first:], start=first):
            pieces = islice(enumerate(self._read(path), start=1), skipped, None)
            for count, piece in pieces:
                bytes_read = done + piece.bytes_read
                yield piece._replace(bytes_read=bytes_read, position=[number, count])
            done, skipped = done + path.stat().st_size, 0

    def sample(self, characters: int) -> Iterator[str]:
        """Yield an equal share of each file, in a shuffled but fixed order.

        A share is at least PIECE_BYTES, so of many files only the first are read.
        """
        files = list(self.files)
        random.Random(0).shuffle(files)
        share = max(characters // len(files), PIECE_BYTES)
        for path in files:
            for text in first_characters(self._read(path), min(share, characters)):
                yield text
                characters -= len(text)
            if characters <= 0:
                return

    def _read(self, path: Path) -> Iterator[Piece]:
        read = read_rows if path.suffix.lower() == PARQUET_SUFFIX else read_pieces
        return read(path, self.text_field, self.errors)


def describe_files(files: Sequence[Path]) -> str:
    """Return the number and size of the files, and a hash of their names and sizes."""
    sizes = [path.stat().st_size for path in files]
    names = "\n".join(f"{path.name} {size}" for path, size in zip(files, sizes, strict=True))
    digest = hashlib.sha256(names.encode()).hexdigest()[:16]
    return f"{len(files)} files, {sum(sizes)} bytes, {digest}"


def find_files(path: Path, key: str, apart: Collection[Path] = ()) -> list[Path]:
    """Return the file `path`, or the sorted known files of a directory, without those in `apart`.

    Raises DataError, naming the setting `key`, for a path that doesn't exist, a directory without
    known files, and a compression or archive format that isn't supported.
    """
    if not path.exists():
        raise DataError(f"{key}: {path}: no such file or directory")
    files = _known_files(path, key) if path.is_dir() else [path]
    for file in files:
        packed_twice = content_suffix(file) == PARQUET_SUFFIX != file.suffix.lower()
        if packed_twice or file.suffix.lower() in UNREAD_PACKERS:
            raise DataError(f"{key}: {file} has an unsupported format; unpack it first")
    return [file for file in files if file.resolve() not in apart]


def _known_files(directory: Path, key: str) -> list[Path]:
    entries = sorted(directory.iterdir())
    files = [f for f in entries if f.is_file() and content_suffix(f) in KNOWN_SUFFIXES]
    if files:
        return files
    folders = [str(f) for f in entries if f.is_dir() and not f.name.startswith(".")]
    more = f" and {len(folders) - NAMED_FOLDERS} more" if len(folders) > NAMED_FOLDERS else ""
    inside = f"; give one of them: {', '.join(folders[:NAMED_FOLDERS])}{more}" if folders else ""
    raise DataError(
        f"{key}: {directory} contains no {', '.join(KNOWN_SUFFIXES)} file, plain, .gz or .xz"
        f" (subdirectories are not searched){inside}"
    )
