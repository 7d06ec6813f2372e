"""Token shards on the disk, written so that a preparation killed at any moment can go on.

Tokens gather in memory until they fill a shard. `Writer.commit` then writes the shard, appends
the held-out tokens of the same stretch, and last saves the progress, which alone says what counts:
whatever a killed process wrote after that is written again, to the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peptrain.data.documents import Part
from peptrain.data.index import (
    HELD_OUT,
    INDEX,
    JOURNAL,
    TokenFile,
    shard_name,
    write_json,
)
from peptrain.data.sources.base import Taken
from peptrain.errors import ConfigError, DataError
from peptrain.files import write_atomically
from peptrain.settings.fields import check

Ids = NDArray[np.unsignedinteger]
LEAST_HELD_OUT = 2  # tokens: a loss needs one to see and one to foretell


@dataclass
class Progress:
    """How far a preparation has come; every count is of the whole corpus so far."""

    settings: dict[str, Any]
    taken: list[Taken]
    """Of each source: those to train on and, after them, those to hold out."""
    held_out_documents: int = 0
    held_out_tokens: int = 0
    shards: list[int] = field(default_factory=list)
    """Tokens of each finished shard."""

    def save(self, directory: Path) -> None:
        write_json(directory / JOURNAL, asdict(self))

    @classmethod
    def open(cls, directory: Path, settings: dict[str, Any], sources: int) -> Progress:
        """The progress in `directory`, or none yet in a directory that is empty or made here.

        Raises ConfigError where something else lies there, or the progress of other settings.
        """
        new = "a new or empty directory"
        check(not directory.is_file(), "out", str(directory), f"{new}, and this is a file")
        finished = (directory / INDEX).exists()
        check(not finished, "out", str(directory), f"{new}, not a finished corpus")
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / JOURNAL).exists():
            return cls._reopen(directory, settings)
        found = sorted(p.name for p in directory.iterdir() if p.name != f"{JOURNAL}.tmp")
        check(not found, "out", str(directory), f"{new}, and this one contains {found[:1]}")
        progress = cls(settings, [Taken() for _ in range(sources)])
        progress.save(directory)
        return progress

    @classmethod
    def _reopen(cls, directory: Path, settings: dict[str, Any]) -> Progress:
        found = json.loads((directory / JOURNAL).read_bytes())
        progress = cls(**found | {"taken": [Taken(**taken) for taken in found["taken"]]})
        for key, begun in progress.settings.items():
            if begun != (now := settings.get(key)):
                raise ConfigError(
                    f"{key}: {now!r}, but the unfinished preparation in {directory} has {begun!r};"
                    " give the same settings to go on, or delete it"
                )
        return progress


class Writer:
    """Sorts the ids of parts into training shards and the held-out file."""

    def __init__(self, directory: Path, dtype: np.dtype[np.unsignedinteger], progress: Progress):
        self.directory, self.dtype, self.progress = directory, dtype, progress
        self._train: list[Ids] = []
        self._held_out: list[Ids] = []
        self._tokens = {True: 0, False: 0}  # in memory, held out or not

    @property
    def train_tokens(self) -> int:
        """Training tokens so far, on the disk or in memory."""
        return sum(self.progress.shards) + self._tokens[False]

    @property
    def pending(self) -> int:
        """Tokens in memory for the next shard, or for the held-out file if those are more."""
        return max(self._tokens.values())

    @property
    def tokens(self) -> int:
        """All tokens so far, on the disk or in memory."""
        return self.train_tokens + self.progress.held_out_tokens + self._tokens[True]

    def reached(self, tokens: float) -> bool:
        """Whether there are so many training tokens, and the last part ended its document."""
        return self.train_tokens >= tokens and not any(t.inside for t in self.progress.taken)

    def add(self, part: Part, ids: Ids) -> None:
        (self._held_out if part.held_out else self._train).append(ids)
        self._tokens[part.held_out] += len(ids)
        self.progress.taken[part.source].add(part.piece, len(ids))
        self.progress.held_out_documents += part.piece.ends and part.held_out

    def commit(self) -> None:
        """Put on the disk what is in memory, and then the progress."""
        if self._train:
            name = shard_name(len(self.progress.shards))
            write_atomically(self.directory / name, (ids.data for ids in self._train))
            self.progress.shards.append(self._tokens[False])
        self._append_held_out()
        self.progress.held_out_tokens += self._tokens[True]
        self.progress.save(self.directory)
        self._train, self._held_out = [], []
        self._tokens = {True: 0, False: 0}

    def _append_held_out(self) -> None:
        start = self.progress.held_out_tokens * self.dtype.itemsize
        path = self.directory / HELD_OUT
        with path.open("ab") as file:
            if file.tell() < start:
                raise _changed(path)
            file.truncate(start)  # what a killed process appended after it saved its progress
            for ids in self._held_out:
                file.write(ids.data)
            file.flush()
            os.fsync(file.fileno())

    def set_aside_tail(self, fraction: float) -> None:
        """Move the last `fraction` of the training tokens to the held-out file, still empty.

        At least LEAST_HELD_OUT are moved, if as many are left.
        A process killed in here can do it all again: the tail is copied before any shard is cut,
        and cutting to a length twice is cutting once. Only the index counts what is left.
        """
        lengths = np.array(self.progress.shards, np.int64)
        total = int(lengths.sum())
        moved = max(int(total * fraction), min(LEAST_HELD_OUT, total // 2))
        starts = lengths.cumsum() - lengths
        kept: list[int] = np.clip(total - moved - starts, 0, lengths).tolist()
        shards = [self.directory / shard_name(number) for number in range(len(kept))]
        if (self.directory / HELD_OUT).stat().st_size != moved * self.dtype.itemsize:
            both = zip(shards, kept, strict=True)
            tails = (np.fromfile(shard, self.dtype)[n:].data for shard, n in both)
            write_atomically(self.directory / HELD_OUT, tails)
        for shard, tokens in zip(shards, kept, strict=True):
            if tokens:
                os.truncate(shard, tokens * self.dtype.itemsize)
            else:
                shard.unlink(missing_ok=True)
        self.progress.shards = [tokens for tokens in kept if tokens]
        self.progress.held_out_tokens = moved

    def survey(self) -> tuple[tuple[TokenFile, ...], TokenFile, int]:
        """The finished training shards, the held-out file, and the largest id in any of them."""
        names = [shard_name(number) for number in range(len(self.progress.shards))]
        sizes = [*self.progress.shards, self.progress.held_out_tokens]
        largest, files = 0, []
        for name, tokens in zip([*names, HELD_OUT], sizes, strict=True):
            path = self.directory / name
            if not path.exists() or path.stat().st_size != tokens * self.dtype.itemsize:
                raise _changed(path)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if tokens:
                largest = max(largest, int(np.memmap(path, self.dtype, "r").max()))
            files.append(TokenFile(name, tokens, digest))
        return tuple(files[:-1]), files[-1], largest


def _changed(path: Path) -> DataError:
    return DataError(
        f"{path}: changed since it was written; delete {path.parent} and prepare it again"
    )
