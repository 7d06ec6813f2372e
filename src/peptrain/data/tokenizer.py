"""Load a tokenizer or train a byte-level BPE, and encode text without special tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from peptrain.data.index import SPECIAL
from peptrain.data.sources.text import read_bytes
from peptrain.errors import ConfigError, DataError
from peptrain.files import read_json_object

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TRAINED_END = "<|endoftext|>"
END_TOKENS = (
    *("</s>", TRAINED_END, "<|end_of_text|>", "<eos>", "<|im_end|>", "[EOS]"),
    *("<｜end▁of▁sentence｜>", "<EOS>", "<|eos|>"),
)
CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json")
CHAT_TEMPLATE = "chat_template.jinja"
log = logging.getLogger("peptrain")


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer.json (plain, .gz or .xz), or the one in a directory."""
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(
            f"tokenizer: {file}: no such file; give a tokenizer.json or its directory (other forms"
            " are converted by AutoTokenizer.from_pretrained(DIR).save_pretrained(OUT))"
        )
    try:
        tokenizer = Tokenizer.from_buffer(read_bytes(file))
    except DataError:
        raise
    except Exception as error:  # the library raises no narrower type
        raise DataError(
            f"tokenizer: {file} is not a tokenizer.json that tokenizers {version('tokenizers')}"
            f" reads ({error}); if it was made by a newer version, upgrade:"
            " pip install -U tokenizers"
        ) from error
    return _plain(tokenizer)


def configured(path: Path) -> dict[str, str]:
    """Return the tokens and the chat template that the files next to a tokenizer.json configure.

    The keys are "eos_token" and those of SPECIAL. Raises DataError for a file that can't be read.
    """
    directory, found = path if path.is_dir() else path.parent, dict[str, str]()
    if not path.is_dir() and not path.name.startswith("tokenizer.json"):
        return found
    for file in filter(Path.is_file, (directory / name for name in CONFIG_FILES)):
        try:
            content = read_json_object(file)
        except ValueError as error:
            raise DataError(f"tokenizer: {file}: {error}; fix it or remove it") from error
        for key in ("eos_token", *SPECIAL):
            value = content.get(key)
            token = value.get("content") if isinstance(value, dict) else value
            if isinstance(token, str) and token:
                found.setdefault(key, token)
    template = directory / CHAT_TEMPLATE
    if template.is_file():
        found["chat_template"] = read_bytes(template).decode("utf-8", "replace")
    return found


def special_tokens(tokenizer: Tokenizer, found: Mapping[str, str]) -> dict[str, str]:
    """Return what an export keeps of `configured`: the template, and tokens of the vocabulary."""
    kept = {key: found[key] for key in SPECIAL if key in found}
    ids = tokenizer.token_to_id
    return {k: v for k, v in kept.items() if k == "chat_template" or ids(v) is not None}


def warn_of_other_ends(tokenizer: Tokenizer) -> None:
    """Warn if the end token, which nobody named, is one of several usual ones."""
    first, *others = [n for n in END_TOKENS if tokenizer.token_to_id(n) is not None] or [""]
    if others:
        log.warning(
            "eos_token: %s is taken, but the tokenizer also has %s; give --eos-token",
            first,
            ", ".join(others),
        )


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
    raise ConfigError(
        f"eos_token: {eos_token!r} is not in the tokenizer's vocabulary;"
        " name its end token with --eos-token"
    )


def vocabulary(tokenizer: Tokenizer) -> int:
    """Return the rows that an embedding needs: the largest id plus 1, also if ids have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def encode(
    tokenizer: Tokenizer, texts: Sequence[str], dtype: np.dtype[np.unsignedinteger]
) -> list[NDArray[np.unsignedinteger]]:
    """Return the ids of each text, without an end token. Texts are encoded in parallel.

    Raises DataError for text that the tokenizer can't encode.
    """
    try:
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    except Exception as error:  # the library raises no narrower type
        raise DataError(
            f"tokenizer: can't encode the text ({error}); it needs an unknown token that is in its"
            " vocabulary, or give another tokenizer"
        ) from error
    return [np.array(encoding.ids, dtype) for encoding in encodings]
