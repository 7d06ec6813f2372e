"""Continue a prompt with a run's checkpoint, a Hugging Face directory or a factorised export."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from peptrain.errors import ConfigError
from peptrain.generation.sample import (
    TEMPERATURE,
    TOKENS,
    Sampling,
    check_prompt,
    continuation,
    prompt_tokens,
)
from peptrain.rng import Rng
from peptrain.settings.fields import check_whole
from peptrain.tasks.spans import Encoder
from peptrain.tasks.subject import Subject, open_subject

log = logging.getLogger("peptrain")


def generate(
    path: Path,
    prompt: str,
    *,
    tokens: int = TOKENS,
    temperature: float = TEMPERATURE,
    top_p: float = 1.0,
    seed: int = 0,
    samples: int = 1,
    device: torch.device | str = "cpu",
) -> list[str]:
    """Return `samples` continuations of `prompt`, without the prompt.

    path: RUN, RUN@STEP, or a Hugging Face directory, also a factorised export. A run's model is the
    dense equivalent, or the model itself without one. An empty prompt begins a document. A text
    ends at the end of a document, after `tokens` tokens, or where the model has read as many as it
    can: of a run as many as its training sequences have.

    temperature: logits are divided by it; 0 takes the likeliest token. top_p: draw among the
    likeliest tokens whose probabilities add up to it. A sample depends on `seed` and its number
    only, not on `samples`.

    Raises ConfigError for a value that can't be used and for a fine-tuned run, CheckpointError for
    a path that can't be read, DataError for a prompt that can't be encoded or has more tokens than
    the model reads.
    """
    how = Sampling(tokens, temperature, top_p)
    check_samples(samples, how, seed)
    return list(continuations(open_subject(Path(path)), prompt, how, seed, samples, device))


def check_samples(samples: int, how: Sampling, seed: int) -> None:
    """Raise ConfigError, naming the flag, for a number of samples or a seed that can't be used."""
    check_whole("--samples", samples, 1)
    check_whole("--seed", seed, 0, 2**63 - 1)
    if samples > 1 and how.temperature == 0:
        raise ConfigError(
            f"--samples: must be 1 with --temperature 0, which writes one text (got {samples})"
        )


def continuations(
    subject: Subject,
    prompt: str,
    how: Sampling,
    seed: int,
    samples: int,
    device: torch.device | str = "cpu",
) -> Iterator[str]:
    """Yield continuations as they are written. The prompt is checked before the first."""
    model = subject.model
    ids = prompt_tokens(subject.encoder, prompt, subject.positions, "prompt")
    check_prompt(model, ids, "prompt")
    if (room := subject.positions + 1 - len(ids)) < how.tokens:
        log.warning("--tokens %d: at most %d are written, since the prompt has %d and the model"
                    " reads %d", how.tokens, room, len(ids), subject.positions)  # fmt: skip
    encoder = _ends_of(subject)
    model.to(device)  # type: ignore[arg-type]
    for number in range(samples):
        yield continuation(
            model, encoder, ids, how, positions=subject.positions, precision=subject.precision,
            seed=Rng(seed).integer(f"sample {number}", 0, "generate"),
        )  # fmt: skip


def _ends_of(subject: Subject) -> Encoder:
    """Return the encoder with the end tokens that the model's own settings name too."""
    named = subject.model.generation_config.eos_token_id
    more = [named] if isinstance(named, int) else named or []
    return replace(subject.encoder, ends=tuple(dict.fromkeys([*subject.encoder.ends, *more])))
