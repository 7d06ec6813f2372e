"""Cross-entropy of a linear output head that never stores all logits at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from peptrain.ops.linear import compute_dtype
from peptrain.ops.precision import at_least_fp32

LOGITS = 2**28
"""Maximum number of logits in memory at once: 0.5 GiB in bf16, and twice that for their fp32 copy.
With 8192 tokens and a vocabulary of 152k that is an eighth of all logits."""

Softmax = Callable[[Tensor, Tensor, float], Tensor]
Scale = Callable[[list[Tensor], Tensor], None]


def linear_cross_entropy(
    x: Tensor,
    W: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    softmax: Softmax | None = None,
    scale: Scale | None = None,
    limit: int = LOGITS,
) -> Tensor:
    """Return the mean over tokens of -log softmax(x Wᵀ + bias)[target], in nats, at least fp32.

    x: [T, d], W: [V, d], targets: [T] in 0..V-1, bias: [V]. Matrix products are computed in
    autocast's dtype if autocast is on, else in x's dtype, the softmax in at least fp32.

    Tokens are processed in chunks of at most `limit` logits. The gradients of a chunk are computed
    directly after its loss, so that its logits can be freed, and the backward pass only scales
    them. It can run only once: a second backward pass through a retained graph raises a
    RuntimeError. `softmax` and `scale` are `softmax_` and `scale_`, or compiled forms of them.
    """
    dtype = compute_dtype(x)
    rows = _rows(W.shape[0], limit)
    if not torch.is_grad_enabled():
        return _loss(x, W, bias, targets, dtype, rows)
    arguments = (x, W, bias, targets, dtype, rows, softmax or softmax_, scale or scale_)
    loss: Tensor = _LinearCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]
    return loss


def softmax_(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """Overwrite logits [C, V] with scale * softmax(logits); return target log-probabilities [C, 1].

    All elementwise work on the logits is in this function, so that it can be compiled.
    """
    logp = F.log_softmax(logits, dim=1, dtype=at_least_fp32(logits.dtype))
    picked = logp.gather(1, targets[:, None])
    torch.exp(logp.add_(math.log(scale)), out=logits)
    return picked


def scale_(gradients: list[Tensor], by: Tensor) -> None:
    """Multiply each gradient by the scalar `by`, in place. Worth compiling too: uncompiled, PyTorch
    multiplies bf16 by fp32 at a quarter of the memory bandwidth."""
    for gradient in gradients:
        gradient.mul_(by)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        dtype: torch.dtype,
        rows: int,
        softmax: Softmax,
        scale: Scale,
    ) -> Tensor:
        needs_x, needs_W, needs_bias = ctx.needs_input_grad[:3]
        total = x.new_zeros((), dtype=at_least_fp32(dtype))
        dx = torch.empty_like(x) if needs_x else None
        dW = torch.empty_like(W) if needs_W else None
        dbias = torch.zeros_like(bias) if needs_bias and bias is not None else None
        with torch.autocast(x.device.type, enabled=False):
            head = W.to(dtype)
            for start in range(0, len(x), rows):
                here = slice(start, start + rows)
                part = x[here].to(dtype)
                logits = _logits(part, head, bias)
                total += _loss_and_gradient(logits, targets[here], 1 / len(x), softmax)
                if dx is not None:
                    _product(logits, head, dx[here], add=False)
                if dW is not None:
                    _product(logits.mT, part, dW, add=start > 0)
                if dbias is not None:
                    dbias += logits.sum(0, dtype=at_least_fp32(dtype))
        ctx.save_for_backward(dx, dW, dbias)
        ctx.scale = scale
        return total / len(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In place, since these can be the largest gradients of the model. autograd detects changed
        # saved tensors, so a second pass, which would scale twice, raises an error.
        saved = ctx.saved_tensors
        ctx.scale([g for g in saved if g is not None], grads[0])
        return (*saved, None, None, None, None, None)


def _loss_and_gradient(logits: Tensor, targets: Tensor, scale: float, softmax: Softmax) -> Tensor:
    """Return the summed loss of logits [C, V], and overwrite them with scale times its gradient,
    softmax - one hot."""
    picked = softmax(logits, targets, scale)
    # Computed from log p, because the p in `logits` may be rounded to bf16.
    logits.scatter_(1, targets[:, None], (scale * picked.expm1()).to(logits.dtype))
    return -picked.sum()


def _product(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    """Set out = a b, or out += a b, in the dtype of `out`, which may be wider than the factors'."""
    if out.dtype != a.dtype:
        product = a @ b
        out.add_(product) if add else out.copy_(product)
    elif add:
        out.addmm_(a, b)
    else:
        torch.mm(a, b, out=out)


def _loss(
    x: Tensor, W: Tensor, bias: Tensor | None, targets: Tensor, dtype: torch.dtype, rows: int
) -> Tensor:
    total = x.new_zeros((), dtype=at_least_fp32(dtype))
    head = W.to(dtype)
    for start in range(0, len(x), rows):
        here = slice(start, start + rows)
        logits = _logits(x[here].to(dtype), head, bias).to(total.dtype)
        total += F.cross_entropy(logits, targets[here], reduction="sum")
    return total / len(x)


def _logits(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, W, None if bias is None else bias.to(W.dtype))


def _rows(V: int, limit: int) -> int:
    """Return the tokens per chunk: the largest power of two with at most `limit` logits."""
    return 1 << max(limit // V, 1).bit_length() - 1
