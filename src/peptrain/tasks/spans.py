"""Texts to tokens: which tokens the model reads, and which of them are scored.

Contexts and continuations are split as by the lm-evaluation-harness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from peptrain.data.tokenizer import ADVICE, CANT_ENCODE, configured, encode, explained
from peptrain.errors import DataError
from peptrain.models.auto import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Encode = Callable[[Sequence[str], bool], list[list[int]]]
"""Texts, and whether to add the tokenizer's special tokens, to token ids."""
AT_ONCE = 4096
"""Texts that are encoded in one call."""


class Span(NamedTuple):
    """Tokens that the model reads, of which the last `scored` are predicted."""

    tokens: tuple[int, ...]
    scored: int


@dataclass(frozen=True)
class Encoder:
    """A tokenizer as tasks and generated texts use it."""

    encode: Encode
    prefix: int
    """The token before a text that has no context: the one that begins texts, else the one that
    ends them."""
    prefix_text: str
    """A text that begins with this gets no special tokens."""
    vocabulary: dict[str, int]
    decode: Callable[[Sequence[int]], str]
    """Token ids to a text, without special tokens."""
    ends: tuple[int, ...]
    """Tokens that end a text."""

    def ids(self, texts: Iterable[str], special: bool) -> dict[str, list[int]]:
        """Return the ids of each text. `special` adds the special tokens of the tokenizer."""
        found: dict[str, list[int]] = {}
        every = list(dict.fromkeys(texts))
        for add in (False, True):
            given = [t for t in every if (special and not self._begun(t)) is add]
            for start in range(0, len(given), AT_ONCE):
                part = given[start : start + AT_ONCE]
                found |= zip(part, self.encode(part, add), strict=True)
        return found

    def _begun(self, text: str) -> bool:
        return bool(self.prefix_text) and text.startswith(self.prefix_text)


def plain_encoder(tokenizer: Tokenizer, end: int, special: Mapping[str, str]) -> Encoder:
    """Return the encoder of a run's tokenizer, which never adds special tokens.

    special: the tokens that its directory configures; bos_token begins texts.
    """
    begin = tokenizer.token_to_id(special.get("bos_token", ""))

    def run(texts: Sequence[str], add: bool) -> list[list[int]]:
        return [ids.tolist() for ids in encode(tokenizer, texts, np.dtype("<u4"))]

    prefix = end if begin is None else begin
    return Encoder(run, prefix, "", tokenizer.get_vocab(), tokenizer.decode, (end,))


def encoder_of_run(directory: Path, tokenizer: Tokenizer, end: int) -> Encoder:
    """Return the encoder of a run, whose tokenizer is in `directory`."""
    return plain_encoder(tokenizer, end, configured(directory))


def encoder_of_directory(path: Path) -> Encoder:
    """Return the encoder of a Hugging Face directory.

    Raises DataError for a tokenizer without a token that begins or ends texts.
    """
    tokenizer: Any = load_tokenizer(path)
    prefix = tokenizer.bos_token_id
    prefix = tokenizer.eos_token_id if prefix is None else prefix
    if prefix is None:
        raise DataError(
            "tokenizer: names neither bos_token nor eos_token, one of which stands before a text"
            " without context; name it in tokenizer_config.json"
        )

    def run(texts: Sequence[str], add: bool) -> list[list[int]]:
        with explained(CANT_ENCODE, ADVICE):
            made = tokenizer(list(texts), add_special_tokens=add, return_attention_mask=False,
                             verbose=False)  # fmt: skip
        ids: list[list[int]] = made["input_ids"]
        return ids

    def decode(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text

    end = tokenizer.eos_token_id
    ends = () if end is None else (end,)
    return Encoder(run, prefix, tokenizer.decode(prefix), tokenizer.get_vocab(), decode, ends)


def spans(
    requests: Sequence[tuple[str, str]],
    encoder: Encoder,
    positions: int,
    names: Sequence[str],
) -> list[Span]:
    """Return the tokens of each (context, continuation), cut on the left to what the model reads.

    A space at the end of a context belongs to the continuation. Both are encoded as one text, of
    which the continuation has as many tokens as it has more than the context alone. They follow the
    tokens of the context alone or, without a context, the encoder's prefix. names: of the requests,
    for errors. Raises DataError for a continuation that has no tokens or more than the model has
    positions.
    """
    split = [_moved(*request) for request in requests]
    joint = encoder.ids((part for c, k in split if c for part in (c, c + k)), special=True)
    alone = encoder.ids((k for c, k in split if not c), special=False)
    found = []
    for (context, continuation), name in zip(split, names, strict=True):
        if context:
            before = joint[context]
            after = joint[context + continuation][len(before) :]
        else:
            before, after = [encoder.prefix], alone[continuation]
            after = after[1:] if after[:1] == before else after
        found.append(_cut([*before, *after], len(after), positions, name, continuation))
    return found


def _moved(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _cut(whole: list[int], scored: int, positions: int, name: str, text: str) -> Span:
    if scored < 1:
        raise DataError(
            f"{name}: the continuation {text[:40]!r} adds no token to its context; the tokenizer"
            " can't express it"
        )
    if scored > positions:
        raise DataError(
            f"{name}: the continuation {text[:40]!r} has {scored} tokens and the model only"
            f" {positions} positions; leave the task out, or give more with --positions"
        )
    return Span(tuple(whole[-(positions + 1) :]), scored)


def page_spans(text: str, encoder: Encoder, positions: int) -> list[Span]:
    """Return windows of a text in which each of its tokens is predicted once.

    The first window begins with the prefix. Each is as long as the model's positions, the last one
    too, by reading tokens again that were predicted before.
    """
    tokens = [encoder.prefix, *encoder.ids([text], special=True)[text]]
    found = []
    for start in range(1, len(tokens), positions):
        end = min(start + positions, len(tokens))
        found.append(Span(tuple(tokens[max(0, end - positions - 1) : end]), end - start))
    return found
