"""The loss of fine-tuning: of classes, of a number, or of the text that names them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peptrain.ops.precision import at_least_fp32

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NO_TARGET = -100
"""Fills up short target texts. Hugging Face's models know this number."""


@dataclass(frozen=True)
class Labelled:
    """Rows of a task, of one micro-batch."""

    ids: Tensor
    """[rows, L], with the padding on the right."""
    mask: Tensor
    """[rows, L]: 1 for a token, 0 for padding."""
    labels: Tensor
    """[rows]: numbers of classes (int64) or values; [rows, T]: ids of target texts, padded by
    `NO_TARGET`."""
    types: Tensor | None = None
    """[rows, L]: 1 for the tokens of a second text, for models that ask for it."""

    def __len__(self) -> int:
        return len(self.ids)

    def inputs(self) -> dict[str, Tensor]:
        """Return the arguments of the model."""
        given = {"input_ids": self.ids, "attention_mask": self.mask}
        return given if self.types is None else given | {"token_type_ids": self.types}


class LabelLoss(nn.Module):
    """Mean loss of labelled rows; this module is replicated over processes.

    Cross-entropy in nats for classes, squared error for a number. Of a target text it is the mean
    over its tokens, so that each row counts the same.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, part: Labelled) -> Tensor:
        """Return the mean loss of the rows."""
        return row_losses(self.model, part)[0].mean()


def row_losses(model: PreTrainedModel, part: Labelled) -> tuple[Tensor, Tensor]:
    """Return the loss of each row [rows], and the logits, in fp32 or wider.

    The logits are [rows, classes], or [rows, T, V] of target texts.
    """
    run: Any = model
    if part.labels.ndim == 2:
        shifted = run.prepare_decoder_input_ids_from_labels(part.labels)
        logits = _wide(run(**part.inputs(), decoder_input_ids=shifted, use_cache=False).logits)
        each = F.cross_entropy(
            logits.transpose(1, 2), part.labels, ignore_index=NO_TARGET, reduction="none"
        )
        return each.sum(1) / (part.labels != NO_TARGET).sum(1), logits
    logits = _wide(run(**part.inputs()).logits)
    if part.labels.is_floating_point():
        return F.mse_loss(logits[:, 0], part.labels.to(logits.dtype), reduction="none"), logits
    return F.cross_entropy(logits, part.labels, reduction="none"), logits


def _wide(logits: Tensor) -> Tensor:
    return logits.to(at_least_fp32(logits.dtype))


def text_scores(model: PreTrainedModel, part: Labelled, targets: Tensor) -> Tensor:
    """Return the log-likelihood of every target text for every row, [rows, targets].

    targets: [targets, T] ids, padded by `NO_TARGET`. `part.labels` is not read.
    """
    found = []
    for target in targets:
        own = target[target != NO_TARGET].expand(len(part), -1)
        logits = row_losses(model, Labelled(part.ids, part.mask, own, part.types))[1]
        taken = torch.log_softmax(logits, -1).gather(2, own[:, :, None])
        found.append(taken[:, :, 0].sum(1))
    return torch.stack(found, 1)
