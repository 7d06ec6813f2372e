"""GaLore's projection of a gradient to a subspace, and the rotation of Adam's moments in it.

G: [n, m]. P has orthonormal columns and projects the shorter side: if n < m, P is [n, r] and the
projected gradient R = Pᵀ G is [r, m]. Otherwise P is [m, r] and R = G P is [n, r].
"""

from __future__ import annotations

import torch
from torch import Tensor

from peptrain.ops.precision import at_least_fp32


def leading_directions(G: Tensor, rank: int) -> Tensor:
    """Return P, the singular vectors of the `rank` largest singular values (left ones if n < m).

    G: [n, m], P: [min(n, m), min(rank, n, m)], contiguous, in G's dtype. P is computed as the
    eigenvectors of the smaller Gram matrix in float64. If the rank-th singular value is 1e-5 of the
    first, the error of the subspace is 3e-7, and 1e-2 with an SVD in fp32
    (tests/methods/test_galore.py), which on a GPU takes five times as long (docs/log.md). The sign
    of a column is arbitrary and only matters to moments that are kept when P changes: the entry of
    largest magnitude is made positive.
    """
    wide = G.double()
    whole = wide.isfinite().all()
    wide = torch.where(whole, wide, 0.0)  # let NaN reach the loss, where eigh would raise
    gram = wide @ wide.mT if G.shape[0] < G.shape[1] else wide.mT @ wide
    P = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(-1)
    pivot = P.gather(0, P.abs().argmax(0, keepdim=True))
    P = torch.where(whole, P * torch.where(pivot < 0, -1.0, 1.0), torch.nan)
    return P.to(G.dtype).contiguous()


def project(P: Tensor, G: Tensor) -> Tensor:
    """Return R = Pᵀ G, [r, m], if n < m, else G P, [n, r]."""
    return P.mT @ G if G.shape[0] < G.shape[1] else G @ P


def add_back_(W: Tensor, P: Tensor, N: Tensor, *, beta: float, alpha: float) -> None:
    """Set W = beta W + alpha P N in place, or with N Pᵀ if n >= m. N is shaped like R."""
    left, right = (P, N) if W.shape[0] < W.shape[1] else (N, P.mT)
    W.addmm_(left, right, beta=beta, alpha=alpha)


def rotated(
    m: Tensor, v: Tensor, C: Tensor, step: Tensor, betas: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Return Adam's moments (m, v): [r, k], with bias correction `step`, in another basis.

    C = P_newᵀ P_old: [r, r]. m' = C m, and with hats for the bias-corrected moments

        v' = (1 - beta2^step) |(C∘C) (v̂ - m̂²) + (C m̂)²|.

    This assumes that the entries of a column of R are uncorrelated, with means m̂ and variances
    v̂ - m̂². The result is never negative (LDAdam, Robert et al., ICLR 2025).
    """
    step = step.to(at_least_fp32(m.dtype))
    unbias_m, unbias_v = 1 - betas[0] ** step, 1 - betas[1] ** step
    mean, square = m / unbias_m, v / unbias_v
    turned = (C * C) @ (square - mean * mean) + (C @ mean).square()
    return C @ m, unbias_v * turned.abs()
