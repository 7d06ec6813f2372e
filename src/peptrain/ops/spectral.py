"""Orthonormal frames and the balanced factorisation of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def semi_orthogonal(
    n: int,
    r: int,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A random n x r matrix with orthonormal columns (rows when r > n), uniformly distributed.

    The numbers are drawn on the CPU in float32, so that they are the same for every dtype and
    device, and made orthonormal in float64: Q of the QR whose R has a positive diagonal, without
    which it is not uniform.
    """
    normal = torch.randn(max(n, r), min(n, r), generator=generator, device="cpu")
    frame = orthonormal(normal.to(device).double())
    return (frame if n >= r else frame.T).to(dtype).contiguous()


def orthonormal(X: Tensor) -> Tensor:
    """Q of X = Q R, R with a positive diagonal, for a random X: [n, r], r <= n, in float64.

    A Gaussian X twice as tall as wide is well conditioned (under 6 but for chance), and then two
    rounds of X R⁻¹, RᵀR = XᵀX, are as exact as Householder's QR, and on a GPU many times faster.
    """
    if X.shape[0] < 2 * X.shape[1]:
        Q, R = torch.linalg.qr(X)
        signed: Tensor = Q * torch.where(R.diagonal() < 0, -1.0, 1.0)
        return signed
    for _ in range(2):
        L = torch.linalg.cholesky_ex(X.T @ X)[0]
        X = torch.linalg.solve_triangular(L.T, X, upper=True, left=False)
    return X


def balanced(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """(B', A') with B'A' = BA and sigma_i(B') = sigma_i(A') = sqrt(sigma_i(BA)).

    B: [n, r], A: [r, m]. The SVD is taken of the r x r core of two QR factorisations, never of
    the n x m product. r <= min(n, m), or the surplus columns come out zero.
    """
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    return from_core(Q_B, R_B @ R_A.mT, Q_A, rank=B.shape[1])


def from_core(left: Tensor, core: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Balanced factors of the best rank-`rank` approximation of left core rightᵀ.

    left: [n, p] and right: [m, q] with orthonormal columns, core: [p, q]. A core smaller than
    `rank` is padded with zero columns and rows.
    """
    B, A = best_factors(core, rank)
    return left @ B, A @ right.mT


def best_factors(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(B, A) with BA the best rank-`rank` approximation of W and sigma_i(B) = sigma_i(A).

    W: [n, m], B: [n, rank], A: [rank, m]; beyond min(n, m) their columns and rows are zero.
    """
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    k = min(rank, sigma.shape[0])
    root = sigma[:k].sqrt()
    B, A = U[:, :k] * root, root[:, None] * Vt[:k]
    if k < rank:
        B = torch.nn.functional.pad(B, (0, rank - k))
        A = torch.nn.functional.pad(A, (0, 0, 0, rank - k))
    return B.contiguous(), A.contiguous()
