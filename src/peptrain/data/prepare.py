"""`peptrain data prepare`: text in, a directory of token shards out."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from peptrain.data.documents import Inputs, Part, describe, find_inputs
from peptrain.data.index import JOURNAL, TOKENIZER, Index, write_atomic
from peptrain.data.tokenizer import encode, end_id, load_tokenizer, train_tokenizer, vocabulary
from peptrain.data.writer import Journal, Writer
from peptrain.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEFAULT_VOCAB = 8192
SAMPLE_CHARACTERS = 20_000_000  # to train a tokenizer on: 3 s on two cores
BATCH_CHARACTERS = 4_000_000  # encoded at once: about 1 M tokens, 200 MB of encodings
UINT16_IDS = 1 << 16


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What to prepare, and how. Every field is a flag of `peptrain data prepare`."""

    inputs: tuple[Path, ...]
    """Text files, JSON Lines, or directories of them; plain, .gz or .xz."""
    out: Path
    """The directory to make."""
    tokenizer: Path | None = None
    """A tokenizer.json, or a directory that holds one. Default: train one."""
    vocab_size: int | None = None
    """Tokens of the byte-level BPE to train. Default: 8192, if no tokenizer is given."""
    text_field: str = "text"
    """The field of a JSON Lines object that holds the text."""
    eos_token: str | None = None
    """The token to put after each document. Default: the tokenizer's usual one."""
    held_out: float = 0.01
    """The fraction of documents kept from training, chosen by a hash of the document's number."""
    held_out_inputs: tuple[Path, ...] = ()
    """Files to hold out instead; those that are also among the inputs are not trained on."""
    shard_tokens: int = 64 * 2**20
    """Tokens after which a shard is closed, at the end of a document (or of 1 MB of one)."""
    on_bad_utf8: Literal["error", "replace"] = "error"
    """What to do about bytes that are not UTF-8: stop, or put U+FFFD in their place."""

    def __post_init__(self) -> None:
        if self.tokenizer is not None and self.vocab_size is not None:
            raise ConfigError(
                f"vocab_size: {self.vocab_size} is for training a tokenizer, but tokenizer:"
                f" {self.tokenizer} is given; give one of the two"
            )
        if self.vocab_size is not None and self.vocab_size < 257:
            raise ConfigError(f"vocab_size: {self.vocab_size}; 256 bytes and an end need 257")
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out: {self.held_out} is no fraction; give 0 <= held_out < 1")
        if self.shard_tokens < 1:
            raise ConfigError(f"shard_tokens: {self.shard_tokens}; give 1 or more")


@dataclass(frozen=True)
class Progress:
    documents: int
    tokens: int
    bytes_done: int
    """Of the input files as they lie on the disk, compressed or not."""
    bytes_total: int


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a preparation made. Documents, and bytes of text, count the held-out ones too."""

    path: Path
    documents: int
    train_tokens: int
    held_out_tokens: int
    text_bytes: int
    vocab_size: int
    max_id: int
    shards: int
    resumed: bool
    """Whether a part was found finished by an earlier, interrupted call."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for each token, end tokens included."""
        return self.text_bytes / (self.train_tokens + self.held_out_tokens)


def prepare(
    config: PrepareConfig, on_progress: Callable[[Progress], None] | None = None
) -> Prepared:
    """Make a directory of token shards that `Corpus.open` reads.

    The files are the same bytes whenever the inputs and settings are the same, also when the
    call was killed on the way and given again. If the hash holds out no document (a corpus of few
    documents), the last `held_out` fraction of the token stream is held out instead.

    Raises ConfigError for settings that can't be used and for an `out` that holds anything but an
    unfinished preparation with these settings; DataError for inputs that can't be read.
    """
    inputs = _inputs(config)
    if next(inputs.parts(), None) is None:
        raise DataError(f"inputs: no text in {', '.join(map(str, config.inputs))}")
    given = load_tokenizer(config.tokenizer) if config.tokenizer else None
    if given:
        end_id(given, config.eos_token)  # fails before anything is written
    settings = _settings(config, inputs, given)
    with _disk_errors_explained(config.out):
        journal = Journal.open(config.out, settings)
        resumed = journal.pieces > 0
        tokenizer = _tokenizer_in(config, inputs, given)
        writer = Writer(config.out, _id_type(tokenizer), journal)
        _pack(config, inputs, tokenizer, writer, on_progress)
        index = _finish(config, tokenizer, writer)
    return Prepared(
        path=config.out,
        documents=index.documents,
        train_tokens=index.train_tokens,
        held_out_tokens=index.held_out.tokens,
        text_bytes=index.text_bytes,
        vocab_size=index.vocab_size,
        max_id=index.max_id,
        shards=len(index.train),
        resumed=resumed,
    )


def _inputs(config: PrepareConfig) -> Inputs:
    return find_inputs(
        config.inputs,
        config.held_out_inputs,
        fraction=config.held_out,
        text_field=config.text_field,
        errors="strict" if config.on_bad_utf8 == "error" else "replace",
    )


def _settings(config: PrepareConfig, inputs: Inputs, given: Tokenizer | None) -> dict[str, Any]:
    """What decides the files' content; a preparation goes on only under the same.

    Without on_bad_utf8: whoever met a bad byte may go on with "replace", as all text before it
    was read the same.
    """
    return {
        "inputs": describe(inputs.train),
        "held_out_inputs": describe(inputs.held_out),
        "tokenizer": sha256(given.to_str().encode()).hexdigest()[:16] if given else None,
        "vocab_size": None if given else config.vocab_size or DEFAULT_VOCAB,
        "text_field": config.text_field,
        "eos_token": config.eos_token,
        "held_out": inputs.fraction,
        "shard_tokens": config.shard_tokens,
    }


def _tokenizer_in(config: PrepareConfig, inputs: Inputs, given: Tokenizer | None) -> Tokenizer:
    """The tokenizer from the directory, where it is put first unless it is there already."""
    path = config.out / TOKENIZER
    if not path.exists():
        sample = inputs.sample(SAMPLE_CHARACTERS)
        tokenizer = given or train_tokenizer(sample, config.vocab_size or DEFAULT_VOCAB)
        write_atomic(path, [tokenizer.to_str().encode()])
    return load_tokenizer(path)


def _id_type(tokenizer: Tokenizer) -> np.dtype[np.unsignedinteger]:
    return np.dtype("<u2" if vocabulary(tokenizer) <= UINT16_IDS else "<u4")


def _pack(
    config: PrepareConfig,
    inputs: Inputs,
    tokenizer: Tokenizer,
    writer: Writer,
    on_progress: Callable[[Progress], None] | None,
) -> None:
    """Encode every part after those of the journal, and write them."""
    eos = np.array([end_id(tokenizer, config.eos_token)], writer.dtype)
    total = inputs.bytes
    for batch in _batches(islice(inputs.parts(), writer.journal.pieces, None)):
        encoded = encode(tokenizer, [part.text for part in batch], writer.dtype)
        for part, ids in zip(batch, encoded, strict=True):
            writer.add(part, np.concatenate([ids, eos]) if part.ends else ids)
            if writer.pending >= config.shard_tokens:
                writer.commit()
        if on_progress:
            done = batch[-1].bytes_done
            on_progress(Progress(writer.journal.documents, writer.tokens, done, total))
    if writer.pending:
        writer.commit()


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    characters = 0
    for part in parts:
        batch.append(part)
        characters += len(part.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _finish(config: PrepareConfig, tokenizer: Tokenizer, writer: Writer) -> Index:
    journal = writer.journal
    if journal.settings["held_out"] and not journal.held_out_tokens:
        writer.set_aside_tail(config.held_out)
    train, held_out, max_id = writer.survey()
    if not train:
        raise DataError(
            f"held_out: {config.held_out} takes all {journal.documents} documents, none is left"
            f" to train on; delete {config.out} and hold out less"
        )
    index = Index(
        dtype=writer.dtype.str,
        vocab_size=vocabulary(tokenizer),
        eos_id=end_id(tokenizer, config.eos_token),
        max_id=max_id,
        documents=journal.documents,
        held_out_documents=journal.held_out_documents,
        text_bytes=journal.text_bytes,
        train=train,
        held_out=held_out,
        tokenizer_sha256=sha256((config.out / TOKENIZER).read_bytes()).hexdigest(),
        settings={**journal.settings, "on_bad_utf8": config.on_bad_utf8},
    )
    index.save(config.out)
    (config.out / JOURNAL).unlink()
    return index


@contextmanager
def _disk_errors_explained(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else str(error)
        raise DataError(
            f"out: {out}: {reason}; the finished shards are kept: mend it and give the same"
            " command again to go on"
        ) from error
