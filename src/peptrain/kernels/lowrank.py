"""Fused low-rank maps for inference on a GPU: MLPs with W = B A and LLaMA's decoder layer.

Results agree with the plain forms up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from peptrain.kernels.linear_triton import INTERPRETED
from peptrain.kernels.lowrank_triton import (
    COLUMNS,
    added_products,
    gated_products,
    rotated_products,
)
from peptrain.ops.linear import compute_dtype

Factors = tuple[Tensor, Tensor]
"""B: [n, r], A: [r, m]."""


class Norm(NamedTuple):
    """RMSNorm, w x / sqrt(mean x² + eps), as diag(s) x diag(w) for rows x.

    w is multiplied into the following A, and the product with B applies s, [T], to its result.
    """

    w: Tensor
    eps: float

    def scale(self, mean_square: Tensor) -> Tensor:
        """Return s for the mean squares of the rows, both in fp32."""
        return torch.rsqrt(mean_square + self.eps)


def lowrank_mlp(x: Tensor, gate: Factors, up: Factors, down: Factors) -> Tensor:
    """Compute y = (silu(x (B_g A_g)ᵀ) * (x (B_u A_u)ᵀ)) (B_d A_d)ᵀ.

    One product uses A_g stacked on A_u, and one kernel computes everything between the products
    with A. That kernel does not round gate and up, as the plain form does.
    """
    dtype = compute_dtype(x)
    (B_g, A_g), (B_u, A_u), (B_d, A_d) = ([p.to(dtype) for p in f] for f in (gate, up, down))
    z = F.linear(x.reshape(-1, x.shape[-1]).to(dtype), torch.cat([A_g, A_u]))
    h = gated_products(z, B_g, B_u, None)
    return F.linear(F.linear(h, A_d), B_d).view(x.shape)


def rotated_qkv(
    x: Tensor, norm: Norm, q: Factors, k: Factors, v: Factors, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v of norm(x), [T, n] each, for x: [T, d], with q and k rotated.

    Row t of each head of D columns is rotated by the angles of position t mod L, whose cosines and
    sines are cos, sin: [L, D]. Within a head of q and k, the columns i and D/2 + i, which form a
    pair of the rotation, become columns 2i and 2i + 1. Attention does not depend on the order of
    columns as long as q and k share it.
    """
    D = cos.shape[-1]
    outer = torch.cat([_paired(q[0], D), _paired(k[0], D), v[0]])
    z = F.linear(x, torch.cat([q[1], k[1], v[1]]) * norm.w)
    scale = norm.scale(x.float().square().mean(-1))
    n_q, n_k = q[0].shape[0], k[0].shape[0]
    y = rotated_products(z, outer, scale, cos, sin, n_q, n_k)
    return y[:, :n_q], y[:, n_q : n_q + n_k], y[:, n_q + n_k :]


def added_linear(x: Tensor, h: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """Return y = x + h (B A)ᵀ for x: [T, d] and h: [T, m], and its rows' mean squares, [T]."""
    B, A = factors
    y, squares = added_products(F.linear(h, A), B, x)
    return y, squares.sum(-1) / x.shape[-1]


def added_normed_mlp(
    x: Tensor, mean_square: Tensor, norm: Norm, gate: Factors, up: Factors, down: Factors
) -> Tensor:
    """Return x + mlp(norm(x)) for x: [T, d] and its rows' mean squares; mlp as lowrank_mlp."""
    (B_g, A_g), (B_u, A_u) = gate, up
    z = F.linear(x, torch.cat([A_g, A_u]) * norm.w)
    h = gated_products(z, B_g, B_u, norm.scale(mean_square))
    return added_linear(x, h, down)[0]


def _paired(B: Tensor, D: int) -> Tensor:
    """Reorder the rows of each head of size D to 0, D/2, 1, D/2 + 1, and so on."""
    return B.view(-1, 2, D // 2, B.shape[1]).transpose(1, 2).reshape(B.shape)


def fits(x: Tensor, gate: Factors, up: Factors) -> bool:
    """Return whether lowrank_mlp supports these: on a GPU, 16 bits, one r, a multiple of 8."""
    narrow = compute_dtype(x) in (torch.bfloat16, torch.float16)
    return _placed(x) and narrow and _alike(gate, up)


def fits_layer(x: Tensor, D: int, maps: Sequence[Factors]) -> bool:
    """Return whether the maps of a layer are supported; q and k are the first two of `maps`.

    They need a GPU, bf16 everywhere including autocast (fp16 would overflow before it is scaled),
    one r, and complete blocks of columns in q and k.
    """
    (B_q, _), (B_k, _) = maps[:2]
    dtypes = {x.dtype, compute_dtype(x), *(p.dtype for pair in maps for p in pair)}
    blocks = B_q.shape[0] % COLUMNS == B_k.shape[0] % COLUMNS == D % 2 == x.shape[-1] % 8 == 0
    return _placed(x) and dtypes == {torch.bfloat16} and blocks and _alike(*maps)


def _placed(x: Tensor) -> bool:
    """Return whether kernels can read x: on a GPU and not empty (descriptors can't be empty)."""
    return (x.is_cuda or INTERPRETED) and x.numel() > 0


def _alike(*factors: Factors) -> bool:
    """Return whether all have the same r and it is a multiple of 8."""
    ranks = {B.shape[1] for B, _ in factors}
    return len(ranks) == 1 and ranks.pop() % 8 == 0
