"""Perplexity per token of several prepared corpora, one per domain, and its macro mean."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from peptrain.errors import ConfigError
from peptrain.eval.perplexity import Evaluation, held_out_loss
from peptrain.eval.perplexity import Watch as Tokens
from peptrain.tasks.measure import exp
from peptrain.tasks.subject import Subject


def domain_losses(
    subject: Subject,
    corpora: Sequence[Path],
    *,
    positions: int | None = None,
    device: torch.device,
    watch: Tokens,
) -> dict[Path, Evaluation]:
    """Return the held-out loss of each corpus, over all its held-out tokens.

    A token is predicted from at most `positions` before it; unset: those of the subject. Raises
    DataError for a corpus that was prepared with another tokenizer.
    """
    if twice := [path for path in corpora if corpora.count(path) > 1]:
        raise ConfigError(f"--data: {twice[0]} is given twice; give each corpus once")
    opened = {path: subject.tokens_of(path).held_out() for path in corpora}
    total, before = sum(len(ids) - 1 for ids in opened.values()), 0
    model: Any = subject.model.to(device)  # type: ignore[arg-type]
    found = {}
    for path, ids in opened.items():

        def show(done: int, of: int, before: int = before) -> None:
            watch(before + done, total)

        found[path] = held_out_loss(model, ids, seq_len=positions or subject.positions,
                                    precision=subject.precision, watch=show)  # fmt: skip
        before += len(ids) - 1
    return found


def domain_entry(found: dict[Path, Evaluation]) -> dict[str, Any]:
    """Return the losses for JSON, with the macro mean: exp of the unweighted mean of the losses."""
    loss = macro_loss(found)
    perplexity = exp(loss)
    return {
        "domains": {
            str(path): {"loss": one.loss, "tokens": one.tokens} for path, one in found.items()
        },
        "macro_loss": loss,
        "macro_perplexity": perplexity if math.isfinite(perplexity) else None,
    }


def macro_loss(found: dict[Path, Evaluation]) -> float:
    """Return the unweighted mean of the losses, in nats per token."""
    return statistics.fmean(one.loss for one in found.values())
