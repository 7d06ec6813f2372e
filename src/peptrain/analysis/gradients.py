"""Gradients of the dense weights on a fixed batch, and how well low-rank directions fit them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from peptrain.analysis.measures import Row, in_order
from peptrain.analysis.source import Source, ranks_of
from peptrain.errors import DataError
from peptrain.models.probe import evaluating
from peptrain.ops.riemannian import approximation_errors
from peptrain.ops.singular import singular_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from peptrain.data import Corpus


def probe_batch(corpus: Corpus, sequences: int, seq_len: int) -> Tensor:
    """Return the first `sequences` windows of the held-out part: [sequences, seq_len + 1].

    Raises DataError if the held-out part is shorter.
    """
    tokens, wanted = corpus.held_out(), sequences * seq_len + 1
    if len(tokens) < wanted:
        most = max(0, (len(tokens) - 1) // seq_len)
        raise DataError(
            f"--probe: must be <= {most}, as {corpus.path} has only {len(tokens)} held-out tokens"
            f" and {sequences} sequences of {seq_len} need {wanted} (got {sequences})"
        )
    starts = range(0, sequences * seq_len, seq_len)
    windows = np.stack([tokens[i : i + seq_len + 1] for i in starts])
    return torch.from_numpy(windows.astype(np.int64))


def dense_gradients(model: PreTrainedModel, batch: Tensor) -> dict[str, Tensor]:
    """Return the gradient of the mean loss over `batch` by every parameter of a dense model.

    It runs a sequence at a time in the model's dtype, without dropout.
    """
    model.requires_grad_(True)
    with evaluating(model):
        for row in batch.to(model.device):
            logits = model(input_ids=row[None, :-1], use_cache=False).logits[0]
            loss = F.cross_entropy(logits.float(), row[1:], reduction="sum")
            (loss / batch[:, 1:].numel()).backward()  # type: ignore[no-untyped-call]
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def gradient_rows(
    source: Source, name: str, gradients: dict[str, Tensor], device: torch.device
) -> Iterator[Row]:
    """Yield the row of the gradient of one matrix.

    Where W = B A it has LORO's errors: of the direction Z = B Bᵀ G + G Aᵀ A of lowrank, as it is
    and scaled by the best scalar, of r/d Z (loro's approximate step), and of the projection on the
    tangent space (its exact step).
    """
    layer = source.layers[name]
    ranks = ranks_of(layer)
    G = gradients[f"{name}.weight"].to(device, torch.float64)
    extra: dict[str, float] = {}
    if ranks.weight < ranks.full:
        B, A = in_order(layer, device)
        width = source.model.config.get_text_config().hidden_size
        extra = approximation_errors(B, A, G, B.shape[1] / width)
    n, m = G.shape
    yield Row(*source.place(name), "gradient", (n, m), ranks.full, singular_values(G).cpu(),
              extra=extra)  # fmt: skip
