"""The polar factor of matrices by Newton-Schulz iterations, which are matrix products alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peptrain.ops.precision import at_least_fp32

Polynomial = tuple[float, float, float]
"""(a, b, c) of a x + b x³ + c x⁵."""
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
    values above 3e-3 of it come near to 1, and smaller ones stay below 1. Of X = 0 it is 0, and a
    value that is not finite makes its matrix not finite (Bernstein and Newhouse, 2024; Jordan et
    al., Muon, 2024).

    dtype: of the products; unset: fp16 on a GPU, where no number exceeds its range and its rounding
    is an eighth of bf16's, on a CPU at least fp32. With the sides r <= w a step takes 4 w r² + 2 r³
    operations. Where w > 1.5 r, AT_ONCE steps are composed as r x r matrices, of all such stacks
    with this r together, and five of them take 8 w r² + 28 r³.
    """
    wide = [X if X.shape[-2] <= X.shape[-1] else X.mT for X in stacks]
    xs = [_normalized(X, dtype) for X in wide]
    kinds = [(x.shape[-2], AT_ONCE if x.shape[-1] > 1.5 * x.shape[-2] else 1) for x in xs]
    for r, step in dict.fromkeys(kinds):
        where = [i for i, kind in enumerate(kinds) if kind == (r, step)]
        for start in range(0, len(coefficients), step):
            moved = _composed([xs[i] for i in where], coefficients[start : start + step])
            for i, x in zip(where, moved, strict=True):
                xs[i] = x
    if scales is None:
        found = [x.to(X.dtype) for x, X in zip(xs, stacks, strict=True)]
    else:
        given = zip(xs, scales, stacks, strict=True)
        found = [_scaled(x, scale[:, None, None], X.dtype) for x, scale, X in given]
    return [x if X is W else x.mT for x, X, W in zip(found, stacks, wide, strict=True)]


def _normalized(X: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return X / |X| in the dtype of the products."""
    precise = at_least_fp32(X.dtype)
    fast = torch.float16 if X.is_cuda and precise == torch.float32 else precise
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True, dtype=precise)
    return _scaled(X, 1 / norm.clamp(min=1e-30), dtype or fast)


def _scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x times factor, rounded once, to `dtype`."""
    return torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype))


def _composed(xs: Sequence[Tensor], polynomials: Sequence[Polynomial]) -> list[Tensor]:
    """Return (... P₂ P₁) x with P = a I + b S + c S² of S = x xᵀ, which is P S P for the next.

    The product is kept as g I + D with g the product of all a, so that rounding D does not touch
    what only g moves.
    """
    S = torch.cat([x @ x.mT for x in xs])
    D, g = S, 1.0
    for i, (a, b, c) in enumerate(polynomials):
        Z = torch.baddbmm(S, S, S, beta=b, alpha=c)  # P - a I
        D = torch.baddbmm(D, D, Z, beta=a).add_(Z, alpha=g) if i else Z
        g *= a
        if i + 1 < len(polynomials):
            S = torch.baddbmm(S, Z, S, beta=a)
            S = torch.baddbmm(S, S, Z, beta=a)
    parts = zip(xs, torch.split(D, [len(x) for x in xs]), strict=True)
    return [
        torch.baddbmm(x, d, x, beta=g)
        if x.is_contiguous()
        else torch.baddbmm(x.mT, x.mT, d.mT, beta=g).mT
        for x, d in parts
    ]
