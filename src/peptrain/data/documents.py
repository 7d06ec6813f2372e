"""Which documents there are, which of them are held out, and which a tokenizer is trained on."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from peptrain.data.config import PrepareConfig
from peptrain.data.sources import PIECE_BYTES, Piece, find_files, read_pieces
from peptrain.errors import DataError


class Part(NamedTuple):
    """A piece of a document, with its place in the corpus."""

    text: str
    ends: bool
    held_out: bool
    bytes_done: int
    """Of all input files as they lie on the disk, read so far."""


class Inputs:
    """The input files; one that is to be held out is not trained on, even if named twice."""

    def __init__(self, config: PrepareConfig):
        self._config = config
        self.held_out = find_files(config.held_out_inputs, "held_out_inputs")
        apart = {path.resolve() for path in self.held_out}
        found = find_files(config.inputs, "inputs")
        self.train = [path for path in found if path.resolve() not in apart]
        if not self.train:
            raise DataError("inputs: no file is left to train on; all are in held_out_inputs")
        self.fraction = 0.0 if self.held_out else config.held_out
        self.bytes = _bytes(self.train + self.held_out)

    def parts(self) -> Iterator[Part]:
        """Every document once, always in the same order, the held-out files last."""
        number, done = 0, 0
        for place, path in enumerate(self.train + self.held_out):
            for text, ends, position in self._read(path):
                held_out = place >= len(self.train) or is_held_out(number, self.fraction)
                yield Part(text, ends, held_out, done + position)
                number += ends
            done += path.stat().st_size

    def sample(self, characters: int) -> Iterator[str]:
        """Up to about so many characters of the training files, an equal share of each.

        Many files are visited in a shuffled but fixed order, a piece of each, up to the limit.
        Held-out documents are not left out: a tokenizer learns nothing of note from them.
        """
        files = list(self.train)
        random.Random(0).shuffle(files)
        share = max(characters // len(files), PIECE_BYTES)
        for path in files:
            room = min(share, characters)
            for piece in self._read(path):
                yield piece.text[:room]
                room -= len(piece.text)
                characters -= len(piece.text)
                if room <= 0:
                    break
            if characters <= 0:
                return

    def _read(self, path: Path) -> Iterator[Piece]:
        return read_pieces(path, self._config.text_field, self._config.decoding_errors)


def is_held_out(number: int, fraction: float) -> bool:
    """Whether document `number` is among the held-out fraction: a hash, the same everywhere.

    The first never is, so that something is left to train on.
    """
    digest = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8).digest()
    return number > 0 and int.from_bytes(digest, "little") < fraction * 2**64


def describe(files: Sequence[Path]) -> str:
    """Number, size and a hash of names and sizes: tells file sets apart without reading them."""
    names = "\n".join(f"{path.name} {path.stat().st_size}" for path in files)
    digest = hashlib.sha256(names.encode()).hexdigest()[:16]
    return f"{len(files)} files, {_bytes(files)} bytes, {digest}"


def _bytes(files: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in files)
