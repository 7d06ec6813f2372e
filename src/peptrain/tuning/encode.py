"""The examples of a task as token ids, cut to a length and padded into batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from peptrain.data.tokenizer import ADVICE, CANT_ENCODE, explained
from peptrain.errors import ConfigError
from peptrain.execution.label_loss import NO_TARGET, Labelled
from peptrain.settings.fields import check

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Ids = NDArray[np.int64]
AT_ONCE = 1000
"""Texts to encode at once. What the tokenizer returns takes ten times the memory of the ids."""
MULTIPLE = 8
"""Sequences of a batch are padded to a multiple of it, for the GPU's tiles."""


@dataclass(frozen=True)
class Encoded:
    """Examples as ids."""

    ids: Sequence[Ids]
    types: Sequence[Ids]
    """1 for the tokens of a second text and what surrounds it, 0 for others."""
    labels: Tensor
    """[rows], or [rows, T] for target texts, as in `Labelled`."""
    cut: int
    """How many were longer than `seq_len`."""
    seq_len: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))

    @property
    def largest(self) -> int:
        """The largest id, in target texts too."""
        targets = int(self.labels.max()) if self.labels.ndim == 2 else 0
        return max(targets, *(int(ids.max()) for ids in self.ids))

    def checksum(self) -> str:
        """Return 16 hex digits that identify ids and labels."""
        digest = sha256()
        for ids in self.ids:
            digest.update(len(ids).to_bytes(8) + ids.tobytes())
        digest.update(self.labels.numpy().tobytes())
        return digest.hexdigest()[:16]

    def rows(self, numbers: Sequence[int], pad: int, device: torch.device, typed: bool) -> Labelled:
        """Return the examples with these numbers as one batch. typed: with `types`."""
        longest = max(len(self.ids[n]) for n in numbers)
        shape = len(numbers), min(-(-longest // MULTIPLE) * MULTIPLE, self.seq_len)
        ids, mask, types = np.full(shape, pad), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for row, n in enumerate(numbers):
            size = len(self.ids[n])
            ids[row, :size], mask[row, :size] = self.ids[n], 1
            types[row, :size] = self.types[n]
        labels = self.labels[torch.tensor(numbers)]
        if labels.ndim == 2:  # as short as the longest target of this batch
            labels = labels[:, : int((labels != NO_TARGET).sum(1).max())]
        arrays = (torch.from_numpy(a).to(device) for a in (ids, mask, types))
        first, second, third = arrays
        return Labelled(first, second, labels.to(device), third if typed else None)


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[tuple[str, ...]], seq_len: int, end: int
) -> tuple[list[Ids], list[Ids], int]:
    """Return the ids and types of texts or pairs of texts, and how many were cut to `seq_len`.

    A tokenizer with a template, such as RoBERTa's, adds its special tokens. With another the id
    `end` parts the two texts of a pair. The longer text of a pair is cut first, at its end. Raises
    ConfigError if `seq_len` leaves no room for texts.
    """
    pair = len(texts[0]) == 2
    plain = tokenizer.num_special_tokens_to_add(pair) == 0
    added = int(pair) if plain else tokenizer.num_special_tokens_to_add(pair)
    wanted = f"> {added}, the number of tokens that are added to a row's text"
    check(seq_len > added, "train.seq_len", seq_len, wanted)
    parts, cut = list[tuple[Ids, Ids]](), 0
    tokenizer.enable_truncation(seq_len - added * plain, strategy="longest_first")
    try:
        for at in range(0, len(texts), AT_ONCE):
            given = [text if pair else text[0] for text in texts[at : at + AT_ONCE]]
            with explained(CANT_ENCODE, ADVICE):
                found = tokenizer.encode_batch(given, add_special_tokens=True)
            parts += [_parted(one, end) if plain and pair else _as_it_is(one, end) for one in found]
            cut += sum(bool(one.overflowing) for one in found)
    finally:
        tokenizer.no_truncation()
    return [ids for ids, _ in parts], [types for _, types in parts], cut


def _as_it_is(one: Encoding, end: int) -> tuple[Ids, Ids]:
    """Return a text, an empty one as `end` alone."""
    return np.array(one.ids or [end], np.int64), np.array(one.type_ids or [0], np.int64)


def _parted(one: Encoding, end: int) -> tuple[Ids, Ids]:
    """Return a pair with `end` between its texts."""
    second = np.array(one.sequence_ids, np.int64)
    at = int((second == 0).sum())
    return np.insert(np.array(one.ids, np.int64), at, end), np.insert(second, at, 0)


def encode_targets(tokenizer: Tokenizer, words: Sequence[str], end: int) -> Tensor:
    """Return target texts [words, T], each with its end token, padded by `NO_TARGET`.

    Raises ConfigError if two of them are the same tokens, such as the unknown one.
    """
    with explained(CANT_ENCODE, ADVICE):
        found = [tokenizer.encode(word, add_special_tokens=True).ids for word in words]
    ended = [ids if ids[-1:] == [end] else [*ids, end] for ids in found]
    for place, ids in enumerate(ended):
        if (first := ended.index(ids)) != place:
            raise ConfigError(
                f"words: {words[first]!r} and {words[place]!r} are the same tokens to the model's"
                " tokenizer, so that it can't write the one or the other; give words that differ,"
                " in the TOML of the task, or another model"
            )
    table = torch.full((len(words), max(map(len, ended))), NO_TARGET)
    for row, ids in zip(table, ended, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return table
