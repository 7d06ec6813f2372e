"""Held-out loss and perplexity, weighted by tokens: exp(total loss / total targets)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from peptrain.distributed.world import World
from peptrain.errors import DataError
from peptrain.models.hf import Precision, autocast
from peptrain.models.probe import evaluating
from peptrain.ops.precision import at_least_fp32

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS_IN_A_FORWARD = {"cuda": 8192, "cpu": 2048}
"""Of an evaluation, at least one window. Fixed, so that neither the training's micro-batch nor the
free memory changes how a run is measured. On two CPU cores in use by others too, 1,024, 2,048,
4,096 and 8,192 tokens gave 23,300, 22,200, 18,000 and 14,000 tokens/s with the preset tiny and 230,
620, 470 and 260 with pico-tiny, at windows of 256."""

Watch = Callable[[int, int], None]
"""Called with the number of tokens predicted so far, over all processes, and in total."""


def unwatched(done: int, total: int) -> None:
    """Ignore the progress: the `Watch` used by default."""


@dataclass(frozen=True)
class Evaluation:
    """The loss in nats per token, and the number of predicted tokens."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def row(self) -> dict[str, float | None]:
        """Return its values in metrics.jsonl, which has no infinity."""
        perplexity = self.perplexity if math.isfinite(self.perplexity) else None
        loss, tokens = self.loss, self.tokens
        return {"held_out_loss": loss, "perplexity": perplexity, "held_out_tokens": tokens}


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel,
    tokens: np.ndarray,
    *,
    seq_len: int,
    batch_size: int | None = None,
    precision: Precision = "fp32",
    world: World | None = None,
    limit: int = 0,
    watch: Watch = unwatched,
) -> Evaluation:
    """Return the mean loss over `tokens` [T], each predicted from at most seq_len preceding ones.

    Every token but the first is predicted once. The summed loss is divided by the number of tokens,
    so the batch size, a short last window and the number of processes, which share the work, do not
    affect the result. batch_size: windows per forward pass; unset: those of `TOKENS_IN_A_FORWARD`.
    limit: the largest number of tokens to predict, 0 for all. watch: called after each forward
    pass. Raises DataError when there is nothing to predict.
    """
    here = world or World(0, 1, model.device)
    tokens = tokens[: limit + 1] if limit else tokens
    windows = _windows(tokens, seq_len)[here.rank :: here.size]
    share = sum(len(window) - 1 for window in windows)
    kind = "cuda" if here.device.type == "cuda" else "cpu"
    rows = batch_size or max(1, TOKENS_IN_A_FORWARD[kind] // seq_len)
    total, count = torch.zeros((), dtype=torch.float64), 0
    with evaluating(model):
        for batch in _batches(windows, rows):
            ids = torch.from_numpy(batch).to(here.device)
            with autocast(precision, here.device):
                total += _summed_loss(model, ids).cpu()
            count += batch.shape[0] * (batch.shape[1] - 1)
            watch((len(tokens) - 1) * count // share, len(tokens) - 1)
    both = here.sum(torch.tensor([total.item(), count], dtype=torch.float64, device=here.device))
    return Evaluation(both[0].item() / both[1].item(), round(both[1].item()))


@torch.no_grad()
def held_out_loss_legacy(
    model: PreTrainedModel,
    tokens: np.ndarray,
    *,
    seq_len: int,
    batch_size: int,
    precision: Precision = "fp32",
    watch: Watch = unwatched,
) -> Evaluation:
    """Return the loss as the older repositories compute it, to reproduce tables made with it.

    It is the sum of the batches' mean losses divided by the number of batches plus 1, which is too
    low.
    """
    means, count = [], 0
    with evaluating(model):
        for batch in _batches(_windows(tokens, seq_len), batch_size):
            ids = torch.from_numpy(batch).to(model.device)
            predicted = batch.shape[0] * (batch.shape[1] - 1)
            with autocast(precision, model.device):
                means.append(_summed_loss(model, ids).item() / predicted)
            count += predicted
            watch(count, len(tokens) - 1)
    return Evaluation(sum(means) / (len(means) + 1), count)


def _windows(tokens: np.ndarray, seq_len: int) -> list[np.ndarray]:
    """Split into windows of seq_len + 1 tokens that overlap by one. The last may be shorter."""
    if len(tokens) < 2:
        raise DataError(
            f"the held-out set has {len(tokens)} tokens, so there is nothing to predict; prepare"
            " the corpus with --held-out or --held-out-inputs"
        )
    return [tokens[i : i + seq_len + 1] for i in range(0, len(tokens) - 1, seq_len)]


def _batches(windows: list[np.ndarray], batch_size: int) -> Iterator[np.ndarray]:
    """Yield windows of equal length, stacked as int64 [rows, length]. A short one comes alone."""
    start = 0
    while start < len(windows):
        length = len(windows[start])
        same = [w for w in windows[start : start + batch_size] if len(w) == length]
        yield np.stack(same).astype(np.int64)
        start += len(same)


def _summed_loss(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    total = torch.zeros((), dtype=torch.float64, device=ids.device)
    for row, targets in zip(logits, ids[:, 1:], strict=True):
        wide = row.to(at_least_fp32(row.dtype))  # a row at a time, to save memory
        total += F.cross_entropy(wide, targets, reduction="none").sum(dtype=torch.float64)
    return total
