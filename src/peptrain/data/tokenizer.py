"""Load a tokenizer or train a byte-level BPE, and encode text without special tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from peptrain.data.sources.text import read_bytes
from peptrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TRAINED_END = "<|endoftext|>"
END_TOKENS = ("</s>", TRAINED_END, "<|end_of_text|>", "<eos>", "<|im_end|>", "[EOS]")


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer.json (plain, .gz or .xz), or the one in a directory."""
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.exists():
        raise DataError(f"tokenizer: {file}: no such file; give a tokenizer.json or its directory")
    try:
        tokenizer = Tokenizer.from_buffer(read_bytes(file))
    except DataError:
        raise
    except Exception as error:  # the library raises no narrower type
        raise DataError(f"tokenizer: {file} is not a tokenizer.json ({error})") from error
    return _plain(tokenizer)


def train_tokenizer(texts: Iterator[str], vocab_size: int, end: str = TRAINED_END) -> Tokenizer:
    """Train a byte-level BPE with the end token `end`, deterministic in the texts and their order.

    It has fewer than `vocab_size` tokens if the texts offer no more pairs to merge.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _plain(tokenizer)


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    """Turn off truncation and padding, and encode special tokens in a text as ordinary text."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def end_id(tokenizer: Tokenizer, eos_token: str | None) -> int:
    """Return the id of `eos_token` or, if None, of the first of END_TOKENS in the vocabulary."""
    for name in END_TOKENS if eos_token is None else (eos_token,):
        found = tokenizer.token_to_id(name)
        if found is not None:
            return found
    if eos_token is None:
        raise ConfigError(
            f"eos_token: the tokenizer has none of {', '.join(END_TOKENS)};"
            " name its end token with --eos-token"
        )
    raise ConfigError(f"eos_token: {eos_token!r} is not in the tokenizer's vocabulary")


def vocabulary(tokenizer: Tokenizer) -> int:
    """Return the rows that an embedding needs: the largest id plus 1, also if ids have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def encode(
    tokenizer: Tokenizer, texts: Sequence[str], dtype: np.dtype[np.unsignedinteger]
) -> list[NDArray[np.unsignedinteger]]:
    """Return the ids of each text, without an end token. Texts are encoded in parallel."""
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, dtype) for encoding in encodings]
