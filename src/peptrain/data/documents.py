"""Choose the documents to train on, to hold out, and to train a tokenizer on."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from peptrain.data.config import PrepareConfig
from peptrain.data.sources.base import Piece, Source, Taken
from peptrain.data.sources.files import FileSet, find_files, warn_of_formats
from peptrain.data.sources.hub import SCHEME, HubStream, SavedDataset, is_saved_dataset
from peptrain.data.sources.mixture import furthest_behind, mixed, one_after_another
from peptrain.errors import DataError
from peptrain.settings.fields import as_path


class Part(NamedTuple):
    """A piece of a document, its source, and whether it is held out."""

    source: int
    """Index of the source in the list of training sources, followed by held-out sources."""
    piece: Piece
    held_out: bool


class Inputs:
    """The sources to train on and to hold out. A held-out file is never trained on."""

    def __init__(self, config: PrepareConfig):
        self._weights = config.weights
        apart = [open_source(given, "held_out_inputs", config) for given in config.held_out_inputs]
        self.held_out = [source for source in apart if source]
        self.train = list(self._training_sources(config))
        self.fraction = 0.0 if self.held_out else config.held_out
        sets = [s for s in (*self.train, *self.held_out) if isinstance(s, FileSet)]
        warn_of_formats(dict.fromkeys(file for source in sets for file in source.files))
        self._check_text()

    def _training_sources(self, config: PrepareConfig) -> Iterator[Source]:
        names = {source.name for source in self.held_out}
        sets = [source for source in self.held_out if isinstance(source, FileSet)]
        files = {path.resolve() for source in sets for path in source.files}
        left = 0
        for given in config.inputs:
            source = None if str(given) in names else open_source(given, "inputs", config, files)
            left += source is not None
            if source:
                yield source
            elif config.weights:
                raise DataError(
                    f"inputs: {given} is also in held_out_inputs; remove it and its weight"
                )
        if not left:
            raise DataError("inputs: no file is left to train on; all are in held_out_inputs")

    def _check_text(self) -> None:
        """Raise DataError before anything is written if there is no text to train on.

        In a mixture every source must have text.
        """
        first = [(source, _first(source)) for source in self.train]
        empty = [source.name for source, piece in first if not (piece and piece.text)]
        if len(empty) == len(self.train) or (empty and self._weights):
            bad = next((f"; {piece.bad}" for _, piece in first if piece and piece.bad), "")
            raise DataError(f"inputs: no text in {', '.join(empty)}{bad}")

    def training(self, taken: Sequence[Taken]) -> Iterator[Part]:
        """Yield every document of the training sources, including those that the hash holds out.

        The order is always the same and continues after what was `taken` of each source. The hash
        is of a document's index within its source, so a source that is listed twice has the same
        documents held out both times.
        """
        taken = taken[: len(self.train)]
        numbers = [t.documents for t in taken]
        if self._weights:
            pieces = mixed(self.train, self._weights, taken)
        else:
            pieces = one_after_another(self.train, taken)
        for source, piece in pieces:
            yield Part(source, piece, is_held_out(numbers[source], self.fraction))
            numbers[source] += piece.ends

    def apart(self, taken: Sequence[Taken]) -> Iterator[Part]:
        """Yield every document of the held-out sources, in order, after what was `taken`."""
        first = len(self.train)
        for source, piece in one_after_another(self.held_out, taken[first:]):
            yield Part(first + source, piece, True)

    def ended(self, taken: Sequence[Taken]) -> tuple[Source, Taken]:
        """Return the source that ended a weighted mixture: the one that would be read next."""
        taken = taken[: len(self.train)]
        number = furthest_behind([t.text_bytes for t in taken], self._weights)
        return self.train[number], taken[number]

    def share_read(self, taken: Sequence[Taken]) -> float | None:
        """Return the share of the input that is read, from 0 to 1, or None if its size is unknown.

        Streams have no known size.
        """
        sources = [*self.train, *self.held_out]
        if any(source.size is None for source in sources):
            return None
        read = [(t.bytes_read, source.size or 1) for t, source in zip(taken, sources, strict=True)]
        if self._weights:  # a mixture ends with the first source that ends
            return max(done / size for done, size in read)
        return sum(done for done, _ in read) / sum(size for _, size in read)

    def sample(self, characters: int) -> Iterator[str]:
        """Yield at most about `characters` characters to train a tokenizer on, split among sources.

        Held-out documents are included: their effect on a tokenizer is negligible.
        """
        shares = self._weights or [1 / len(self.train)] * len(self.train)
        for source, share in zip(self.train, shares, strict=True):
            yield from source.sample(max(1, int(share * characters)))


def _first(source: Source) -> Piece | None:
    """Return the first document, or if there is none, the first bad record."""
    bad = None
    for piece in source.pieces(None):
        if piece.text:
            return piece
        bad = bad or piece
    return bad


def open_source(
    given: str | Path, key: str, config: PrepareConfig, apart: Collection[Path] = ()
) -> Source | None:
    """Open one input. Return None if it consists of files that are all in `apart`."""
    if str(given).startswith(SCHEME):
        return HubStream(str(given), key, config.text_field, config.skip_bad)
    path = as_path(str(given), key)
    if path.is_dir() and is_saved_dataset(path, key):
        return SavedDataset(path, config.text_field, config.decoding_errors, config.skip_bad)
    files = find_files(path, key, apart)
    if not files:
        return None
    return FileSet(str(given), files, config.text_field, config.decoding_errors, config.skip_bad)


def is_held_out(number: int, fraction: float) -> bool:
    """Return whether document `number` of a source is held out, by a hash of the number.

    The first document never is, so that something is left to train on.
    """
    digest = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8).digest()
    return number > 0 and int.from_bytes(digest, "little") < fraction * 2**64


def describe(sources: Sequence[Source]) -> str:
    """Return a string that identifies the sources, without reading them."""
    return " + ".join(source.describe() for source in sources)
