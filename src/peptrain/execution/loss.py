"""Next-token cross-entropy, the training loss."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from peptrain.execution.counters import Operations
from peptrain.models.hf import vocabulary_size
from peptrain.models.probe import alike, evaluating, rounding
from peptrain.ops.cross_entropy import linear_cross_entropy, scale_, softmax_
from peptrain.ops.precision import at_least_fp32

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("peptrain")


class NextTokenLoss(nn.Module):
    """Mean cross-entropy of windows of tokens, in nats.

    For a plain linear head the logits are computed in chunks and never exist all at once.
    """

    def __init__(self, model: PreTrainedModel, *, compile: bool = False) -> None:
        super().__init__()
        self.model = model
        self._chunked = has_plain_head(model)
        self._loss = torch.compile(token_loss) if compile else token_loss
        self._softmax = torch.compile(softmax_) if compile else softmax_
        self._scale = torch.compile(scale_) if compile else scale_

    def forward(self, windows: Tensor) -> Tensor:
        """Return the loss of windows: [rows, L + 1] token ids, of which the first L predict the
        last L."""
        ids, targets = windows[:, :-1], windows[:, 1:]
        if not self._chunked:
            return self._loss(self.model(input_ids=ids, use_cache=False).logits, targets)
        x = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        head: Any = self.model.get_output_embeddings()
        return linear_cross_entropy(
            x.flatten(0, 1), head.weight, targets.flatten(), head.bias,
            softmax=self._softmax, scale=self._scale,
        )  # fmt: skip


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Return whether the logits are exactly W h + bias, where h is the base model's output.

    Some models scale or cap the logits, or scale h. This is tested on a few tokens: the head is
    made to return values so large that any cap or scale changes them.
    """
    base, head = model.base_model, model.get_output_embeddings()
    if base is model or type(head) is not nn.Linear:
        return _plain_form(model)
    if isinstance(head.weight, FakeTensor):
        return _only_adds_its_head(model) or _plain_form(model)
    ids = torch.arange(4, device=model.device)[None] % vocabulary_size(model)
    loud = torch.linspace(-1e4, 1e4, 4 * head.out_features).view(1, 4, -1)
    seen: list[tuple[Tensor, Tensor]] = []

    def answer(_: nn.Module, given: tuple[Tensor, ...], logits: Tensor) -> Tensor:
        seen.append((given[0], loud.to(logits)))
        return seen[-1][1]

    hook = head.register_forward_hook(answer)
    try:
        with evaluating(model):
            logits = model(input_ids=ids, use_cache=False).logits
            h = base(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        hook.remove()
    if len(seen) == 1:
        given, answered = seen[0]
        if alike(h, given, rounding(h)) and torch.equal(logits.to(answered), answered):
            return True
    return _plain_form(model)


def _only_adds_its_head(model: PreTrainedModel) -> bool:
    """Decide has_plain_head for a model of fake tensors: whether its operations are those of the
    base model and the head, apart from views and casts."""
    ids = torch.zeros(1, 4, dtype=torch.long)
    with evaluating(model), Operations() as all_of_it:
        model(input_ids=ids, use_cache=False)
    with evaluating(model), Operations() as parts:
        h = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        model.get_output_embeddings()(h)
    same: bool = all_of_it.seen == parts.seen
    return same


def _plain_form(model: PreTrainedModel) -> bool:
    log.info("%s changes its head's logits: keeping all of them in memory", type(model).__name__)
    return False


def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats, in fp32 or wider.

    logits: [rows, L, V]; targets: [rows, L].
    """
    wide = logits.to(at_least_fp32(logits.dtype))
    return F.cross_entropy(wide.flatten(0, 1), targets.flatten())
