"""Write token shards such that a preparation can be resumed after it was killed at any moment.

Tokens collect in memory until they fill a shard. `Writer.commit` then writes the shard, appends
the held-out tokens since the previous commit, and finally saves the progress. Only the saved
progress counts: what a killed process wrote after it is written again, with the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from peptrain.data.documents import Part
from peptrain.data.index import (
    HELD_OUT,
    INDEX,
    JOURNAL,
    TOKENIZER,
    Rule,
    TokenFile,
    check_rules,
    count,
    damaged,
    read_checked,
    shard_name,
    write_checked,
)
from peptrain.data.sources.base import Taken
from peptrain.data.tokenizer import Losses
from peptrain.errors import ConfigError
from peptrain.files import is_scratch, leading_out, no_links, write_atomically
from peptrain.settings.fields import check

Ids = NDArray[np.unsignedinteger]
COUNTS = ("bytes_read", "documents", "text_bytes", "tokens", "skipped", "unknown", "characters",
          "lost")  # fmt: skip
SINCE_0_1_0 = {"special_tokens", "skip_bad", "on_bad_utf8"}  # settings that its journals lack
CHANGED = "changed since it was written"
LEAST_HELD_OUT = 2  # tokens: a loss needs an input and a target


@dataclass
class Progress:
    """Progress of a preparation. Counts are totals over all calls."""

    settings: dict[str, Any]
    taken: list[Taken]
    """One for each source: those to train on, followed by those to hold out."""
    held_out_documents: int = 0
    held_out_tokens: int = 0
    shards: list[int] = field(default_factory=list)
    """Tokens of each finished shard."""
    sums: dict[str, int] = field(default_factory=dict)
    """CRC-32 of what was written of each file; empty where 0.1.0 began."""

    def save(self, directory: Path) -> None:
        write_checked(directory / JOURNAL, asdict(self))

    @classmethod
    def open(cls, directory: Path, settings: dict[str, Any], sources: int) -> Progress:
        """Load the progress in `directory`, or start from zero in a new or empty directory.

        Raises ConfigError if the directory contains anything else, or has other settings.
        """
        new = "a new or empty directory"
        usable = directory.is_dir() or not directory.exists()
        check(usable, "out", str(directory), f"{new}, not a file")
        finished = (directory / INDEX).exists()
        check(not finished, "out", str(directory), f"{new}, not a finished corpus")
        directory.mkdir(parents=True, exist_ok=True)
        entries = [p for p in directory.iterdir() if not is_scratch(p)]
        if (directory / JOURNAL).exists():
            outside = leading_out(directory, [p.name for p in entries])
            check(outside is None, "out", str(outside), "a file in --out, not a link to elsewhere")
            return cls._reopen(directory, settings, sources)
        found = sorted(p.name for p in entries if p.name != f"{JOURNAL}.tmp")  # of version 0.1.0
        lost = f" and no {JOURNAL}; delete it to start over" * all(map(is_ours, found))
        check(not found, "out", str(directory), f"{new}, but it contains {found[:1]}{lost}")
        progress = cls(settings, [Taken() for _ in range(sources)])
        progress.save(directory)
        return progress

    @classmethod
    def _reopen(cls, directory: Path, settings: dict[str, Any], sources: int) -> Progress:
        path = directory / JOURNAL
        found = read_checked(path)
        try:
            progress = cls(**found | {"taken": [Taken(**taken) for taken in found["taken"]]})
        except (KeyError, TypeError) as error:
            raise damaged(path, f"damaged ({error})") from error
        if not isinstance(progress.settings, dict):
            raise damaged(path, "damaged (settings: must be an object)")
        if missing := settings.keys() - progress.settings.keys() - SINCE_0_1_0:
            raise damaged(path, f"damaged (settings: {min(missing)} is missing)")
        for key, before in progress.settings.items():
            if before != (now := settings.get(key)) and not (key == "skip_bad" and now):
                raise ConfigError(
                    f"{key}: {now!r}, but the unfinished preparation in {directory} has {before!r};"
                    " use the same settings to resume it, or delete it"
                )
        check_rules(path, progress._rules(sources))
        if settings.get("skip_bad"):  # may be added, as nothing bad was met without it
            progress.settings |= {key: settings[key] for key in ("skip_bad", "on_bad_utf8")}
        return progress

    def _rules(self, sources: int) -> Iterator[Rule]:
        yield "taken", len(self.taken), len(self.taken) == sources, f"{sources} inputs"
        for taken in self.taken:
            yield "inside", taken.inside, isinstance(taken.inside, bool), "true or false"
            for key in COUNTS:
                yield count(key, getattr(taken, key))
        yield count("held_out_documents", self.held_out_documents)
        yield count("held_out_tokens", self.held_out_tokens)
        sums = isinstance(self.sums, dict) and all(type(v) is int for v in self.sums.values())
        yield "sums", self.sums, sums, "checksums by name"
        yield "shards", self.shards, isinstance(self.shards, list), "a list"
        yield from (count("shards", tokens) for tokens in self.shards)


def is_ours(name: str) -> bool:
    """Return whether a file of that name may be one of a preparation."""
    return name in (TOKENIZER, HELD_OUT) or re.fullmatch(r"train-\d+\.bin", name) is not None


class Writer:
    """Write the ids of parts to the training shards and the held-out file."""

    def __init__(self, directory: Path, dtype: np.dtype[np.unsignedinteger], progress: Progress):
        self.directory, self.dtype, self.progress = directory, dtype, progress
        self._train: list[Ids] = []
        self._held_out: list[Ids] = []
        self._tokens = {True: 0, False: 0}  # in memory; the key is whether held out
        self._verify()

    def _verify(self) -> None:
        """Raise DataError for a file that has changed since an interrupted preparation wrote it."""
        sums = self.progress.sums
        first = TOKENIZER not in sums  # of a new preparation, or one that 0.1.0 began
        tokens = {shard_name(i): n for i, n in enumerate(self.progress.shards)}
        tokens[HELD_OUT] = self.progress.held_out_tokens
        sizes = {name: n * self.dtype.itemsize for name, n in tokens.items()}
        sizes[TOKENIZER] = (self.directory / TOKENIZER).stat().st_size
        for name, size in sizes.items():
            path = self.directory / name
            # A shard that is shorter lost its tail to the held-out file, or else `survey` finds it.
            if path.is_file() and path.stat().st_size >= size:
                found = _crc(path, size)
                if found != (sums.setdefault(name, found) if first else sums.get(name, 0)):
                    raise damaged(path, CHANGED)
        if first:
            self.progress.save(self.directory)

    @property
    def train_tokens(self) -> int:
        """Training tokens so far, on disk or in memory."""
        return sum(self.progress.shards) + self._tokens[False]

    @property
    def pending(self) -> int:
        """Training tokens in memory, or held-out tokens in memory if there are more of those."""
        return max(self._tokens.values())

    @property
    def tokens(self) -> int:
        """All tokens so far, on disk or in memory."""
        return self.train_tokens + self.progress.held_out_tokens + self._tokens[True]

    def reached(self, tokens: float) -> bool:
        """Return whether there are `tokens` or more training tokens and no unfinished document."""
        return self.train_tokens >= tokens and not any(t.inside for t in self.progress.taken)

    def add(self, part: Part, ids: Ids, losses: Losses) -> None:
        (self._held_out if part.held_out else self._train).append(ids)
        self._tokens[part.held_out] += len(ids)
        self.progress.taken[part.source].add(part.piece, len(ids), losses.unknown, losses.lost)
        self.progress.held_out_documents += part.piece.ends and part.held_out

    def commit(self) -> None:
        """Write the tokens in memory to disk, then the progress."""
        if self._train:
            name = shard_name(len(self.progress.shards))
            write_atomically(self.directory / name, (ids.data for ids in self._train))
            self.progress.sums[name] = _crc_of(self._train)
            self.progress.shards.append(self._tokens[False])
        self._append_held_out()
        self.progress.held_out_tokens += self._tokens[True]
        known = self.progress.sums.get(HELD_OUT, 0)
        self.progress.sums[HELD_OUT] = _crc_of(self._held_out, known)
        self.progress.save(self.directory)
        self._train, self._held_out = [], []
        self._tokens = {True: 0, False: 0}

    def _append_held_out(self) -> None:
        start = self.progress.held_out_tokens * self.dtype.itemsize
        path = self.directory / HELD_OUT
        with open(path, "ab", opener=no_links) as file:
            if file.tell() < start:
                raise damaged(path, CHANGED)
            file.truncate(start)  # drop what a killed process appended last
            for ids in self._held_out:
                file.write(ids.data)
            file.flush()
            os.fsync(file.fileno())

    def set_aside_tail(self, fraction: float) -> None:
        """Move the last `fraction` of the training tokens to the held-out file, so far empty.

        At least LEAST_HELD_OUT tokens are moved, if as many remain for training. After a kill
        all of this can be repeated: the tail is copied before any shard is truncated, and
        truncating twice changes nothing. The new lengths are saved only in the index.
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
        """Return the training shards, the held-out file, and the largest id in any of them."""
        names = [shard_name(number) for number in range(len(self.progress.shards))]
        sizes = [*self.progress.shards, self.progress.held_out_tokens]
        largest, files = 0, []
        for name, tokens in zip([*names, HELD_OUT], sizes, strict=True):
            path = self.directory / name
            if not path.exists() or path.stat().st_size != tokens * self.dtype.itemsize:
                raise damaged(path, CHANGED)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if tokens:
                largest = max(largest, int(np.memmap(path, self.dtype, "r").max()))
            files.append(TokenFile(name, tokens, digest))
        return tuple(files[:-1]), files[-1], largest


def _crc_of(ids: list[Ids], known: int = 0) -> int:
    for part in ids:
        known = crc32(part.data, known)
    return known


def _crc(path: Path, size: int) -> int:
    """Return the CRC-32 of the first `size` bytes of a file."""
    found = 0
    with path.open("rb") as file:
        while size and (part := file.read(min(size, 1 << 20))):
            found, size = crc32(part, found), size - len(part)
    return found
