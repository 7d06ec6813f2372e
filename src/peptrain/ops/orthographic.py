"""LORO's exact step with the orthographic retraction: r x r inverses, no eigendecomposition.

The notation is that of ops/riemannian_gram.py, which calls it for many pairs at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peptrain.ops.riemannian import relative, share_below
from peptrain.ops.riemannian_gram import cholesky, well_conditioned


def orthographic_step(
    B: Tensor, A: Tensor, D_B: Tensor, D_A: Tensor, lr: float, cap: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (B', A', sound, ratio) of W' = B'A' = (Z V)(Uᵀ Z V)⁻¹(Uᵀ Z), Z = W - lr P(D).

    B, D_B: [k, n, r], A, D_A: [k, r, m], float64, k pairs. The columns of U and V are orthonormal
    bases of the column and row space of W = B A (Absil and Malick, 2012), and P(D) is the tangent
    vector of `riemannian_step`. Much of that cancels:

        A' = A - lr (BᵀB)⁻¹ D_A,   B' = B - lr C_B (A'Aᵀ)⁻¹,   C_B = D_B - B (BᵀB)⁻¹ BᵀD_B.

    Then each column of B' and row of A' are scaled to equal norms. Their basis is not turned, as an
    SVD would, so the moments of an optimizer still fit. It takes 5 n r² + 4 m r² multiply-adds and
    some r³. W' differs from the truncated SVD of Z in third order of lr, and from Z in second,
    along the normal space at W: with Q_A an orthonormal basis of the rows of A,

        W' - Z = lr² C_B (A'Aᵀ)⁻¹ (BᵀB)⁻¹ D_A (I - Q_A Q_Aᵀ).

    ratio is |W' - W| / |W|, and with `cap` lr is multiplied by `share_below` it. sound is false,
    and the rest of no use, where a factor is singular or nearly so, or |W' - Z| > |Z - W|: there W'
    no longer follows the step.
    """
    S_B, inverse_B, sound_B = _inverse_gram(B)
    S_A, inverse_A, sound_A = _inverse_gram(A.mT)
    move_A = inverse_B @ D_A
    C_B = D_B - B @ (inverse_B @ (B.mT @ D_B))
    square_B, M = C_B.mT @ C_B, move_A @ A.mT
    size = _root(S_B * S_A)
    step = lr * (_root(D_A * move_A).square() + _root(square_B * inverse_A).square()).sqrt()
    rate = torch.full_like(size, lr)
    if cap is not None:
        share = share_below(cap, step, size)
        rate, step = share * rate, share * step
    by = rate[:, None, None]
    inverse, info = torch.linalg.inv_ex(S_A - by * M)
    new_A, new_B = A - by * move_A, B - by * C_B @ inverse
    normal_A = move_A @ move_A.mT - M @ inverse_A @ M.mT
    beyond = rate**2 * _root((inverse.mT @ square_B @ inverse) * normal_A)
    ratio = relative((step.square() + beyond.square()).sqrt(), size)
    sound = sound_B & sound_A & (info == 0) & (beyond <= step) & ratio.isfinite()
    lengths_B = torch.linalg.vector_norm(new_B, dim=-2, keepdim=True)
    lengths_A = torch.linalg.vector_norm(new_A, dim=-1, keepdim=True).mT
    g = (lengths_A / lengths_B).sqrt()
    return new_B * g, new_A / g.mT, sound, ratio


def _inverse_gram(B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return BᵀB, its inverse, and whether B is `well_conditioned`."""
    M = B.mT @ B
    _, root, positive = cholesky(M)
    inverse = root @ root.mT
    return M, inverse, positive & well_conditioned(M, inverse)


def _root(products: Tensor) -> Tensor:
    """Return the square root of every sum, which rounding may not make negative."""
    return products.sum((-2, -1)).clamp_min(0.0).sqrt()
