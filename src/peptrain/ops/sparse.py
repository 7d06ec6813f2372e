"""A linear map by a low-rank plus a sparse matrix, without storing an n x m gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peptrain.ops.linear import compute_dtype


def sparse_linear(
    x: Tensor, B: Tensor, A: Tensor, values: Tensor, indices: Tensor, s: float
) -> Tensor:
    """Return x (s B A + S)ᵀ for x: [..., m], B: [n, r], A: [r, m].

    S: [n, m] has `values` at the flat row-major `indices`, both [nnz], without duplicate indices,
    and is 0 elsewhere. W = s B A + S is formed in both passes, and its gradient G = dyᵀ x in the
    backward pass. The gradients of B, A and the values are s G Aᵀ, s Bᵀ G and the entries of G at
    the indices. Neither W nor G is kept after the layer's part of a pass. Computed in autocast's
    dtype if autocast is on, else in x's.
    """
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _SparseLinear.apply(rows, B, A, values, indices, s, compute_dtype(x))  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], B.shape[0])


def sparse_weight(
    B: Tensor, A: Tensor, values: Tensor, indices: Tensor, s: float, dtype: torch.dtype
) -> Tensor:
    """Return s B A + S, [n, m], computed in `dtype`."""
    W = (s * B).to(dtype) @ A.to(dtype)
    W.view(-1).index_add_(0, indices, values.to(dtype))
    return W


class _SparseLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        B: Tensor,
        A: Tensor,
        values: Tensor,
        indices: Tensor,
        s: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(x, B, A, values, indices)
        ctx.s, ctx.dtype = s, dtype
        return F.linear(x.to(dtype), sparse_weight(B, A, values, indices, s, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, B, A, values, indices = ctx.saved_tensors
        dy, dx = grads[0].to(ctx.dtype), None
        if ctx.needs_input_grad[0]:  # W is recomputed, to store none per layer
            dx = (dy @ sparse_weight(B, A, values, indices, ctx.s, ctx.dtype)).to(x.dtype)
        G = dy.mT @ x.to(ctx.dtype)
        dB = ctx.s * (G @ A.to(ctx.dtype).mT)
        dA = ctx.s * (B.to(ctx.dtype).mT @ G)
        dvalues = G.view(-1).index_select(0, indices)
        return dx, dB.to(B.dtype), dA.to(A.dtype), dvalues.to(values.dtype), None, None, None
