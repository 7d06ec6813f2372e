"""Low-rank maps without gradients in few passes over memory, for a GPU: W = B A around SwiGLU, and
the parts of a decoder layer of LLaMA's. Same results as the plain forms', to rounding."""

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
    """RMSNorm, w x / sqrt(mean x² + eps). As a map of rows it is diag(s) x diag(w): w is
    multiplied into the A after it, and s, [T], goes where the product with B ends."""

    w: Tensor
    eps: float

    def scale(self, mean_square: Tensor) -> Tensor:
        """s, for the means of the rows' squares, both in fp32."""
        return torch.rsqrt(mean_square + self.eps)


def lowrank_mlp(x: Tensor, gate: Factors, up: Factors, down: Factors) -> Tensor:
    """y = (silu(x (B_g A_g)ᵀ) * (x (B_u A_u)ᵀ)) (B_d A_d)ᵀ.

    One product with A_g over A_u, one kernel for what is between the products with A; its result
    is not rounded where the plain form's gate and up are.
    """
    dtype = compute_dtype(x)
    (B_g, A_g), (B_u, A_u), (B_d, A_d) = ([p.to(dtype) for p in f] for f in (gate, up, down))
    z = F.linear(x.reshape(-1, x.shape[-1]).to(dtype), torch.cat([A_g, A_u]))
    h = gated_products(z, B_g, B_u, None)
    return F.linear(F.linear(h, A_d), B_d).view(x.shape)


def rotated_qkv(
    x: Tensor, norm: Norm, q: Factors, k: Factors, v: Factors, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of norm(x), [T, n] each, for x: [T, d]; q and k rotated by the angles of row t
    mod L, whose cosines and sines are cos, sin: [L, D], in heads of D columns.

    Within a head of q and of k the columns i and D/2 + i, which a rotation turns as a pair, come as
    2i and 2i + 1: attention doesn't see the order that both have.
    """
    D = cos.shape[-1]
    outer = torch.cat([_paired(q[0], D), _paired(k[0], D), v[0]])
    z = F.linear(x, torch.cat([q[1], k[1], v[1]]) * norm.w)
    scale = norm.scale(x.float().square().mean(-1))
    n_q, n_k = q[0].shape[0], k[0].shape[0]
    y = rotated_products(z, outer, scale, cos, sin, n_q, n_k)
    return y[:, :n_q], y[:, n_q : n_q + n_k], y[:, n_q + n_k :]


def added_linear(x: Tensor, h: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    """y = x + h (B A)ᵀ for x: [T, d] and h: [T, m], and the means of its rows' squares, [T]."""
    B, A = factors
    y, squares = added_products(F.linear(h, A), B, x)
    return y, squares.sum(-1) / x.shape[-1]


def added_normed_mlp(
    x: Tensor, mean_square: Tensor, norm: Norm, gate: Factors, up: Factors, down: Factors
) -> Tensor:
    """x + mlp(norm(x)) for x: [T, d], the means of its rows' squares given; mlp as lowrank_mlp."""
    (B_g, A_g), (B_u, A_u) = gate, up
    z = F.linear(x, torch.cat([A_g, A_u]) * norm.w)
    h = gated_products(z, B_g, B_u, norm.scale(mean_square))
    return added_linear(x, h, down)[0]


def _paired(B: Tensor, D: int) -> Tensor:
    """Rows of each head of D: 0, D/2, 1, D/2 + 1, and so on."""
    return B.view(-1, 2, D // 2, B.shape[1]).transpose(1, 2).reshape(B.shape)


def fits(x: Tensor, gate: Factors, up: Factors) -> bool:
    """Whether lowrank_mlp is made for these: a GPU, 16 bits, one r that is a multiple of 8."""
    narrow = compute_dtype(x) in (torch.bfloat16, torch.float16)
    return _placed(x) and narrow and _alike(gate, up)


def fits_layer(x: Tensor, D: int, maps: Sequence[Factors]) -> bool:
    """Whether the other maps are made for these, q and k the first two: a GPU, all in bf16, as is
    autocast (fp16 would overflow before it is scaled), one r, whole blocks of columns in q and k.
    """
    (B_q, _), (B_k, _) = maps[:2]
    dtypes = {x.dtype, compute_dtype(x), *(p.dtype for pair in maps for p in pair)}
    blocks = B_q.shape[0] % COLUMNS == B_k.shape[0] % COLUMNS == D % 2 == x.shape[-1] % 8 == 0
    return _placed(x) and dtypes == {torch.bfloat16} and blocks and _alike(*maps)


def _placed(x: Tensor) -> bool:
    """Whether kernels can read x: a GPU's, and not empty, which a descriptor can't be."""
    return (x.is_cuda or INTERPRETED) and x.numel() > 0


def _alike(*factors: Factors) -> bool:
    """Whether they have one r, that is a multiple of 8."""
    ranks = {B.shape[1] for B, _ in factors}
    return len(ranks) == 1 and ranks.pop() % 8 == 0
