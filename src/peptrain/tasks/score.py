"""Log-likelihoods of the ends of token sequences under a causal language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from peptrain.distributed.world import World
from peptrain.errors import DataError
from peptrain.models.hf import Precision, autocast, vocabulary_size
from peptrain.models.probe import evaluating
from peptrain.ops.precision import at_least_fp32
from peptrain.tasks.spans import Span

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = {"cuda": 16_384, "cpu": 2_048}
"""Of a forward pass, at least one sequence. Fixed, so that neither the training's micro-batch nor
the free memory changes a result."""
LOGITS = 1 << 26
"""Logits that are converted and normalised at a time."""

Watch = Callable[[int, int], None]
"""Called with the number of sequences scored so far by this process, and its total."""


class Score(NamedTuple):
    """The log-likelihood of the scored tokens, and whether each is the likeliest at its place."""

    log_likelihood: float
    greedy: bool


@torch.no_grad()
def scores(
    model: PreTrainedModel,
    given: Sequence[Span],
    *,
    precision: Precision = "fp32",
    world: World | None = None,
    tokens: int | None = None,
    watch: Watch = lambda done, total: None,
) -> list[Score]:
    """Return log p(last `scored` tokens | those before) in nats for each of `given`, in order.

    Sequences are sorted by length and padded on the right, which a causal model does not see. The
    batches depend on `given` alone, and processes share them, so the number of processes changes no
    bit. tokens: of a forward pass; unset: `TOKENS`. It changes results by rounding only. Logits are
    normalised in at least fp32 and summed in fp64. Raises DataError for a token id that the model
    has no embedding for.
    """
    here = world or World(0, 1, model.device)
    _check_ids(model, given)
    most = tokens or TOKENS["cuda" if here.device.type == "cuda" else "cpu"]
    batches = list(_batches(given, most))
    own = batches[here.rank :: here.size]
    found: dict[int, Score] = {}
    total = sum(map(len, own))
    with evaluating(model):
        for batch in own:
            with autocast(precision, here.device):
                made = _batch_scores(model, [given[n] for n in batch], here.device)
            found |= zip(batch, made, strict=True)
            watch(len(found), total)
    for part in here.gather(found):
        found |= part
    return [found[n] for n in range(len(given))]


def _check_ids(model: PreTrainedModel, given: Sequence[Span]) -> None:
    largest = max((max(span.tokens) for span in given), default=0)
    rows = vocabulary_size(model)
    if largest >= rows:
        raise DataError(
            f"the tokenizer gives token id {largest}, but the model's vocabulary size is {rows};"
            " give a model with its own tokenizer"
        )


def _batches(given: Sequence[Span], most: int) -> Iterator[list[int]]:
    """Yield the numbers of sequences of similar length, the longest first."""
    order = sorted(range(len(given)), key=lambda n: (-len(given[n].tokens), given[n].tokens, n))
    start = 0
    while start < len(order):
        rows = max(1, most // max(1, len(given[order[start]].tokens) - 1))
        yield order[start : start + rows]
        start += rows


def _batch_scores(
    model: PreTrainedModel, batch: Sequence[Span], device: torch.device
) -> list[Score]:
    longest = len(batch[0].tokens) - 1
    ids = torch.zeros(len(batch), longest, dtype=torch.int64)
    rows: list[int] = []
    columns: list[int] = []
    targets: list[int] = []
    for n, (tokens, scored) in enumerate(batch):
        read = len(tokens) - 1
        ids[n, :read] = torch.tensor(tokens[:-1])
        rows += [n] * scored
        columns += range(read - scored, read)
        targets += tokens[-scored:]
    logits = model(input_ids=ids.to(device), use_cache=False).logits
    places = (torch.tensor(x, device=device) for x in (rows, columns, targets))
    logs, best = _predicted(logits, *places)
    sums, at = [], 0
    for _, scored in batch:
        part = slice(at, at + scored)
        sums.append(Score(float(logs[part].sum()), bool(best[part].all())))
        at += scored
    return sums


def _predicted(
    logits: Tensor, rows: Tensor, columns: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Return log p of each target in float64, and whether it has the largest logit, on the CPU."""
    logs, best = [], []
    step = max(1, LOGITS // logits.shape[-1])
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        wide = logits[rows[part], columns[part]]
        wide = wide.to(at_least_fp32(wide.dtype))
        wanted = targets[part]
        logs.append(wide.log_softmax(-1).gather(1, wanted[:, None])[:, 0].double().cpu())
        best.append((wide.argmax(-1) == wanted).cpu())
    return torch.cat(logs), torch.cat(best)
