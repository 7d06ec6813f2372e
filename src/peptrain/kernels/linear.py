"""Fused GPU forms of the linear maps in ops/linear.py; results agree up to rounding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peptrain.kernels.linear_triton import added_dots, column_dots, gated_backward, merged
from peptrain.ops.linear import compute_dtype

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""W: [n, m], U: [n, r], V: [r, m], a: [n], b: [m]."""


def added_linear(x: Tensor, W: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """Compute y = x (W + B A)ᵀ, as ops.linear.added_linear.

    One kernel forms W + B A in the forward pass, and again in the backward pass.
    """
    rows = x.reshape(-1, x.shape[-1]).to(compute_dtype(x)).contiguous()
    y: Tensor = _AddedLinear.apply(rows, W, B, A)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], W.shape[0])


def bpt_linear(x: Tensor, W: Tensor, U: Tensor, V: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute y = x W_effᵀ with W_eff = diag(a) (W + U V) diag(b), as ops.linear.bpt_linear.

    The diagonals are folded into the weight, so that neither pass scales activations. Then
    da_i = sum_t y_ti dy_ti / a_i and db_j = sum_t x_tj dx_tj / b_j.
    """
    rows = x.reshape(-1, x.shape[-1]).to(compute_dtype(x)).contiguous()
    y: Tensor = _BPTLinear.apply(rows, W, U, V, a, b)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], W.shape[0])


def bpt_mlp(x: Tensor, gate: Parts, up: Parts, down: Parts) -> Tensor:
    """Compute y = (silu(x G_effᵀ) * (x U_effᵀ)) D_effᵀ, three BPT layers around SwiGLU.

    The backward pass recomputes h = silu(g) u. The sums for the diagonals on both sides of h need
    no extra pass: the kernel that SwiGLU's backward pass needs anyway computes them too.
    """
    rows = x.reshape(-1, x.shape[-1]).to(compute_dtype(x)).contiguous()
    y: Tensor = _BPTMLP.apply(rows, *gate, *up, *down)  # type: ignore[no-untyped-call]
    return y.view(x.shape)


class _AddedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, B: Tensor, A: Tensor) -> Tensor:
        ctx.save_for_backward(x, W, B, A)
        return F.linear(x, merged(W, B, A, None, None, None, dtype=x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, W, B, A = ctx.saved_tensors
        dy = grads[0]
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy @ merged(W, B, A, None, None, dy, dtype=x.dtype)
        return dx, None, *_factor_gradients(x, dy, B, A)


class _BPTLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, U: Tensor, V: Tensor, a: Tensor, b: Tensor
    ) -> Tensor:
        y = F.linear(x, merged(W, U, V, a, b, None, dtype=x.dtype))
        ctx.save_for_backward(x, y, W, U, V, a, b)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, y, W, U, V, a, b = ctx.saved_tensors
        dy = grads[0].contiguous()
        dx = dy @ merged(W, U, V, a, b, dy, dtype=x.dtype)
        dU, dV = _scaled_factor_gradients(x, dy, U, V, a, b)
        return dx, None, dU, dV, _over(column_dots(y, dy), a), _over(column_dots(x, dx), b)


class _BPTMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parts: Tensor) -> Tensor:
        gate, up, down = (merged(*parts[i : i + 5], None, dtype=x.dtype) for i in (0, 5, 10))
        g, u = F.linear(x, gate), F.linear(x, up)
        y = F.linear(F.silu(g) * u, down)
        ctx.save_for_backward(x, g, u, y, *parts)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, g, u, y, *parts = ctx.saved_tensors
        gate, up, down = parts[:5], parts[5:10], parts[10:]
        dy = grads[0].contiguous()
        dh = dy @ merged(*down, dy, dtype=x.dtype)
        dg, du, h, sums_g, sums_u = gated_backward(dh, g, u)
        dU, dV = _scaled_factor_gradients(h, dy, *down[1:])
        of_down = (None, dU, dV, _over(column_dots(y, dy), down[3]), _over(sums_u, down[4]))
        dx_g = dg @ merged(*gate, dg, dtype=x.dtype)
        dx_u = du @ merged(*up, du, dtype=x.dtype)
        dx, dots_g, dots_u = added_dots(x, dx_g, dx_u)
        dU, dV = _scaled_factor_gradients(x, dg, *gate[1:])
        of_gate = (None, dU, dV, _over(sums_g, gate[3]), _over(dots_g, gate[4]))
        dU, dV = _scaled_factor_gradients(x, du, *up[1:])
        of_up = (None, dU, dV, _over(sums_u, up[3]), _over(dots_u, up[4]))
        return dx, *of_gate, *of_up, *of_down


def _scaled_factor_gradients(
    x: Tensor, dy: Tensor, U: Tensor, V: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """Return dU = a (dyᵀ x (V b)ᵀ) and dV = ((dy (a U))ᵀ x) b; only small matrices are scaled."""
    dU, dV = _factor_gradients(x, dy, a[:, None] * U, V * b)
    return (a[:, None] * dU).to(U.dtype), (dV * b).to(V.dtype)


def _factor_gradients(x: Tensor, dy: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Return dB = dyᵀ (x Aᵀ) and dA = (dy B)ᵀ x without forming the n x m gradient."""
    dB = dy.mT @ (x @ A.to(x.dtype).mT)
    dA = (dy @ B.to(x.dtype)).mT @ x
    return dB.to(B.dtype), dA.to(A.dtype)


def _over(partial_sums: Tensor, diagonal: Tensor) -> Tensor:
    """Return the sums divided by the diagonal; where that is 0 the sums are 0 and stay 0."""
    sums: Tensor = partial_sums.sum(0)
    return sums / torch.where(diagonal == 0, 1.0, diagonal)
