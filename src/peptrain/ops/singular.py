"""Singular values of matrices and of OV circuits, and what is measured on them.

Everything is computed in float64. A function of singular values takes `sigma`: [..., k], in
descending order. Of the zero matrix ratios are NaN, and of a matrix that contains NaN or infinity
all values are NaN.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
WELL_CONDITIONED = 1e-3
"""Smallest sigma_k / sigma_1 at which singular values are roots of eigenvalues of a Gram matrix.
Their relative error is at most about eps (sigma_1 / sigma_k)^2, here 2e-10. On a CPU that takes a
quarter of the time of an SVD of 512 x 1376 (1 thread, 56 and 246 ms)."""
Over = Literal["min", "inter", "rank"]


def singular_values(W: Tensor) -> Tensor:
    """Return the singular values of W: [..., n, m] as [..., min(n, m)], descending, in float64.

    They come from the Gram matrix where it is well conditioned, and from an SVD where it is not.
    """
    W = W.double()
    finite = W.isfinite().all(dim=(-2, -1))
    W = torch.where(finite[..., None, None], W, 0.0)
    short = W if W.shape[-2] <= W.shape[-1] else W.mT
    sigma = torch.linalg.eigvalsh(short @ short.mT).flip(-1).clamp_min(0).sqrt()
    low = sigma[..., -1] < WELL_CONDITIONED * sigma[..., 0]
    if bool(low.any()):
        exact: Tensor = torch.linalg.svdvals(short[low]) if low.ndim else torch.linalg.svdvals(W)
        sigma = sigma.masked_scatter(low[..., None], exact)
    return torch.where(finite[..., None], sigma, torch.nan)


def product_singular_values(B: Tensor, A: Tensor) -> Tensor:
    """Return the min(n, r, m) largest singular values of B A, B: [..., n, r], A: [..., r, m].

    They are those of the core R_B R_Aᵀ of two QR factorisations, B = Q_B R_B and Aᵀ = Q_A R_A. So
    their error is relative to that of the factors, also where the n x m product has rank r.
    """
    R_B = torch.linalg.qr(_finite_or_nan(B), mode="r").R
    R_A = torch.linalg.qr(_finite_or_nan(A).mT, mode="r").R
    return singular_values(R_B @ R_A.mT)


def ov_singular_values(W_O: Tensor, W_V: Tensor, heads: int, kv_heads: int) -> Tensor:
    """Return the singular values of W_O[:, h] W_V[g(h), :] of each query head h: [heads, k].

    W_O: [d, heads x head dim], W_V: [kv_heads x head dim, d]. Query head h reads from the key and
    value head g(h) = h // (heads / kv_heads). The product is d x d, but its rank is at most the
    head dimension, and k is that rank: min(d, head dim).
    """
    out = W_O.reshape(W_O.shape[0], heads, -1).transpose(0, 1)
    value = W_V.reshape(kv_heads, -1, W_V.shape[-1]).repeat_interleave(heads // kv_heads, dim=0)
    return product_singular_values(out, value)


def ov_sum_factors(W_O: Tensor, W_V: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    """Return (B, W_V) whose product is the sum of W_O[:, h] W_V[g(h), :] over all query heads h.

    B: [d, kv_heads x head dim] is the sum of the blocks of W_O that read from the same value head.
    """
    d = W_O.shape[0]
    blocks = W_O.double().reshape(d, kv_heads, heads // kv_heads, -1)
    return blocks.sum(dim=2).reshape(d, -1), W_V.double()


def effective_rank(sigma: Tensor) -> Tensor:
    """Return exp(-sum p_i log p_i), p = sigma / sum(sigma) (Roy and Vetterli, 2007): [...]."""
    p = sigma / sigma.sum(-1, keepdim=True)
    entropy: Tensor = torch.special.entr(p).sum(-1)
    return entropy.exp()


def per(sigma: Tensor, shape: tuple[int, int], over: Over = "min", rank: int = 0) -> Tensor:
    """Return the proportional effective rank: `effective_rank` divided by a number of dimensions.

    min: min(n, m), as the released tool of the small-model study divides. inter: m, which is
    d_inter in the study's equation 4 for the matrices that write to the residual stream, and is
    larger than the largest possible rank of W_2. rank: the structural rank `rank`, which is the
    only one of the three that a matrix of rank r can reach.
    """
    assert over != "rank" or rank > 0, "over rank: needs the structural rank"
    n, m = shape
    return effective_rank(sigma).div({"min": min(n, m), "inter": m, "rank": rank}[over])


def stable_rank(sigma: Tensor) -> Tensor:
    """Return |W|_F^2 / sigma_1^2: [...]."""
    return (sigma / sigma[..., :1]).square().sum(-1)


def numerical_rank(sigma: Tensor, tolerance: float) -> Tensor:
    """Return how many singular values are above `tolerance` sigma_1, 0 for the zero matrix: [...].

    A rank without its tolerance says little: BPT's first step has 404, 500 or 512 of 512 at 1e-2,
    1e-3 and 1e-6.
    """
    return _count(sigma, sigma > tolerance * sigma[..., :1])


def count_above(sigma: Tensor, threshold: float = 0.1) -> Tensor:
    """Return how many singular values are above an absolute `threshold` (ReLoRA, Figure 4)."""
    return _count(sigma, sigma > threshold)


def condition(sigma: Tensor, rank: int, n: int) -> Tensor:
    """Return sigma_1 / sigma_r for the structural rank r of a matrix whose larger side is n: [...].

    The rank is that of the factors, of the value heads in an OV circuit, and min(n, m) of other
    matrices. Over all singular values of a matrix of lower rank it would be a division by rounding
    errors. It is infinite if sigma_r is below n eps sigma_1, and NaN for the zero matrix.
    """
    smallest = sigma[..., rank - 1]
    lost = smallest <= n * EPS * sigma[..., 0]
    ratio = sigma[..., 0] / torch.where(lost, torch.nan, smallest)
    return torch.where(lost & (sigma[..., 0] > 0), torch.inf, ratio)


def subspace_overlap(U: Tensor, V: Tensor) -> Tensor:
    """Return |Uᵀ V|_F^2 / r for two frames U, V: [n, r] with orthonormal columns.

    It is 1 for the same subspace and 0 for orthogonal ones. Two random ones have r / n on average.
    """
    return (U.mT @ V).square().sum() / U.shape[-1]


def _finite_or_nan(W: Tensor) -> Tensor:
    """Return W in float64, as NaN where a matrix has a value that is not finite."""
    W = W.double()
    return torch.where(W.isfinite().all(dim=(-2, -1), keepdim=True), W, torch.nan)


def _count(sigma: Tensor, above: Tensor) -> Tensor:
    counted = above.sum(-1).double()
    return torch.where(sigma.isfinite().all(-1), counted, torch.nan)
