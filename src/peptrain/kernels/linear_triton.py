"""Triton kernels for the fused forms in linear.py, each wrapped in an opaque custom operator.

The compiler can't split such operators. The kernels run on a GPU, or on a CPU in Triton's
interpreter (TRITON_INTERPRET=1), where the tests compare them with plain PyTorch. Matrices are
contiguous, and sums are in fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED: bool = triton.knobs.runtime.interpret
ROWS = 64
"""Tokens summed by one program before it writes a partial sum."""
COLUMNS = 64
"""Columns of a program. These and the other sizes were the fastest of some dozens tried on one H200
(docs/log.md)."""


def operator(function: Callable[..., Any]) -> Any:
    """Register `function` as the custom operator peptrain::NAME.

    Its kernels run on the GPU of its first argument. Without that Triton would launch them on the
    current GPU, which may not be the model's.
    """

    @wraps(function)
    def placed(first: Tensor, *rest: Any, **named: Any) -> Any:
        with torch.cuda.device_of(first):  # type: ignore[no-untyped-call]
            return function(first, *rest, **named)

    return torch.library.custom_op(f"peptrain::{function.__name__}", placed, mutates_args=())


@triton.jit
def _merged(
    W, U, V, a, b, out, n, m, r,
    SCALED: tl.constexpr, DOT: tl.constexpr, N: tl.constexpr, M: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(1) * N + tl.arange(0, N)
    j = tl.program_id(0) * M + tl.arange(0, M)
    here = (i < n)[:, None] & (j < m)[None, :]
    at = i[:, None].to(tl.int64) * m + j[None, :]
    w = tl.load(W + at, mask=here, other=0.0)
    acc = tl.zeros((N, M), tl.float32)
    for start in range(0, r, R):
        k = start + tl.arange(0, R)
        u = tl.load(U + i[:, None] * r + k[None, :], mask=(i < n)[:, None] & (k < r)[None, :],
                    other=0.0)  # fmt: skip
        v = tl.load(V + k[:, None] * m + j[None, :], mask=(k < r)[:, None] & (j < m)[None, :],
                    other=0.0)  # fmt: skip
        dtype = out.dtype.element_ty
        acc = tl.dot(u.to(dtype).to(DOT), v.to(dtype).to(DOT), acc, input_precision="ieee")
    acc += w.to(tl.float32)
    if SCALED:
        acc *= tl.load(a + i, mask=i < n, other=0.0)[:, None]
        acc *= tl.load(b + j, mask=j < m, other=0.0)[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=here)


@operator
def merged(
    W: Tensor, U: Tensor, V: Tensor, a: Tensor | None, b: Tensor | None, after: Tensor | None,
    *, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Compute diag(a) (W + U V) diag(b), [n, m] in `dtype`, in one pass; None stands for ones.

    `after` is not read. The backward pass gives its dy there, because of two optimizations of the
    compiler. It would keep a result that both passes compute by identical calls, and it moves
    backward computations that don't depend on a gradient to the forward pass and keeps their
    results. Either would keep a copy of every weight.
    """
    n, m = W.shape
    W, U, V = W.contiguous(), U.contiguous(), V.contiguous()
    out = torch.empty(n, m, dtype=dtype, device=W.device)
    N, M, R = 64, 128, 64
    grid = (triton.cdiv(m, M), triton.cdiv(n, N))
    scaled = a is not None
    _merged[grid](
        W, U, V, a if scaled else W, b if scaled else W, out, n, m, U.shape[1],
        SCALED=scaled, DOT=dot_type(dtype), N=N, M=M, R=R, num_warps=4,
    )  # fmt: skip
    return out


def dot_type(dtype: torch.dtype) -> Any:
    """Return the type of a kernel's products: fp32 in the interpreter, which reads bf16's bits as
    integers."""
    if INTERPRETED:
        return tl.float32
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtype, tl.float32)


@merged.register_fake
def _(
    W: Tensor, U: Tensor, V: Tensor, a: Tensor | None, b: Tensor | None, after: Tensor | None,
    *, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return W.new_empty(W.shape, dtype=dtype)


@triton.jit
def _column_dots(
    x, y, out, T, n,
    ROWS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * N + tl.arange(0, N)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at = t[:, None].to(tl.int64) * n + j[None, :]
    here = (t < T)[:, None] & (j < n)[None, :]
    product = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    product *= tl.load(y + at, mask=here, other=0.0).to(tl.float32)
    tl.store(out + tl.program_id(1) * n + j, tl.sum(product, 0), mask=j < n)


@operator
def column_dots(x: Tensor, y: Tensor) -> Tensor:
    """Return partial sums, [.., n], of x * y over the tokens of x, y: [T, n].

    Their sum over dim 0 is sum_t x_tj y_tj.
    """
    T, n = x.shape
    out = _partial_sums(x)
    _column_dots[_grid(x)](x, y, out, T, n, ROWS=ROWS, N=COLUMNS, num_warps=2)
    return out


@column_dots.register_fake
def _(x: Tensor, y: Tensor) -> Tensor:
    return _partial_sums(x)


@triton.jit
def _added_dots(
    x, y, z, added, sums_y, sums_z, T, n,
    ROWS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * N + tl.arange(0, N)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at = t[:, None].to(tl.int64) * n + j[None, :]
    here = (t < T)[:, None] & (j < n)[None, :]
    x_ = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    y_ = tl.load(y + at, mask=here, other=0.0).to(tl.float32)
    z_ = tl.load(z + at, mask=here, other=0.0).to(tl.float32)
    tl.store(added + at, (y_ + z_).to(added.dtype.element_ty), mask=here)
    at = tl.program_id(1) * n + j
    tl.store(sums_y + at, tl.sum(x_ * y_, 0), mask=j < n)
    tl.store(sums_z + at, tl.sum(x_ * z_, 0), mask=j < n)


@operator
def added_dots(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return y + z and column_dots of x with each of y and z, in one pass. x, y, z: [T, n]."""
    T, n = x.shape
    added, sums_y, sums_z = torch.empty_like(y), _partial_sums(x), _partial_sums(x)
    _added_dots[_grid(x)](x, y, z, added, sums_y, sums_z, T, n, ROWS=ROWS, N=COLUMNS, num_warps=2)
    return added, sums_y, sums_z


@added_dots.register_fake
def _(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(y), _partial_sums(x), _partial_sums(x)


def _partial_sums(x: Tensor) -> Tensor:
    T, n = x.shape
    return x.new_empty((-(-T // ROWS), n), dtype=torch.float32)


def _grid(x: Tensor) -> tuple[int, int]:
    T, n = x.shape
    return triton.cdiv(n, COLUMNS), triton.cdiv(T, ROWS)


@triton.jit
def _gated_backward(
    dh, g, u, dg, du, h, sum_g, sum_u, T, n,
    ROWS: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    j = tl.program_id(0) * N + tl.arange(0, N)
    total_g = tl.zeros((N,), tl.float32)
    total_u = tl.zeros((N,), tl.float32)
    dtype = h.dtype.element_ty
    for start in range(0, ROWS, R):
        t = tl.program_id(1) * ROWS + start + tl.arange(0, R)
        at = t[:, None].to(tl.int64) * n + j[None, :]
        here = (t < T)[:, None] & (j < n)[None, :]
        d = tl.load(dh + at, mask=here, other=0.0).to(tl.float32)
        gate = tl.load(g + at, mask=here, other=0.0).to(tl.float32)
        up = tl.load(u + at, mask=here, other=0.0).to(tl.float32)
        sigma = 1 / (1 + tl.exp(-gate))
        silu = gate * sigma
        d_gate = d * up * sigma * (1 + gate * (1 - sigma))
        d_up = d * silu
        tl.store(dg + at, d_gate.to(dtype), mask=here)
        tl.store(du + at, d_up.to(dtype), mask=here)
        tl.store(h + at, (silu * up).to(dtype), mask=here)
        total_g += tl.sum(d_gate * gate, 0)
        total_u += tl.sum(d_up * up, 0)
    tl.store(sum_g + tl.program_id(1) * n + j, total_g, mask=j < n)
    tl.store(sum_u + tl.program_id(1) * n + j, total_u, mask=j < n)


@operator
def gated_backward(
    dh: Tensor, g: Tensor, u: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the backward pass of h = silu(g) * u, all [T, n], and the sums for the diagonals.

    Returns dg, du, h (recomputed) and the partial sums, [.., n], of g dg and of u du = h dh.
    """
    T, n = g.shape
    dg, du, h = (torch.empty_like(g) for _ in range(3))
    sum_g, sum_u = _partial_sums(g), _partial_sums(g)
    _gated_backward[_grid(g)](
        dh, g, u, dg, du, h, sum_g, sum_u, T, n, ROWS=ROWS, R=16, N=COLUMNS, num_warps=2
    )
    return dg, du, h, sum_g, sum_u


@gated_backward.register_fake
def _(dh: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dg, du, h = (torch.empty_like(g) for _ in range(3))
    return dg, du, h, _partial_sums(g), _partial_sums(g)
