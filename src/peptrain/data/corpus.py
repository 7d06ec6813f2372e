"""A prepared corpus: batches that are a pure function of seed, step and rank."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from peptrain.data.index import HELD_OUT, TOKENIZER, Index, TokenFile
from peptrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

Ids = NDArray[np.unsignedinteger]


@dataclass(frozen=True, eq=False)
class Corpus:
    """Memory-mapped token shards. Open one with `Corpus.open`."""

    path: Path
    vocab_size: int
    max_id: int
    """The largest id that occurs; a larger one is damage."""
    eos_id: int
    """The token after each document."""
    train_tokens: int
    fingerprint: str
    """16 hex digits that identify the data in checkpoints."""
    tokenizer_file: Path
    _shards: tuple[Ids, ...]
    _starts: NDArray[np.int64]
    """[shards + 1]: the number of the first token of each shard, and the total."""
    _held_out: Ids
    _names: tuple[str, ...]

    @classmethod
    def open(cls, path: Path) -> Corpus:
        """Map the files of a directory made by `prepare`; DataError if it isn't whole."""
        path = Path(path)
        index = Index.load(path)
        dtype = np.dtype(index.dtype)
        return cls(
            path=path,
            vocab_size=index.vocab_size,
            max_id=index.max_id,
            eos_id=index.eos_id,
            train_tokens=index.train_tokens,
            fingerprint=index.fingerprint,
            tokenizer_file=_tokenizer(path, index),
            _shards=tuple(_mapped(path, file, dtype) for file in index.train),
            _starts=np.cumsum([0, *(file.tokens for file in index.train)]),
            _held_out=_mapped(path, index.held_out, dtype),
            _names=tuple(file.name for file in index.train),
        )

    def windows(self, seq_len: int) -> int:
        """How many windows of seq_len inputs the training tokens hold; DataError if none."""
        windows = (self.train_tokens - 1) // seq_len
        if windows < 1:
            raise DataError(
                f"{self.path}: {self.train_tokens} training tokens don't fill one window of"
                f" {seq_len} + 1; choose a smaller seq_len or prepare more text"
            )
        return windows

    def batch(
        self, *, seed: int, step: int, rank: int, world: int, batch_size: int, seq_len: int
    ) -> torch.Tensor:
        """Rank `rank`'s rows of batch `step`: int64 [batch_size // world, seq_len + 1].

        A pure function of its arguments and the corpus. Sample i = step * batch_size + row is
        window order[i % windows] of epoch i // windows, where the order is a permutation given by
        (seed, epoch). Window w covers the tokens w * seq_len .. w * seq_len + seq_len, both
        inclusive: inputs, and targets one later. Ranks take contiguous slices of rows, so that
        together they read what one process would.
        """
        import torch

        if batch_size % world:
            raise ConfigError(
                f"batch_size: {batch_size} rows can't be shared by {world} processes;"
                f" choose a multiple of {world}"
            )
        windows, share = self.windows(seq_len), batch_size // world
        first = step * batch_size + rank * share
        rows = np.empty((share, seq_len + 1), np.int64)
        for row in range(share):
            epoch, place = divmod(first + row, windows)
            window = int(_order(seed, epoch, windows)[place])
            self._read(window * seq_len, rows[row])
        return torch.from_numpy(rows)

    def held_out(self) -> Ids:
        """All held-out ids [n], n may be 0: unsigned integers, mapped from the file."""
        self._check(self._held_out, HELD_OUT)
        return self._held_out

    def _read(self, start: int, out: NDArray[np.int64]) -> None:
        """Fill `out` with the training tokens from number `start` on."""
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        filled = 0
        while filled < len(out):
            begin = start + filled - self._starts[shard]
            part = self._shards[shard][begin : begin + len(out) - filled]
            self._check(part, self._names[shard])
            out[filled : filled + len(part)] = part
            filled += len(part)
            shard += 1

    def _check(self, ids: Ids, name: str) -> None:
        if len(ids) and ids.max() > self.max_id:
            raise DataError(
                f"{self.path / name}: damaged: it holds id {ids.max()}, the largest was"
                f" {self.max_id}; delete {self.path} and prepare it again"
            )


@lru_cache(maxsize=2)  # a batch may lie across two epochs
def _order(seed: int, epoch: int, windows: int) -> NDArray[np.int64]:
    """A permutation of range(windows), from raw bits and a stable sort.

    numpy promises these two for all versions, and `Generator.permutation` only for its own: a
    run that is resumed under another numpy must see the same order.
    """
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(windows)
    return np.argsort(bits, kind="stable")


def _tokenizer(directory: Path, index: Index) -> Path:
    """Its file, which says what the ids mean: another one would go into every run and export."""
    path = directory / TOKENIZER
    if not path.is_file() or sha256(path.read_bytes()).hexdigest() != index.tokenizer_sha256:
        raise DataError(
            f"{path}: missing or not the one of these tokens; delete {directory} and prepare it"
            " again"
        )
    return path


def _mapped(directory: Path, file: TokenFile, dtype: np.dtype[Any]) -> Ids:
    path = directory / file.name
    size, wanted = path.stat().st_size if path.exists() else 0, file.tokens * dtype.itemsize
    if size != wanted or not path.exists():
        raise DataError(
            f"{path}: truncated or missing ({size} bytes, {wanted} expected);"
            f" delete {directory} and prepare it again"
        )
    # As a plain array, which is sliced three times faster than numpy's memmap class.
    return np.asarray(np.memmap(path, dtype, "r")) if wanted else np.empty(0, dtype)
