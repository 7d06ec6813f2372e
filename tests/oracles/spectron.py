"""Steps on W = B A by singular value decompositions and dense matrices in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor


def polar(X: Tensor) -> Tensor:
    """U Vᵀ of X = U S Vᵀ, over the singular values that are not 0."""
    U, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    floor = 1e-10 * max(float(S.max()), 1e-300)
    kept = sum(float(s) > floor for s in S)
    return U[:, :kept] @ Vh[:kept]


def norm(X: Tensor) -> Tensor:
    """The largest singular value."""
    return torch.linalg.svdvals(X.double()).max()


def projections(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """On the columns of W = B A, and on its rows."""
    return B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A


def tangent(X: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """The projection of X on the tangent space at B A of the matrices of its rank."""
    P, Q = projections(B, A)
    return P @ X + X @ Q - P @ X @ Q


def inverse_root(S: Tensor, damping: float) -> Tensor:
    values, Q = torch.linalg.eigh(S)
    return Q @ torch.diag((values + damping * values.mean()) ** -0.5) @ Q.T


def steps(
    rule: str, B: Tensor, A: Tensor, N_B: Tensor, N_A: Tensor, damping: float = 0.0
) -> tuple[Tensor, Tensor]:
    """dB and dA. N_B and N_A are averages, and so not always G Aᵀ and Bᵀ G of one G."""
    if rule == "factors":
        return polar(N_B), polar(N_A)
    if rule == "spectron":
        rho = 1 / (norm(B) + norm(A) + 1)
        return rho * polar(N_B), rho * polar(N_A)
    if rule == "lora-muon":
        R_A, R_B = inverse_root(A @ A.T, damping), inverse_root(B.T @ B, damping)
        return polar(N_B @ R_A) @ R_A / 2, R_B @ polar(R_B @ N_A) / 2
    assert rule == "tangent" and damping == 0
    P, Q = projections(B, A)
    GQ, PG = N_B @ torch.linalg.pinv(A).T, torch.linalg.pinv(B).T @ N_A
    Z = tangent(polar(GQ + PG - (P @ GQ + PG @ Q) / 2), B, A)
    both = P @ Z @ Q / 2
    return (Z @ Q - both) @ torch.linalg.pinv(A), torch.linalg.pinv(B) @ (P @ Z - both)


def trajectory(
    B: Tensor,
    A: Tensor,
    gradients: Sequence[tuple[Tensor, Tensor]],
    rule: str,
    *,
    lr: float,
    momentum: float,
    decay: float,
    damping: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """B and A after a step for each pair of gradients. The averages are sums with weights
    (1 - μ) μ^age."""
    B, A = B.double(), A.double()
    (n, r), m = B.shape, A.shape[1]
    c_B, c_A = max(1.0, n / m) ** 0.5, max(1.0, n / m) ** 0.5
    if rule == "factors":
        c_B, c_A = max(1.0, n / r) ** 0.5, max(1.0, r / m) ** 0.5
    for t in range(len(gradients)):
        N = []
        for k in (0, 1):
            seen = [gradients[s][k].double() for s in range(t + 1)]
            M = sum((1 - momentum) * momentum ** (t - s) * g for s, g in enumerate(seen))
            N.append((1 - momentum) * seen[t] + momentum * M)
        dB, dA = steps(rule, B, A, N[0], N[1], damping)
        B, A = (1 - lr * decay) * B - lr * c_B * dB, (1 - lr * decay) * A - lr * c_A * dA
    return B, A
