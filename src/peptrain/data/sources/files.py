"""Read the files of one input, a file or a directory, one after another."""

from __future__ import annotations

import hashlib
import logging
import os
import random
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from peptrain.data.sources.base import PIECE_BYTES, Piece, bad_position, first_characters
from peptrain.data.sources.names import (
    JSON_SUFFIXES,
    KNOWN_SUFFIXES,
    PACKERS,
    PARQUET_SUFFIX,
    UNREAD_PACKERS,
    content_suffix,
    is_card,
    is_metadata,
    is_test_set,
    split_name,
)
from peptrain.data.sources.parquet import read_rows
from peptrain.data.sources.text import looks_like, read_pieces, unreadable
from peptrain.errors import DataError
from peptrain.files import quoted

INPUTS = "inputs"
NAMED = 5  # folders or kinds of files in a message
CHECKED = 1000  # text files whose first line is looked at
LEVELS = 32  # of subdirectories
HIDDEN, DESCRIPTION, FOLDER = "hidden", "describing the data", "subdirectory"
FORMATTED = (*JSON_SUFFIXES, PARQUET_SUFFIX)
MARKUP = {".csv": "CSV", ".tsv": "TSV", ".html": "HTML", ".htm": "HTML", ".xml": "XML"}
log = logging.getLogger("peptrain")


@dataclass(frozen=True)
class FileSet:
    """A source of files. A position is [index of the file, pieces read of it]."""

    name: str
    files: Sequence[Path]
    text_field: str
    errors: str
    """How to decode invalid UTF-8, as in `bytes.decode`: "strict" or "replace"."""
    skip_bad: bool = False
    """Whether a record that can't be used is a piece that is marked as bad, not an error."""

    @property
    def size(self) -> int:
        return sum(map(size_of, self.files))

    def describe(self) -> str:
        return describe_files(self.files)

    def pieces(self, position: Sequence[int] | None) -> Iterator[Piece]:
        match position:
            case None:
                first, skipped = 0, 0
            case [int(first), int(skipped)] if 0 <= first < len(self.files) and skipped >= 0:
                pass
            case _:
                raise bad_position(self.name, position)
        done = sum(map(size_of, self.files[:first]))
        for number, path in enumerate(self.files[first:], start=first):
            pieces = islice(enumerate(self._read(path), start=1), skipped, None)
            for count, piece in pieces:
                bytes_read = done + piece.bytes_read
                yield piece._replace(bytes_read=bytes_read, position=[number, count])
            done, skipped = done + size_of(path), 0

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
        read = read_rows if content_suffix(path) == PARQUET_SUFFIX else read_pieces
        return read(path, self.text_field, self.errors, self.skip_bad)


def size_of(path: Path) -> int:
    """Return the size of a file. Raise DataError if it can't be read."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from error


def describe_files(files: Sequence[Path]) -> str:
    """Return the number and size of the files, and a hash of their names and sizes.

    A name includes the subdirectories in which the files differ. It need not be UTF-8.
    """
    root = os.path.commonpath([path.absolute().parent for path in files]) if files else ""
    sizes = list(map(size_of, files))
    names = [path.absolute().relative_to(root) for path in files]
    lines = "\n".join(f"{name} {size}" for name, size in zip(names, sizes, strict=True))
    digest = hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"{len(files)} files, {sum(sizes)} bytes, {digest}"


def find_files(path: Path, key: str, apart: Collection[Path] = ()) -> list[Path]:
    """Return the file `path`, or the known files of a directory, without those in `apart`.

    A directory's files are sorted. If it has none, or only files that describe others, its
    subdirectories are searched. What is passed over is logged. Raises DataError, naming the setting
    `key`, for a path that doesn't exist or isn't a file, a directory without known files, and a
    compression or archive format that isn't supported.
    """
    if not path.exists():
        raise DataError(f"{key}: {path}: no such file or directory")
    files = _Search(path, key).files() if path.is_dir() else [path]
    for file in files:
        _check_is_file(file, key)
        content, packer = split_name(file)
        if content in UNREAD_PACKERS or (content == PARQUET_SUFFIX and packer):
            raise DataError(f"{key}: {file} has an unsupported format; unpack it first")
    files = [file for file in files if file.resolve() not in apart]
    if key == INPUTS and path.is_dir():
        _warn_of_held_out(path, files)
    return files


def _warn_of_held_out(root: Path, files: Sequence[Path]) -> None:
    """Log a warning if a few files, by their names, are a test or validation set."""
    named = [file for file in files if is_test_set(file.relative_to(root))]
    if named and len(named) < len(files):
        more = f" and {len(named) - 1} more" if named[1:] else ""
        log.warning(
            "%s: %s%s is trained on too, although its name is that of held-out text; if it should"
            " not be, give `--held-out-inputs %s`",
            *(INPUTS, named[0], more, " ".join(map(quoted, named[:NAMED]))),
        )


def _check_is_file(path: Path, key: str) -> None:
    """Raise DataError for a pipe, which could be read only once, and for a link to nothing."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "a pipe (FIFO)", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise DataError(
            f"{key}: {path} is {kind}, and inputs are read more than once; save its content to a"
            " file and give that file"
        )


class _Search:
    """A search for the known files of a directory, and what it passes over, by kind."""

    def __init__(self, root: Path, key: str):
        self._root, self._key = root, key
        self._passed: dict[str, list[Path]] = {}

    def files(self) -> list[Path]:
        files = sorted(self._files(self._root, LEVELS))
        data = [path for path in files if not is_card(path)]
        if any(content_suffix(path) != ".md" for path in data):  # else a README is one of them
            self._pass(DESCRIPTION, filter(is_card, files))
            files = data
        if not files:
            known, packers = ", ".join(KNOWN_SUFFIXES), ", ".join(PACKERS)
            raise DataError(
                f"{self._key}: {self._root} contains no {known} file, plain or packed ({packers});"
                f" it contains {self._summary() or 'nothing'}"
            )
        if self._passed:
            usual = self._passed.keys() <= {HIDDEN, DESCRIPTION}
            log.log(
                logging.INFO if usual else logging.WARNING,
                "%s: %s: files to read: %d; passed over: %s",
                *(self._key, self._root, len(files), self._summary()),
            )
        return files

    def _files(self, directory: Path, levels: int) -> list[Path]:
        known, folders = self._entries(directory)
        self._pass(DESCRIPTION, filter(is_metadata, known))
        files = [path for path in known if not is_metadata(path)]
        if all(map(is_card, files)):
            inside = [path for path in folders if levels and not path.is_symlink()]
            files += [file for folder in inside for file in self._files(folder, levels - 1)]
            folders = [path for path in folders if path not in inside]
        self._pass(FOLDER, folders)
        return files

    def _entries(self, directory: Path) -> tuple[list[Path], list[Path]]:
        """Return the sorted files of known names and the subdirectories."""
        known, folders = list[Path](), list[Path]()
        try:
            entries = sorted(directory.iterdir())
        except OSError as error:
            raise unreadable(directory, error) from error
        for path in entries:
            if path.name.startswith("."):
                self._pass(HIDDEN, [path])
            elif path.is_dir():
                folders.append(path)
            elif content_suffix(path) in KNOWN_SUFFIXES:
                known.append(path)
            else:
                self._pass(content_suffix(path) or path.suffix or "without a suffix", [path])
        return known, folders

    def _pass(self, kind: str, paths: Iterable[Path]) -> None:
        for path in paths:
            self._passed.setdefault(kind, []).append(path)

    def _summary(self) -> str:
        """Return the count of each kind, with the first names: "2 .csv (a.csv, b.csv)"."""
        kinds = sorted(self._passed, key=lambda kind: (-len(self._passed[kind]), kind))
        said = [self._named(kind) for kind in kinds[:NAMED]]
        rest = sum(len(self._passed[kind]) for kind in kinds[NAMED:])
        return ", ".join([*said, f"{rest} more"] if rest else said)

    def _named(self, kind: str) -> str:
        paths = self._passed[kind]
        names = [str(path.relative_to(self._root)) for path in paths[:NAMED]]
        more = ", ..." if len(paths) > NAMED else ""
        if kind == FOLDER and len(paths) > 1:
            kind = "subdirectories"
        return f"{len(paths)} {kind} ({', '.join(names)}{more})"


def warn_of_formats(files: Iterable[Path]) -> None:
    """Log a warning for each format of which a file is read as plain text, as one document.

    Looks into the first CHECKED text files. Raises DataError for one that can't be read.
    """
    texts = (path for path in files if content_suffix(path) not in FORMATTED)
    found: dict[str, list[Path]] = {}
    for path in islice(texts, CHECKED):
        if kind := MARKUP.get(content_suffix(path)) or looks_like(path):
            found.setdefault(kind, []).append(path)
    for kind, paths in found.items():
        more = f" and {len(paths) - 1} more" if paths[1:] else ""
        repair = (
            "name it .jsonl, one object per line" if kind == "JSON" else "convert it to JSON Lines"
        )
        log.warning(
            "inputs: %s%s: %s, but read as plain text, a file as one document; for a document per"
            " record, %s",
            *(paths[0], more, kind, repair),
        )
