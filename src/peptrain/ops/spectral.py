"""Random orthonormal matrices and balanced low-rank factorisations."""

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
    """Draw an n x r matrix with orthonormal columns (rows if r > n) from the uniform distribution.

    A Gaussian matrix is drawn on the CPU in float32, to be the same for every dtype and device, and
    orthonormalised in float64.
    """
    return frame(gaussian(n, r, generator), dtype=dtype, device=device)


def gaussian(n: int, r: int, generator: torch.Generator) -> Tensor:
    """Draw an n x r Gaussian matrix on the CPU, in float32."""
    tall = torch.randn(max(n, r), min(n, r), generator=generator, device="cpu")
    return tall if n >= r else tall.T


def frame(X: Tensor, *, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Orthonormalise the columns of a Gaussian X: [n, r] in float64 on `device`, the rows if r > n.

    The result is Q of the QR factorisation whose R has a positive diagonal. Other signs would not
    be uniform.
    """
    wide = X.shape[1] > X.shape[0]
    Q = orthonormal((X.T if wide else X).to(device).double())
    return (Q.T if wide else Q).to(dtype).contiguous()


def orthonormal(X: Tensor) -> Tensor:
    """Return Q of X = Q R, R with a positive diagonal, for a Gaussian float64 X: [n, r], r <= n.

    A Gaussian X at least twice as tall as wide is well conditioned (almost always below 6). Then
    two rounds of X R⁻¹ with RᵀR = XᵀX are as exact as Householder QR, and many times faster on a
    GPU.
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
    """Return (B', A') with B'A' = BA and sigma_i(B') = sigma_i(A') = sqrt(sigma_i(BA)).

    B: [n, r], A: [r, m]. The SVD is that of the r x r core of two QR factorisations, not of the
    n x m product. If r > min(n, m), the surplus columns are zero.
    """
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    return from_core(Q_B, R_B @ R_A.mT, Q_A, rank=B.shape[1])


def from_core(left: Tensor, core: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return balanced factors of the best rank-`rank` approximation of left core rightᵀ.

    left: [n, p] and right: [m, q] have orthonormal columns, core: [p, q]. If the core is smaller
    than `rank`, the factors are padded with zero columns and rows.
    """
    B, A = best_factors(core, rank)
    return left @ B, A @ right.mT


def best_factors(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (B, A) with BA the best rank-`rank` approximation of W and sigma_i(B) = sigma_i(A).

    W: [n, m], B: [n, rank], A: [rank, m]. Columns and rows beyond min(n, m) are zero.
    """
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    k = min(rank, sigma.shape[0])
    root = sigma[:k].sqrt()
    B, A = U[:, :k] * root, root[:, None] * Vt[:k]
    if k < rank:
        B = torch.nn.functional.pad(B, (0, rank - k))
        A = torch.nn.functional.pad(A, (0, 0, 0, rank - k))
    return B.contiguous(), A.contiguous()
