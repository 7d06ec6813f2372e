"""The settings of `peptrain data prepare`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal

from peptrain.errors import ConfigError
from peptrain.settings.fields import check, check_whole

DEFAULT_VOCAB = 8192
WEIGHTS_TOLERANCE = 1e-6  # the weights that the error suggests have nine digits
SMALLEST_VOCAB = 257  # 256 bytes and an end token
SURROGATE = re.compile("[\ud800-\udfff]")  # in an argument that is not UTF-8
LARGEST_VOCAB = 1 << 24  # the trainer reserves 64 bytes each; 20 M characters yield fewer


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Settings of `prepare`. Every field is a flag of the command."""

    inputs: tuple[str | Path, ...]
    """Text, JSON Lines or Parquet files, directories of them, or hf:ID[:CONFIG[:SPLIT]]."""
    out: Path
    """The output directory: new, empty, or with an unfinished preparation to resume."""
    tokenizer: Path | None = None
    """A tokenizer.json, or a directory that contains one. Unset: train one."""
    vocab_size: int | None = None
    """Vocabulary size of the byte-level BPE to train. Unset: 8192, if no tokenizer is given."""
    text_field: str = "text"
    """Name of the JSON Lines field or table column that contains the text."""
    eos_token: str | None = None
    """The token appended to each document. Unset: that of the tokenizer's
    tokenizer_config.json, or else </s> or another usual name."""
    held_out: float = 0.01
    """Fraction of documents to hold out, chosen by a hash of the document's index within its
    input."""
    held_out_inputs: tuple[str | Path, ...] = ()
    """Inputs to hold out instead. Those that are also among the inputs are not trained on."""
    weights: tuple[float, ...] = ()
    """Share of each input in the bytes of text, in total 1. Unset: read one after another."""
    max_tokens: int | None = None
    """Stop after the document that reaches this number of training tokens, end tokens included."""
    shard_tokens: int = 64 * 2**20
    """Tokens per shard, or a little more: shards end with a document (or with 1 MB of one)."""
    on_bad_utf8: Literal["error", "replace"] = "error"
    """How to handle invalid UTF-8: stop with an error, or replace it by U+FFFD."""
    skip_bad: bool = False
    """Skip records that can't be used (invalid JSON or UTF-8, no text field, a number as text)
    instead of stopping with an error. They are counted."""

    def __post_init__(self) -> None:
        check(bool(self.inputs), "inputs", self.inputs, "at least one file or directory")
        check(all(map(str, self.inputs)), "inputs", self.inputs, "names of files or directories")
        named = self.eos_token is None or (self.eos_token and not SURROGATE.search(self.eos_token))
        check(bool(named), "eos_token", self.eos_token, "Unicode text")
        check(0 <= self.held_out < 1, "held_out", self.held_out, "in [0, 1)")
        for key in ("shard_tokens", "max_tokens"):
            check_whole(key, getattr(self, key), 1, 2**63 - 1)
        if self.weights:
            self._check_weights()
        if self.vocab_size is None:
            return
        fits = SMALLEST_VOCAB <= self.vocab_size <= LARGEST_VOCAB
        wanted = f"between {SMALLEST_VOCAB} and {LARGEST_VOCAB}"
        check(fits, "vocab_size", self.vocab_size, wanted)
        if self.tokenizer:
            raise ConfigError(
                f"vocab_size: applies only if a tokenizer is trained (got {self.vocab_size}), but"
                f" tokenizer: {self.tokenizer} is given; give one of the two"
            )

    def _check_weights(self) -> None:
        given, total = list(self.weights), sum(self.weights)
        one_each = f"one for each of the {len(self.inputs)} inputs"
        check(len(given) == len(self.inputs), "weights", given, one_each)
        check(all(0 < w < inf for w in given), "weights", given, "positive numbers")
        if abs(total - 1) > WEIGHTS_TOLERANCE:
            normalised = " ".join(f"{w / total:.9g}" for w in given)
            raise ConfigError(
                f"weights: {given} sum to {total:.9g}, not 1; give --weights {normalised}"
            )

    @property
    def decoding_errors(self) -> str:
        """`on_bad_utf8` as the argument `errors` of `bytes.decode`."""
        return "strict" if self.on_bad_utf8 == "error" else "replace"
