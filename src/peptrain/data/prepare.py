"""Turn text into a directory of token shards (`peptrain data prepare`)."""

from __future__ import annotations

import errno
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peptrain.data.config import DEFAULT_VOCAB, PrepareConfig
from peptrain.data.documents import Inputs, Part, describe
from peptrain.data.index import JOURNAL, TOKENIZER, Index
from peptrain.data.sources.base import Source, Taken
from peptrain.data.tokenizer import (
    TRAINED_END,
    configured,
    encode,
    end_id,
    load_tokenizer,
    losses,
    special_tokens,
    train_tokenizer,
    unknown_id,
    vocabulary,
    warn_of_other_ends,
)
from peptrain.data.writer import LEAST_HELD_OUT, Progress, Writer
from peptrain.errors import DataError
from peptrain.files import write_atomically

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SAMPLE_CHARACTERS = 20_000_000  # to train a tokenizer on: 3 s on two cores
BATCH_CHARACTERS = 4_000_000  # encoded at once: about 1 M tokens, 200 MB of encodings
UINT16_IDS = 1 << 16
TOLERATED_LOSS = 0.01  # of the tokens or characters, without a warning
FAR_OFF = 0.02  # tolerated error of a source's share; one long document may exceed it
log = logging.getLogger("peptrain")


@dataclass(frozen=True)
class ProgressReport:
    """Progress of a preparation."""

    documents: int
    tokens: int
    share: float | None
    """Share of the work that is done, from 0 to 1; None if the end is unknown."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Result of a preparation. `documents` and `text_bytes` include what is held out."""

    path: Path
    documents: int
    train_tokens: int
    held_out_tokens: int
    text_bytes: int
    vocab_size: int
    max_id: int
    shards: int
    unknown: float
    """Share of the tokens that are the unknown token."""
    lost: float
    """Share of the text's characters that don't come back when the tokens are decoded."""
    skipped: int
    """Bad records that were left out (`skip_bad`)."""
    resumed: bool
    """Whether this call continued an earlier one that was interrupted."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text per token, end tokens included."""
        return self.text_bytes / (self.train_tokens + self.held_out_tokens)

    @property
    def can_be_evaluated(self) -> bool:
        """Whether enough is held out for a loss, without which training is refused."""
        return self.held_out_tokens >= LEAST_HELD_OUT

    @property
    def losses(self) -> str:
        """What the tokenizer could not represent, in words."""
        return f"{self.unknown:.2%} unknown tokens, {self.lost:.2%} of the characters lost"


def prepare(
    config: PrepareConfig, on_progress: Callable[[ProgressReport], None] | None = None
) -> Prepared:
    """Write a directory of token shards that `Corpus.open` reads.

    The same inputs and settings always give the same bytes, also if the call was killed and
    repeated. If the hash holds out no document (a corpus of few documents), the last `held_out`
    fraction of the token stream is held out instead, and `max_tokens` then includes it.

    A weighted mixture ends with the first source that ends, since the shares would not hold
    afterwards. The result is a complete corpus, and a warning is logged. Warnings are also logged
    if `max_tokens` isn't reached, if the shares are off, if the tokenizer loses more than 1 % of
    the text, and if too little is held out to train.

    Raises ConfigError for invalid settings and for an `out` that contains anything but an
    unfinished preparation with these settings. Raises DataError for inputs that can't be read and
    for a disk that can't be written.
    """
    inputs = Inputs(config)
    given = load_tokenizer(config.tokenizer) if config.tokenizer else None
    special: dict[str, str] = {}
    if given and config.tokenizer:
        found = configured(config.tokenizer)
        config = replace(config, eos_token=config.eos_token or found.get("eos_token"))
        end_id(given, config.eos_token)  # raise for a wrong name before writing
        if config.eos_token is None:
            warn_of_other_ends(given)
        special = special_tokens(given, found)
    with _disk_errors_explained(config.out):
        sources = [*inputs.train, *inputs.held_out]
        settings = _settings(config, inputs, given) | {"special_tokens": special}
        progress = Progress.open(config.out, settings, len(sources))
        resumed = any(taken.position is not None for taken in progress.taken)
        tokenizer = _tokenizer_in(config, inputs, given)
        writer = Writer(config.out, _id_type(tokenizer), progress)
        _pack(config, inputs, tokenizer, writer, on_progress)
        _warn_of_an_early_end(config, inputs, writer)
        _warn_of_other_shares(config, progress)
        unknown, lost = _losses(progress.taken)
        index = _finish(config, sources, tokenizer, writer)
    return Prepared(
        path=config.out,
        documents=index.documents,
        train_tokens=index.train_tokens,
        held_out_tokens=index.held_out.tokens,
        text_bytes=index.text_bytes,
        vocab_size=index.vocab_size,
        max_id=index.max_id,
        shards=len(index.train),
        unknown=unknown,
        lost=lost,
        skipped=sum(taken.skipped for taken in progress.taken),
        resumed=resumed,
    )


KEPT = ("text_field", "eos_token", "shard_tokens", "max_tokens", "skip_bad")
"""Settings that are recorded by their value."""


def _settings(config: PrepareConfig, inputs: Inputs, given: Tokenizer | None) -> dict[str, Any]:
    """Return what determines the files' content; only the same settings resume a preparation.

    on_bad_utf8 is left out: after an invalid byte a user may resume with "replace", since all text
    before that byte is read alike. With skip_bad it matters, as it decides what is skipped.
    """
    skipping = {"on_bad_utf8": config.on_bad_utf8} if config.skip_bad else {}
    return {
        "inputs": describe(inputs.train),
        "held_out_inputs": describe(inputs.held_out),
        "held_out": inputs.fraction,
        "tokenizer": sha256(given.to_str().encode()).hexdigest()[:16] if given else None,
        "vocab_size": None if given else config.vocab_size or DEFAULT_VOCAB,
        "weights": list(config.weights),
        **{key: getattr(config, key) for key in KEPT},
        **skipping,
    }


def _tokenizer_in(config: PrepareConfig, inputs: Inputs, given: Tokenizer | None) -> Tokenizer:
    """Load the tokenizer from the output directory, after writing it there if it is missing."""
    path = config.out / TOKENIZER
    if not path.exists():
        tokenizer = given or train_tokenizer(
            inputs.sample(SAMPLE_CHARACTERS),
            config.vocab_size or DEFAULT_VOCAB,
            config.eos_token or TRAINED_END,
        )
        write_atomically(path, [tokenizer.to_str().encode()])
    return load_tokenizer(path)


def _id_type(tokenizer: Tokenizer) -> np.dtype[np.unsignedinteger]:
    return np.dtype("<u2" if vocabulary(tokenizer) <= UINT16_IDS else "<u4")


def _pack(
    config: PrepareConfig,
    inputs: Inputs,
    tokenizer: Tokenizer,
    writer: Writer,
    on_progress: Callable[[ProgressReport], None] | None,
) -> None:
    """Encode and write every part that is not done yet."""
    eos = np.array([end_id(tokenizer, config.eos_token)], writer.dtype)
    unknown = unknown_id(tokenizer)
    taken, most = writer.progress.taken, config.max_tokens or math.inf
    for parts, room in ((inputs.training(taken), most), (inputs.apart(taken), math.inf)):
        for batch in _batches(parts):
            texts = [part.piece.text for part in batch]
            encoded = encode(tokenizer, texts, writer.dtype)
            lost = losses(tokenizer, texts, encoded, unknown)
            for part, ids, of_it in zip(batch, encoded, lost, strict=True):
                if writer.reached(room):
                    break
                if part.piece.bad and not any(t.skipped for t in taken):
                    log.warning("skip_bad: %s; skipped, like all bad records", part.piece.bad)
                writer.add(part, np.concatenate([ids, eos]) if part.piece.ends else ids, of_it)
                if writer.pending >= config.shard_tokens:
                    writer.commit()
            if on_progress:
                on_progress(_progress(inputs, writer, config.max_tokens))
            if writer.reached(room):
                break
    if writer.pending:
        writer.commit()


def _progress(inputs: Inputs, writer: Writer, max_tokens: int | None) -> ProgressReport:
    taken = writer.progress.taken
    shares = [inputs.share_read(taken), writer.train_tokens / max_tokens if max_tokens else None]
    share = max((min(share, 1.0) for share in shares if share is not None), default=None)
    return ProgressReport(sum(t.documents for t in taken), writer.tokens, share)


def _batches(parts: Iterable[Part]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    characters = 0
    for part in parts:
        batch.append(part)
        characters += len(part.piece.text or part.piece.bad)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _warn_of_an_early_end(config: PrepareConfig, inputs: Inputs, writer: Writer) -> None:
    tokens, taken = writer.train_tokens, writer.progress.taken
    if config.max_tokens is not None and tokens >= config.max_tokens:
        return
    if config.weights:
        source, of_it = inputs.ended(taken)
        log.warning(
            "weights: %s ended after %d bytes of text, which ends the mixture at %d training"
            " tokens; for more, give it a smaller weight or more text, or list it more than once"
            " and split its weight; to accept this length without a warning, give --max-tokens %d",
            *(source.name, of_it.text_bytes, tokens, tokens),
        )
    elif config.max_tokens is not None:
        wanted = config.max_tokens
        log.warning("max_tokens: %d requested, but the inputs have %d; add text", wanted, tokens)


def _warn_of_other_shares(config: PrepareConfig, progress: Progress) -> None:
    counts = [taken.text_bytes for taken in progress.taken[: len(config.weights)]]
    shares = [count / sum(counts) for count in counts]
    if any(abs(share - w) > FAR_OFF for share, w in zip(shares, config.weights, strict=True)):
        log.warning(
            "weights: the actual shares are %s, because documents are not split and some are long;"
            " a larger --max-tokens brings them closer to the weights",
            " ".join(f"{share:.2f}" for share in shares),
        )


def _losses(taken: Sequence[Taken]) -> tuple[float, float]:
    """Return the shares of unknown tokens and of lost characters, with a warning if they are large.

    What version 0.1.0 prepared before it was interrupted is not counted.
    """
    unknown = sum(t.unknown for t in taken) / max(1, sum(t.tokens for t in taken))
    lost = sum(t.lost for t in taken) / max(1, sum(t.characters for t in taken))
    if max(unknown, lost) > TOLERATED_LOSS:
        log.warning(
            "tokenizer: can't represent all of the text: %.1f %% of the tokens are the unknown"
            " token, and %.1f %% of the characters don't come back when the tokens are decoded; a"
            " byte-level tokenizer, such as one trained on this text (no --tokenizer), loses"
            " nothing",
            *(100 * unknown, 100 * lost),
        )
    return unknown, lost


def _finish(
    config: PrepareConfig, sources: Sequence[Source], tokenizer: Tokenizer, writer: Writer
) -> Index:
    progress = writer.progress
    if progress.settings["held_out"] and not progress.held_out_tokens:
        writer.set_aside_tail(config.held_out)
    if progress.held_out_tokens < LEAST_HELD_OUT:
        log.warning(
            "held_out: training needs at least %d held-out tokens, but this corpus has %d;"
            " prepare it with a larger --held-out, with --held-out-inputs, or with more text",
            *(LEAST_HELD_OUT, progress.held_out_tokens),
        )
    train, held_out, max_id = writer.survey()
    index = Index(
        dtype=writer.dtype.str,
        vocab_size=vocabulary(tokenizer),
        eos_id=end_id(tokenizer, config.eos_token),
        max_id=max_id,
        documents=sum(taken.documents for taken in progress.taken),
        held_out_documents=progress.held_out_documents,
        text_bytes=sum(taken.text_bytes for taken in progress.taken),
        train=train,
        held_out=held_out,
        tokenizer_sha256=sha256((config.out / TOKENIZER).read_bytes()).hexdigest(),
        settings=progress.settings | {"on_bad_utf8": config.on_bad_utf8},
        sources=[_counts(*both) for both in zip(sources, progress.taken, strict=True)],
    )
    index.save(config.out)
    (config.out / JOURNAL).unlink()
    return index


def _counts(source: Source, taken: Taken) -> dict[str, Any]:
    counts = ("documents", "text_bytes", "tokens", "skipped", "unknown", "characters", "lost")
    return {"source": source.describe(), **{key: getattr(taken, key) for key in counts}}


@contextmanager
def _disk_errors_explained(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else str(error)
        begun = (out / JOURNAL).exists()
        repair = (
            "fix this and run the same command again to resume"
            if begun
            else "fix this, or give another directory"
        )
        raise DataError(
            f"out: {out}: {reason}; {'finished shards are kept: ' * begun}{repair}"
        ) from error
