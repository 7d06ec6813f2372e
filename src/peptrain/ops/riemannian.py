"""LORO's step on the manifold of rank-r matrices, and preconditioned factors, its ablation.

Throughout W = B A with B: [n, r] and A: [r, m]; G_B and G_A are directions of the same shapes:
gradients, or Adam's normalised moments. fp32 or better.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peptrain.ops.spectral import from_core

TOLERANCE = 8
"""Singular values of a factor below 8 sqrt(r) eps times its largest count as zero: rounding leaves
an exact zero of an r-column factor at 0 to 1.4 sqrt(r) eps, the worst at r = 2 and under 0.6 from
r = 8 on, in fp32 and fp64 (tests/ops/test_riemannian.py)."""


def riemannian_step(
    B: Tensor, A: Tensor, G_B: Tensor, G_A: Tensor, lr: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The exact step: SVD_r(W - lr P(G)) as balanced factors, in O((n + m) r^2).

    With Q_B R_B = B, Q_A R_A = Aᵀ, X = G_B R_A⁻¹, Y = G_Aᵀ R_B⁻¹, and P_B T_B, P_A T_A the QR of
    what Q_B, Q_A leave of X, Y (LORO, Proposition 4, its typing errors mended):

        W' = [Q_B P_B] [[R_B R_Aᵀ - lr Yᵀ Q_A, -lr T_Aᵀ], [-lr T_B, 0]] [Q_A P_A]ᵀ, truncated.

    With raw gradients this is the truncated SVD of the Riemannian step. With Adam's directions
    the two expressions of the first block differ; the A-side one is taken, as the authors do.
    Returns (B', A', damped); damped is true when a factor was singular. Then R⁻¹ is R⁺, and the
    columns of Q_B that B does not reach take their part of X in the first block: P has none.
    """
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    inverse_B, lost_B, singular_B = pseudo_inverse(R_B)
    inverse_A, _, singular_A = pseudo_inverse(R_A)
    X, Y = G_B @ inverse_A, G_A.mT @ inverse_B
    P_B, T_B = torch.linalg.qr(X - Q_B @ (Q_B.mT @ X))
    P_A, T_A = torch.linalg.qr(Y - Q_A @ (Q_A.mT @ Y))
    S = R_B @ R_A.mT - lr * (Y.mT @ Q_A + lost_B @ (Q_B.mT @ X))
    core = torch.cat(
        [
            torch.cat([S, -lr * T_A.mT], dim=1),
            torch.cat([-lr * T_B, T_B.new_zeros(T_B.shape[0], T_A.shape[0])], dim=1),
        ]
    )
    left, right = torch.cat([Q_B, P_B], dim=1), torch.cat([Q_A, P_A], dim=1)
    new_B, new_A = from_core(left, core, right, rank=B.shape[1])
    return new_B, new_A, singular_B | singular_A


def pseudo_inverse(R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(R⁺, I - R R⁺, whether a direction is lost) for R: [k, r], k <= r; R⁺: [r, k].

    A singular value under TOLERANCE sqrt(r) eps s_max counts as zero. Its inverse must be 0 and not
    merely damped: Adam's directions do not vanish with it, so s/t^2 in place of 1/s moved a W of
    norm 30 by 1e11 in fp64. Written without a branch on values.
    """
    U, s, Vt = torch.linalg.svd(R, full_matrices=False)
    low = s <= TOLERANCE * R.shape[1] ** 0.5 * torch.finfo(R.dtype).eps * s[0]
    inverse = torch.where(low, 0.0, 1 / torch.where(low, 1.0, s))
    return (Vt.mT * inverse) @ U.mT, (U * low) @ U.mT, low.any() | (R.shape[0] < R.shape[1])


def preconditioned_step(
    B: Tensor, A: Tensor, G_B: Tensor, G_A: Tensor, lr: float, eps: float
) -> tuple[Tensor, Tensor]:
    """B - lr G_B (A Aᵀ + e I)⁻¹ and A - lr (Bᵀ B + e I)⁻¹ G_A, e = eps times the trace.

    Preconditioned LoRA (Zhang and Pilanci 2024), with raw gradients; eps = 0 is the paper's form.
    A zero factor would make e zero as well, so e has a floor that can't be divided to infinity.
    """

    def solve(gram: Tensor, rhs: Tensor) -> Tensor:
        e = eps * gram.trace() + torch.finfo(gram.dtype).tiny ** 0.5
        eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
        solution: Tensor = torch.linalg.solve_ex(gram + e * eye, rhs)[0]
        return solution

    return B - lr * solve(A @ A.mT, G_B.mT).mT, A - lr * solve(B.mT @ B, G_A)
