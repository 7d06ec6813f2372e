"""The polar factor of matrices by Newton-Schulz iterations, which are matrix products alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peptrain.ops.precision import at_least_fp32

Polynomial = tuple[float, float, float]
"""(a, b, c) of a x + b x³ + c x⁵."""
SAFETY = 1.02
"""The first polynomial is of x / SAFETY, so that they converge up to 1.04, where bf16's rounding
takes no singular value. Without it they diverge above 1.02."""
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
into [0.859, 1.142]; in bf16 they stay within 0.8 to 1.2 (tests/ops/test_newton_schulz.py)."""


def polar(X: Tensor, coefficients: Sequence[Polynomial] = COEFFICIENTS) -> Tensor:
    """Return U Vᵀ of X = U S Vᵀ, nearly: U p(S / |X|) Vᵀ, with the composed polynomials p.

    X: [k, n, m], all done at once, in their dtype. |X| is the Frobenius norm, so that singular
    values above 3e-3 of it come near to 1, and smaller ones stay below 1. Of X = 0 it is 0, and a
    value that is not finite makes its matrix not finite. Each step takes 4 n m min(n, m) +
    2 min(n, m)³ operations (Bernstein and Newhouse, 2024; Jordan et al., Muon, 2024).
    """
    wide = X if X.shape[-2] <= X.shape[-1] else X.mT
    norm = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True, dtype=at_least_fp32(X.dtype))
    x: Tensor = (wide / norm.clamp(min=1e-30)).to(X.dtype)
    for a, b, c in coefficients:
        S = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(S, S, S, beta=b, alpha=c), x, beta=a)
    return x if wide is X else x.mT


def fast_polar(X: Tensor, coefficients: Sequence[Polynomial] = COEFFICIENTS) -> Tensor:
    """Return `polar(X)` in X's dtype, computed in bf16 on a GPU and in fp32 on a CPU, where bf16's
    products are slow. float64 stays."""
    dtype = at_least_fp32(X.dtype)
    narrow = X.is_cuda and dtype == torch.float32
    return polar(X.to(torch.bfloat16 if narrow else dtype), coefficients).to(X.dtype)
