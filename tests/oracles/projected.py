"""GaLore's loop (Zhao et al., ICML 2024, Algorithm 2) entry by entry in NumPy, sharing no code with
the library: W n x m, G its gradient, P from the SVD of G itself."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]


def directions(G: Array, r: int) -> Array:
    """The r leading left singular vectors, as columns; of each the entry of largest size is
    positive."""
    P = np.linalg.svd(G)[0][:, :r].copy()
    for j in range(P.shape[1]):
        if P[np.argmax(np.abs(P[:, j])), j] < 0:
            P[:, j] = -P[:, j]
    return P


def turned(
    M: Array, V: Array, old: Array, new: Array, k: int, betas: tuple[float, float]
) -> tuple[Array, Array]:
    """M and V, r x m, of k steps, from the basis `old` to `new`, entry by entry (LDAdam).

    Entry i of a column in the new basis is the sum over j of c_ij times entry j in the old one,
    c_ij the inner product of the two directions. Uncorrelated entries of means a_j and variances
    q_j - a_j^2 have the mean square sum c_ij^2 (q_j - a_j^2) + (sum c_ij a_j)^2.
    """
    r, columns = M.shape
    u1, u2 = 1 - betas[0] ** k, 1 - betas[1] ** k
    M2, V2 = np.zeros_like(M), np.zeros_like(V)
    for i in range(r):
        c = [float(np.dot(new[:, i], old[:, j])) for j in range(r)]
        for x in range(columns):
            means = [M[j, x] / u1 for j in range(r)]
            variances = [V[j, x] / u2 - means[j] ** 2 for j in range(r)]
            M2[i, x] = sum(c[j] * M[j, x] for j in range(r))
            spread = sum(c[j] ** 2 * variances[j] for j in range(r))
            V2[i, x] = u2 * abs(spread + sum(c[j] * means[j] for j in range(r)) ** 2)
    return M2, V2


def galore(
    W: Array,
    gradients: Sequence[Array],
    rates: Sequence[float],
    *,
    r: int,
    gap: int,
    scale: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    rotate: bool,
) -> list[Array]:
    """W after each step, with the learning rate of each. A gap of 0 keeps the first P.

    P stands on the left if n < m; else on the right of G, that is on the left of its transpose.
    """
    right = W.shape[0] >= W.shape[1]
    path: list[Array] = []
    P = np.zeros((0, 0))
    M = V = np.zeros(())
    for t, (gradient, lr) in enumerate(zip(gradients, rates, strict=True)):
        G = gradient.T if right else gradient
        if t == 0 or (gap and t % gap == 0):
            new = directions(G, r)
            if t and rotate:
                M, V = turned(M, V, P, new, t, betas)
            P = new
        R = P.T @ G
        M = betas[0] * M + (1 - betas[0]) * R
        V = betas[1] * V + (1 - betas[1]) * R**2
        N = np.zeros_like(R)
        for i, x in np.ndindex(*R.shape):
            mean = M[i, x] / (1 - betas[0] ** (t + 1))
            N[i, x] = mean / (math.sqrt(V[i, x] / (1 - betas[1] ** (t + 1))) + eps)
        step = scale * P @ N
        W = W - lr * decay * W - lr * (step.T if right else step)
        path.append(W)
    return path
