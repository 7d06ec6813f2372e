"""LORO's step on the manifold of rank-r matrices, and its ablation with preconditioned factors.

Throughout, W = B A with B: [n, r] and A: [r, m]. The directions G_B and G_A have the same shapes
and are gradients or Adam's normalised moments. All tensors are fp32 or wider.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peptrain.ops.spectral import best_factors

TOLERANCE = 8
"""Singular values of a factor below 8 sqrt(r) eps times the largest one count as zero. Rounding
turns an exact zero of a factor with r columns into 0 to 1.4 sqrt(r) eps, worst at r = 2 and below
0.6 sqrt(r) eps for r >= 8, in fp32 and fp64 (tests/ops/test_riemannian.py)."""


def riemannian_step(
    B: Tensor, A: Tensor, G_B: Tensor, G_A: Tensor, lr: float, cap: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the exact step SVD_r(W - lr P(G)) as balanced factors, in O((n + m) r^2).

    With Q_B R_B = B, Q_A R_A = Aᵀ, X = G_B R_A⁻¹, Y = G_Aᵀ R_B⁻¹, and P_B T_B, P_A T_A the QR
    factorisations of X - Q_B Q_Bᵀ X and Y - Q_A Q_Aᵀ Y (LORO, Proposition 4, with its misprints
    corrected):

        W' = [Q_B P_B] [[R_B R_Aᵀ - lr Yᵀ Q_A, -lr T_Aᵀ], [-lr T_B, 0]] [Q_A P_A]ᵀ, truncated.

    With raw gradients this is the truncated SVD of the Riemannian step. With Adam's directions
    the two expressions for the first block differ, and the one with A is used, as in the authors'
    code. Returns (B', A', damped, ratio). ratio is |W' - W|_F / |W|_F. With `cap`, lr is multiplied
    by `share_below` it. damped is true if a factor was singular. In that case R⁺ replaces R⁻¹, and
    the part of X along columns of Q_B outside the range of B is added to the first block, because
    P_B does not contain it. If r > min(n, m), the surplus columns of B' and rows of A' are zero.
    """
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    inverse_B, lost_B, singular_B = pseudo_inverse(R_B)
    inverse_A, _, singular_A = pseudo_inverse(R_A)
    X, Y = G_B @ inverse_A, G_A.mT @ inverse_B
    P_B, T_B = torch.linalg.qr(X - Q_B @ (Q_B.mT @ X))
    P_A, T_A = torch.linalg.qr(Y - Q_A @ (Q_A.mT @ Y))
    tangent = torch.cat(
        [
            torch.cat([Y.mT @ Q_A + lost_B @ (Q_B.mT @ X), T_A.mT], dim=1),
            torch.cat([T_B, T_B.new_zeros(T_B.shape[0], T_A.shape[0])], dim=1),
        ]
    )
    W = torch.zeros_like(tangent)
    W[: R_B.shape[0], : R_A.shape[0]] = R_B @ R_A.mT
    rate: float | Tensor = lr
    if cap is not None:
        rate = lr * share_below(cap, lr * torch.linalg.norm(tangent), torch.linalg.norm(W))
    rank = min(*B.shape, A.shape[1])  # W' has no more; further singular values are rounding noise
    new_B, new_A = best_factors(W - rate * tangent, rank)
    ratio = relative(torch.linalg.norm(new_B @ new_A - W), torch.linalg.norm(W))
    left, right = torch.cat([Q_B, P_B], dim=1), torch.cat([Q_A, P_A], dim=1)
    pad = torch.nn.functional.pad
    new_B = pad(left @ new_B, (0, B.shape[1] - rank))
    new_A = pad(new_A @ right.mT, (0, 0, 0, B.shape[1] - rank))
    return new_B, new_A, singular_B | singular_A, ratio


def share_below(cap: float, step: Tensor, W: Tensor) -> Tensor:
    """Return min(1, cap / ratio), ratio = step / W, for the norm of lr P(G) and that of W.

    The ratio is that of the step before truncation, which is proportional to lr. So the step after
    it has the ratio `cap`, and truncation to rank r changes that little. It is 0 for W = 0.
    """
    over = step > cap * W
    return torch.where(over, cap * W / torch.where(over, step, 1.0), 1.0)


def relative(moved: Tensor, W: Tensor) -> Tensor:
    """Return moved / W for two norms, and 0 where both are 0."""
    return moved / W.clamp_min(torch.finfo(W.dtype).tiny)


def pseudo_inverse(R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (R⁺, I - R R⁺, whether R is singular) for R: [k, r], k <= r, R⁺: [r, k].

    A singular value below TOLERANCE sqrt(r) eps s_max counts as zero. Its inverse must be 0, not
    only damped, because Adam's directions do not vanish with it: s/t^2 instead of 1/s moved a W of
    norm 30 by 1e11 in fp64. There is no branch on values, which would sync with the device.
    """
    U, s, Vt = torch.linalg.svd(R, full_matrices=False)
    low = s <= TOLERANCE * R.shape[1] ** 0.5 * torch.finfo(R.dtype).eps * s[0]
    inverse = torch.where(low, 0.0, 1 / torch.where(low, 1.0, s))
    return (Vt.mT * inverse) @ U.mT, (U * low) @ U.mT, low.any() | (R.shape[0] < R.shape[1])


def preconditioned_step(
    B: Tensor, A: Tensor, G_B: Tensor, G_A: Tensor, lr: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Return B - lr G_B (A Aᵀ + e I)⁻¹ and A - lr (Bᵀ B + e I)⁻¹ G_A, with e = eps times the trace.

    This is preconditioned LoRA (Zhang and Pilanci 2024) with raw gradients. eps = 0 is the paper's
    form. For a zero factor the trace is 0 too, so e has a floor large enough to divide by.
    """

    def solve(gram: Tensor, rhs: Tensor) -> Tensor:
        e = eps * gram.trace() + torch.finfo(gram.dtype).tiny ** 0.5
        eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
        solution: Tensor = torch.linalg.solve_ex(gram + e * eye, rhs)[0]
        return solution

    return B - lr * solve(A @ A.mT, G_B.mT).mT, A - lr * solve(B.mT @ B, G_A)


def approximation_errors(B: Tensor, A: Tensor, G: Tensor, c: float) -> dict[str, float]:
    """Return |X - G|_F / |G|_F of directions X in which low-rank training moves W = B A.

    G: [n, m] is the gradient by W. error_factors: Z = B Bᵀ G + G Aᵀ A, a gradient step on both
    factors. error_factors_scaled: Z times the scalar that fits best. error_loro: c Z, LORO's
    approximate step. error_tangent: P(G) of the exact step, the best in the tangent space. (LORO,
    appendix C.1.2. Its equation 18 adds two norms, of which only the squares add up.)
    """
    Z = B @ (B.mT @ G) + (G @ A.mT) @ A
    Q_B, Q_A = torch.linalg.qr(B).Q, torch.linalg.qr(A.mT).Q
    rest = G - Q_B @ (Q_B.mT @ G)
    norm, best = torch.linalg.norm(G), (Z * G).sum() / Z.square().sum()
    errors = {
        "error_factors": Z - G,
        "error_factors_scaled": best * Z - G,
        "error_loro": c * Z - G,
        "error_tangent": rest - (rest @ Q_A) @ Q_A.mT,
    }
    return {name: (torch.linalg.norm(E) / norm).item() for name, E in errors.items()}
