"""Muon by singular value decompositions in float64, one matrix and one step at a time."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def through(X: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    """U p(S / |S|) Vᵀ of X = U S Vᵀ; without coefficients U Vᵀ, the polar factor."""
    U, S, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    values = [float(s) / math.sqrt(sum(float(t) ** 2 for t in S)) for s in S]
    for a, b, c in coefficients:
        values = [a * x + b * x**3 + c * x**5 for x in values]
    if not coefficients:
        values = [1.0] * len(values)
    return U @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ Vh


def trajectory(
    W: Tensor,
    gradients: Sequence[Tensor],
    coefficients: Sequence[tuple[float, float, float]],
    *,
    lr: float,
    momentum: float,
    decay: float,
    scale: str,
) -> Tensor:
    """W after a step for each gradient. M sums the gradients with weights μ^age: its size does not
    matter."""
    (n, m), W = W.shape, W.double()
    c = max(1.0, n / m) ** 0.5 if scale == "spectral" else 0.2 * max(n, m) ** 0.5
    for t in range(len(gradients)):
        M = sum((momentum ** (t - s) * gradients[s].double() for s in range(t + 1)), 0 * W)
        W = (
            W
            - lr * decay * W
            - lr * c * through(gradients[t].double() + momentum * M, coefficients)
        )
    return W
