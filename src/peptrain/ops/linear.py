"""Linear maps with a frozen matrix, without its n x m gradient, and with low-rank additions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peptrain.ops.precision import at_least_fp32


def added_linear(x: Tensor, W: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """Return x (W + B A)ᵀ for x: [..., m], W: [n, m], B: [n, r], A: [r, m]; W gets no gradient.

    Forming W + B A costs n m r multiply-adds in each pass. It saves the r (n + m) per token of
    separate low-rank products in the forward pass. The backward pass only has the two rank-r
    products that the gradients of B and A need. Computed in autocast's dtype if autocast is on,
    else in x's.
    """
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _AddedLinear.apply(rows, W, B, A, compute_dtype(x))  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], W.shape[0])


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a matrix product with x: autocast's if autocast is on, else x's."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


class _AddedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, B: Tensor, A: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, W, B, A)
        ctx.dtype = dtype
        return F.linear(x.to(dtype), _merged(W, B, A, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, W, B, A = ctx.saved_tensors
        dy, rows = grads[0].to(ctx.dtype), x.to(ctx.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            # W + B A is recomputed: saving it would keep a copy of every weight until the backward
            # pass, which happens if this is compiled. The fused form keeps no copy.
            dx = (dy @ _merged(W, B, A, ctx.dtype)).to(x.dtype)
        dB = dy.mT @ (rows @ A.to(ctx.dtype).mT)
        dA = (dy @ B.to(ctx.dtype)).mT @ rows
        return dx, None, dB.to(B.dtype), dA.to(A.dtype), None


class _NormedLinear(_AddedLinear):
    """The same map, which also returns the row norms of W + B A, as constants to autograd."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, W: Tensor, B: Tensor, A: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, W, B, A)
        ctx.dtype = dtype
        total = _merged(W, B, A, dtype)
        norms = row_norms(total)
        ctx.mark_non_differentiable(norms)
        return F.linear(x.to(dtype), total), norms


def dora_linear(x: Tensor, W: Tensor, B: Tensor, A: Tensor, m: Tensor) -> Tensor:
    """Return x (diag(m / N) (W + B A))ᵀ, where the row norms N of W + B A get no gradient.

    x: [..., in], W: [out, in], B: [out, r], A: [r, in], m: [out]. Cost and dtypes are those of
    `added_linear`: the norms are computed from the sum that it forms anyway, and m / N scales the
    outputs without being rounded.
    """
    rows = x.reshape(-1, x.shape[-1])
    z, norms = _NormedLinear.apply(rows, W, B, A, compute_dtype(x))  # type: ignore[no-untyped-call]
    y: Tensor = (over_norms(m, norms) * z).to(z.dtype)
    return y.view(*x.shape[:-1], W.shape[0])


@torch.no_grad()
def row_norms(W: Tensor) -> Tensor:
    """Return the Euclidean norms of the rows of W: [n, m], in at least fp32."""
    wide = at_least_fp32(W.dtype)
    norms: Tensor = torch.linalg.vector_norm(W, dim=1, dtype=wide)
    return norms


def over_norms(m: Tensor, norms: Tensor) -> Tensor:
    """Return m / norms, and m where a norm is 0, since the row it scales is 0."""
    return m / torch.where(norms == 0, 1.0, norms)


def bpt_linear(x: Tensor, W: Tensor, U: Tensor, V: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return x (diag(a) (W + U V) diag(b))ᵀ for x: [..., m], W: [n, m], U: [n, r], V: [r, m].

    The diagonals scale the activations without being rounded. So their gradients are plain sums.
    Folded into the weight, they would need divisions by a and b.
    """
    dtype = compute_dtype(x)
    z = added_linear((x * b).to(dtype), W, U, V)
    return (a * z).to(dtype)


def scaled_linear(x: Tensor, W: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return x (diag(a) W diag(b))ᵀ for x: [..., m], frozen W: [n, m], a: [n], b: [m].

    The diagonals scale the activations without being rounded, as in `bpt_linear`.
    """
    dtype = compute_dtype(x)
    z = F.linear((x * b).to(dtype), W.to(dtype))
    return (a * z).to(dtype)


def bpt_weight(W: Tensor, U: Tensor, V: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return diag(a) (W + U V) diag(b), [n, m], in the wider dtype of W and a, at least fp32."""
    dtype = at_least_fp32(W.dtype, a.dtype)
    product = U.to(dtype) @ V.to(dtype)
    return a[:, None] * (W + product) * b


def _merged(W: Tensor, U: Tensor, V: Tensor, dtype: torch.dtype) -> Tensor:
    return (W + U.to(dtype) @ V.to(dtype)).to(dtype)
