"""Load a tokenizer or train a byte-level BPE, encode text without special tokens, count losses."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

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
OTHER_FORMS = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json",
               "merges.txt", "vocab.txt", "tekken.json", "tiktoken.model")  # fmt: skip
CONVERT = (
    "convert it with transformers (and sentencepiece or tiktoken) and give OUT:"
    " AutoTokenizer.from_pretrained(DIR).save_pretrained(OUT), where DIR has the model's"
    " config.json too, or is its name on the hub"
)
COUNTED_AS_ONE = 1024
CANT_ENCODE = "tokenizer: can't encode the text"
ADVICE = "give a tokenizer with an unknown token in its vocabulary, or a byte-level one"
SHOWN = 200  # characters of an error of the library
log = logging.getLogger("peptrain")


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer.json (plain, .gz or .xz), or the one in a directory.

    Whatever would cut, pad or randomly change what it encodes is switched off. Raises DataError,
    with the fix, for a file that can't be read.
    """
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        others = [name for name in OTHER_FORMS if path.is_dir() and (path / name).is_file()]
        advice = f"{' and '.join(others)} can't be read: {CONVERT}" if others else (
            f"give a tokenizer.json or its directory; if there is another form, {CONVERT}"
        )  # fmt: skip
        raise DataError(f"tokenizer: {file}: no such file; {advice}")
    content = read_bytes(file)
    advice = "if it was made by a newer version, upgrade: pip install -U tokenizers"
    if b'"model"' not in content:
        advice = f"if it is a tokenizer in another form, {CONVERT}"
    with explained(
        f"tokenizer: {file} is not a tokenizer.json that tokenizers {version('tokenizers')} reads",
        advice,
    ):
        return _plain(Tokenizer.from_buffer(content))


@contextmanager
def explained(what: str, advice: str) -> Iterator[None]:
    """Turn an error of the library tokenizers into a DataError.

    Of its functions only this context calls those that may fail. They raise Exception itself and,
    where the Rust code panics, a PanicException, which is a BaseException.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = " ".join(str(error).split())
        raise DataError(f"{what} ({said[:SHOWN]}); {advice}") from error


def configured(path: Path) -> dict[str, str]:
    """Return the tokens and the chat template that the files next to a tokenizer.json configure.

    The keys are "eos_token", "sep_token" and those of SPECIAL. Raises DataError for a file that
    can't be read.
    """
    directory, found = path if path.is_dir() else path.parent, dict[str, str]()
    if not path.is_dir() and not path.name.startswith("tokenizer.json"):
        return found
    for file in filter(Path.is_file, (directory / name for name in CONFIG_FILES)):
        try:
            content = read_json_object(file)
        except ValueError as error:
            raise DataError(f"tokenizer: {file}: {error}; fix it or remove it") from error
        for key in ("eos_token", "sep_token", *SPECIAL):
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


def _usual_ends(tokenizer: Tokenizer) -> list[str]:
    """Return those of END_TOKENS in the vocabulary. Special tokens are before others.

    Qwen2.5, for example, has </s> among the words that it learned from web pages.
    """
    special = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
    there = [name for name in END_TOKENS if tokenizer.token_to_id(name) is not None]
    return sorted(there, key=lambda name: name not in special)


def warn_of_other_ends(tokenizer: Tokenizer) -> None:
    """Warn if the end token, which nobody named, is one of several usual ones."""
    first, *others = _usual_ends(tokenizer) or [""]
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
    """Turn off what cuts, pads or varies; encode special tokens in a text as ordinary text."""
    found = {
        "truncation": tokenizer.truncation,
        "padding": tokenizer.padding,
        "dropout": getattr(tokenizer.model, "dropout", None),
    }
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if found["dropout"]:
        tokenizer.model.dropout = None
    tokenizer.encode_special_tokens = True
    if off := [key for key, value in found.items() if value]:
        log.warning(
            "tokenizer: its %s switched off, so that each text has one encoding, without loss",
            " and ".join(off) + (" is" if len(off) == 1 else " are"),
        )
    return tokenizer


def end_id(tokenizer: Tokenizer, eos_token: str | None) -> int:
    """Return the id of `eos_token` or, if None, of the first usual end token in the vocabulary."""
    for name in _usual_ends(tokenizer) if eos_token is None else (eos_token,):
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


def unknown_id(tokenizer: Tokenizer) -> int | None:
    """Return the id of the unknown token, None without one in the vocabulary."""
    model = json.loads(tokenizer.to_str())["model"]
    if (number := model.get("unk_id")) is not None:  # of a Unigram model
        return int(number)
    name = model.get("unk_token")
    return None if name is None else tokenizer.token_to_id(name)


def encode(
    tokenizer: Tokenizer, texts: Sequence[str], dtype: np.dtype[np.unsignedinteger]
) -> list[NDArray[np.unsignedinteger]]:
    """Return the ids of each text, without an end token. Texts are encoded in parallel.

    Raises DataError for text that the tokenizer can't encode.
    """
    with explained(CANT_ENCODE, ADVICE):
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [np.array(encoding.ids, dtype) for encoding in encodings]


class Losses(NamedTuple):
    """What of a text its ids don't contain."""

    unknown: int
    """Unknown tokens."""
    characters: int
    """Characters of the text."""
    lost: int
    """Characters of the text, as given, that don't come back when its ids are decoded, without the
    unknown tokens. So dropped newlines, capitals and accents are lost, also by a normalizer."""


def losses(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    encoded: Sequence[NDArray[np.unsignedinteger]],
    unknown: int | None,
) -> list[Losses]:
    """Compare texts with what their ids decode to. `unknown` is the id of the unknown token.

    Raises DataError if the tokenizer can't decode them.
    """
    known = [ids if unknown is None else ids[ids != unknown] for ids in encoded]
    with explained("tokenizer: can't decode what it encoded", "give another tokenizer"):
        decoded = tokenizer.decode_batch([ids.tolist() for ids in known], skip_special_tokens=False)
    return [
        Losses(len(ids) - len(kept), len(text), 0 if text == back else _lost(text, back))
        for text, back, ids, kept in zip(texts, decoded, encoded, known, strict=True)
    ]


def _lost(text: str, decoded: str) -> int:
    """Return how many characters of `text` are missing in `decoded`, in any order.

    For speed code points that are equal modulo 1024 are counted as one character. So characters
    that were gained, such as spaces, hide one in a thousand lost ones at most.
    """
    before, after = (
        np.bincount(np.frombuffer(t.encode("utf-32-le"), "<u4") % COUNTED_AS_ONE,
                    minlength=COUNTED_AS_ONE) for t in (text, decoded)
    )  # fmt: skip
    return int(np.maximum(before - after, 0).sum())
