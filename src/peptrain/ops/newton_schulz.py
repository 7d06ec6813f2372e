"""The polar factor of matrices by Newton-Schulz iterations, which are matrix products alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peptrain.ops.precision import at_least_fp32

Polynomial = tuple[float, float, float]
"""(a, b, c) of a x + b x³ + c x⁵, c not 0."""
SAFETY = 1.02
"""The first polynomial is of x / SAFETY, so that they converge up to 1.04, where rounding takes
no singular value. Without it they diverge above 1.02."""
COEFFICIENTS: tuple[Polynomial, ...] = (
    (
        8.156554524902461 / SAFETY,
        -22.48329292557795 / SAFETY**3,
        15.878769915207462 / SAFETY**5,
    ),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
"""Of Polar Express (Amsel et al., 2025), for five steps. In exact arithmetic they take [3e-3, 1]
into [0.859, 1.142], and with products in fp16, also of matrices in bf16, within 0.8 to 1.2
(tests/ops/test_newton_schulz.py)."""
SMALLEST_NORM = 1e-15
"""A smaller |X| is taken for this one, and its factor is short. The squares of such entries
underflow in fp32, and X over a norm without them would be above 1, where the polynomials diverge.
A momentum gets there in 600 steps without a gradient."""
AT_ONCE = 3
"""Steps from one Gram matrix. What rounding adds to its small eigenvalues grows with each."""


def polar(X: Tensor, coefficients: Sequence[Polynomial] = COEFFICIENTS) -> Tensor:
    """Return `polars` of one stack."""
    return polars([X], coefficients)[0]


def polars(
    stacks: Sequence[Tensor],
    coefficients: Sequence[Polynomial] = COEFFICIENTS,
    *,
    scales: Sequence[Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Return U Vᵀ of each X = U S Vᵀ, nearly: U p(S / |X|) Vᵀ, with the composed polynomials p.

    X: [k, n, m] in each of the stacks; scales: [k] for each, which multiply the results. These have
    the dtypes of the stacks and their orders in memory. |X| is the Frobenius norm, so that singular
    values above 3e-3 of it come near to 1, and smaller ones stay below 1; it is at least
    SMALLEST_NORM, so that of X = 0 the result is 0. A value that is not finite makes its matrix not
    finite (Bernstein and Newhouse, 2024; Jordan et al., Muon, 2024).

    dtype: of the products; unset: fp16 on a GPU, where no number exceeds its range and its rounding
    is an eighth of bf16's, on a CPU at least fp32. With the sides r <= w a step takes 4 w r² + 2 r³
    operations. Where w > 1.5 r, AT_ONCE steps are composed as r x r matrices, of all such stacks
    with this r together, and five of them take 8 w r² + 28 r³.
    """
    size, squares = _completed(coefficients)
    wide = [X if X.shape[-2] <= X.shape[-1] else X.mT for X in stacks]
    xs = [_normalized(X, size, dtype) for X in wide]
    kinds = [(x.shape[-2], AT_ONCE if x.shape[-1] > 1.5 * x.shape[-2] else 1) for x in xs]
    for r, step in dict.fromkeys(kinds):
        where = [i for i, kind in enumerate(kinds) if kind == (r, step)]
        for start in range(0, len(squares), step):
            scale = None
            if scales is not None and start + step >= len(squares):
                scale = torch.cat([scales[i] for i in where])
            moved = _moved([xs[i] for i in where], squares[start : start + step], scale)
            for i, x in zip(where, moved, strict=True):
                xs[i] = x
    found = [_cast(x, X.dtype) for x, X in zip(xs, stacks, strict=True)]
    return [x if X is W else x.mT for x, X, W in zip(found, stacks, wide, strict=True)]


def _completed(coefficients: Sequence[Polynomial]) -> tuple[float, list[tuple[float, float]]]:
    """Return |y| to begin with and (e, d) of each step y = ((S + e I)² + d I) y, S = y yᵀ.

    With y = u x the polynomial x P(x xᵀ), P = a + b S + c S² = c ((S + b/2c)² + a/c - (b/2c)²), is
    that step with e = u² b/2c and d = u⁴ (a/c - (b/2c)²), and gives u⁵ / c times it. So u before
    the last step, after which it is 1, is the fifth root of c, and so on backwards. Then nothing
    but products remains, and a number added to diagonals.
    """
    u, squares = 1.0, []
    for a, b, c in reversed(coefficients):
        u = math.copysign(abs(c * u) ** 0.2, c * u)
        middle = b / (2 * c)
        squares.append((u**2 * middle, u**4 * (a / c - middle**2)))
    return u, squares[::-1]


def _normalized(X: Tensor, size: float, dtype: torch.dtype | None) -> Tensor:
    """Return X size / |X|, rounded once, to the dtype of the products."""
    precise = at_least_fp32(X.dtype)
    fast = torch.float16 if X.is_cuda and precise == torch.float32 else precise
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=precise)
    out = torch.empty_like(X, dtype=dtype or fast)
    return torch.mul(X, size / norm.clamp(min=SMALLEST_NORM), out=out)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in `dtype`. From fp16 to bf16 on a GPU `to` takes twice as long."""
    if x.dtype == dtype:
        return x
    out = torch.empty_like(x, dtype=dtype)
    torch._foreach_copy_([out], [x])
    return out


def _moved(
    xs: Sequence[Tensor], squares: Sequence[tuple[float, float]], scale: Tensor | None
) -> list[Tensor]:
    """Return the steps of `_completed` of several stacks, times scale, from one x xᵀ of each.

    A step multiplies x by Q = T² + d I, T = S + e I, and S = x xᵀ becomes Q S Q.
    """
    S = torch.cat([x @ x.mT for x in xs]) if len(xs) > 1 else xs[0] @ xs[0].mT
    D: Tensor | None = None
    for i, (e, d) in enumerate(squares):
        last = i + 1 == len(squares)
        T = S if last else S.clone()
        T.diagonal(dim1=-2, dim2=-1).add_(e)
        Q = T @ T
        Q.diagonal(dim1=-2, dim2=-1).add_(d)
        D = Q if D is None else D @ Q
        if not last:
            S = Q @ S @ Q
    assert D is not None, "no step"
    if scale is not None:
        D.mul_(scale[:, None, None])
    parts = zip(torch.split(D, [len(x) for x in xs]), xs, strict=True)
    return [times(d, x) for d, x in parts]


def times(P: Tensor, X: Tensor) -> Tensor:
    """Return P X in the order in memory of X."""
    return P @ X if X.is_contiguous() else (X.mT @ P.mT).mT
