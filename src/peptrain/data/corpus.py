"""Read batches of a prepared corpus as a pure function of seed, step and rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from peptrain.data.index import HELD_OUT, TOKENIZER, Index, TokenFile, check_inside, damaged
from peptrain.data.verify import verify, verify_shards
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
    """The largest id in the corpus. A larger one means that a file is damaged."""
    eos_id: int
    """The id of the token that ends each document."""
    special_tokens: Mapping[str, str]
    """The tokenizer's other special tokens, and its chat template, for exports."""
    train_tokens: int
    fingerprint: str
    """16 hex digits that identify the data in checkpoints."""
    tokenizer_file: Path
    _shards: tuple[Ids, ...]
    _starts: NDArray[np.int64]
    """[shards + 1]: the index of each shard's first token, then the number of all tokens."""
    _held_out: Ids
    _names: tuple[str, ...]

    @classmethod
    def open(cls, path: Path, *, verify_again: bool = False) -> Corpus:
        """Memory-map a directory made by `prepare`. Raise DataError if it is incomplete or damaged.

        All files are compared with their checksums. Of the shards that is remembered in the cache
        directory, and only repeated after they changed, or if `verify_again` is given.
        """
        path = Path(path)
        index = Index.load(path)
        dtype = np.dtype(index.dtype)
        for file in (*index.train, index.held_out):
            _check_file(path / file.name, file.tokens * dtype.itemsize)
        verify(path / index.held_out.name, index.held_out.sha256)
        verify_shards(path, index.train, again=verify_again)
        return cls(
            path=path,
            vocab_size=index.vocab_size,
            max_id=index.max_id,
            eos_id=index.eos_id,
            special_tokens=index.special_tokens,
            train_tokens=index.train_tokens,
            fingerprint=index.fingerprint,
            tokenizer_file=_tokenizer(path, index),
            _shards=tuple(_mapped(path, file, dtype) for file in index.train),
            _starts=np.cumsum([0, *(file.tokens for file in index.train)]),
            _held_out=_mapped(path, index.held_out, dtype),
            _names=tuple(file.name for file in index.train),
        )

    def windows(self, seq_len: int) -> int:
        """Return the number of windows of seq_len inputs; raise DataError if there is none."""
        windows = (self.train_tokens - 1) // seq_len
        if windows < 1:
            raise DataError(
                f"train.seq_len: {self.path}: {self.train_tokens} training tokens don't fill one"
                f" window of {seq_len} + 1; choose a smaller value or prepare more text"
            )
        return windows

    def batch(
        self, *, seed: int, step: int, rank: int, world: int, batch_size: int, seq_len: int
    ) -> torch.Tensor:
        """Return process `rank`'s rows of batch `step`: int64 [batch_size // world, seq_len + 1].

        A pure function of its arguments and the corpus. Sample i = step * batch_size + row is
        window order[i % windows] of epoch i // windows, where `order` is a permutation given by
        (seed, epoch). Window w covers the tokens w * seq_len to w * seq_len + seq_len, both
        inclusive: the inputs, and the targets one position later. Processes take contiguous slices
        of rows, so that together they read the same batch as a single process.
        """
        import torch

        if batch_size % world:
            raise ConfigError(
                f"batch_size: can't be divided among {world} processes (got {batch_size});"
                f" choose a multiple of {world}"
            )
        windows, share = self.windows(seq_len), batch_size // world
        first = step * batch_size + rank * share
        rows = np.empty((share, seq_len + 1), np.int64)
        for row in range(share):
            epoch, place = divmod(first + row, windows)
            window = int(order(seed, epoch, windows)[place])
            self._read(window * seq_len, rows[row])
        return torch.from_numpy(rows)

    def held_out(self) -> Ids:
        """Return all held-out ids [n] as memory-mapped unsigned integers. n may be 0."""
        self._check(self._held_out, HELD_OUT)
        return self._held_out

    def _read(self, start: int, out: NDArray[np.int64]) -> None:
        """Fill `out` with consecutive training tokens, beginning at index `start`."""
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
            what = f"damaged: it contains id {ids.max()}, but the largest should be {self.max_id}"
            raise damaged(self.path / name, what)


@lru_cache(maxsize=2)  # a batch may span two epochs
def order(seed: int, epoch: int, windows: int) -> NDArray[np.int64]:
    """Return a permutation of range(windows), made from raw bits and a stable sort.

    Numpy guarantees these two across versions, but not `Generator.permutation`, and a run that is
    resumed under another numpy must see the same order.
    """
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(windows)
    return np.argsort(bits, kind="stable")


def _tokenizer(directory: Path, index: Index) -> Path:
    """Return the path of the tokenizer. Raise DataError if it is missing or was changed.

    It defines what the ids mean, and runs and exports copy it.
    """
    path = directory / TOKENIZER
    check_inside(path)
    if not path.is_file() or sha256(path.read_bytes()).hexdigest() != index.tokenizer_sha256:
        raise damaged(path, "missing, or not the tokenizer of this corpus")
    return path


def _check_file(path: Path, wanted: int) -> None:
    """Raise DataError unless it is a file of the corpus with `wanted` bytes."""
    check_inside(path)
    size = path.stat().st_size if path.is_file() else 0
    if size != wanted or not path.is_file():
        raise damaged(path, f"truncated or missing ({size} bytes, {wanted} expected)")


def _mapped(directory: Path, file: TokenFile, dtype: np.dtype[Any]) -> Ids:
    # A plain array: slicing it is three times faster than slicing numpy's memmap class.
    mapped = np.memmap(directory / file.name, dtype, "r") if file.tokens else np.empty(0, dtype)
    return np.asarray(mapped)
