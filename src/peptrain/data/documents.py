"""Which documents there are, which of them are held out, and which a tokenizer is trained on."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from peptrain.data.sources import PIECE_BYTES, find_files, read_pieces
from peptrain.errors import DataError


class Part(NamedTuple):
    """A piece of a document, with its place in the corpus."""

    text: str
    ends: bool
    held_out: bool
    bytes_done: int
    """Of all input files as they lie on the disk, read so far."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The input files and how they are read."""

    train: tuple[Path, ...]
    held_out: tuple[Path, ...]
    fraction: float
    """Of the documents in `train` to hold out; 0 if there are held-out files."""
    text_field: str
    errors: str
    """What codecs do about broken UTF-8: "strict" or "replace"."""

    @property
    def bytes(self) -> int:
        return _bytes(self.train) + _bytes(self.held_out)

    def parts(self) -> Iterator[Part]:
        """Every document once, always in the same order, the held-out files last."""
        number, done = 0, 0
        for path in (*self.train, *self.held_out):
            chosen = path in self.held_out
            for text, ends, position in read_pieces(path, self.text_field, self.errors):
                yield Part(text, ends, chosen or is_held_out(number, self.fraction), done + position)
                number += ends
            done += path.stat().st_size

    def sample(self, characters: int) -> Iterator[str]:
        """Up to about so many characters of the training files, an equal share of each.

        Many files are visited in a shuffled but fixed order, a piece of each, up to the limit.
        Held-out documents are not left out: what a tokenizer learns of 1% of the text is nothing.
        """
        files = list(self.train)
        random.Random(0).shuffle(files)
        share = max(characters // len(files), PIECE_BYTES)
        for path in files:
            room = min(share, characters)
            for piece in read_pieces(path, self.text_field, self.errors):
                yield piece.text[:room]
                room -= len(piece.text)
                characters -= len(piece.text)
                if room <= 0:
                    break
            if characters <= 0:
                return


def find_inputs(
    inputs: Sequence[Path],
    held_out_inputs: Sequence[Path],
    *,
    fraction: float,
    text_field: str,
    errors: str,
) -> Inputs:
    """Look for the files; a held-out file that is also among the inputs is not trained on."""
    held_out = find_files(held_out_inputs, "held_out_inputs")
    apart = {path.resolve() for path in held_out}
    train = [path for path in find_files(inputs, "inputs") if path.resolve() not in apart]
    if not train:
        raise DataError("inputs: no file is left to train on; all are held out")
    return Inputs(
        train=tuple(train),
        held_out=tuple(held_out),
        fraction=0.0 if held_out else fraction,
        text_field=text_field,
        errors=errors,
    )


def is_held_out(number: int, fraction: float) -> bool:
    """Whether document `number` is among the held-out fraction: a hash, the same everywhere."""
    digest = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def describe(files: Sequence[Path]) -> str:
    """Number, size and a hash of names and sizes: tells file sets apart without reading them."""
    names = "\n".join(f"{path.name} {path.stat().st_size}" for path in files)
    digest = hashlib.sha256(names.encode()).hexdigest()[:16]
    return f"{len(files)} files, {_bytes(files)} bytes, {digest}"


def _bytes(files: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in files)
