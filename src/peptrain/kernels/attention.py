"""Triton kernel for causal attention in short windows, forward only.

One program computes one head of one window. Kernels for long windows spend most of their time on
empty blocks here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peptrain.kernels.linear_triton import INTERPRETED, dot_type, operator

LONGEST = 64
"""Longest window, in tokens, for which this kernel is the fastest. With 32 heads of 64 on an H200:
512 windows of 32 tokens take 64 µs (memory-efficient 191, cuDNN 308), 256 of 64 tokens also 64
(106, 158), 128 of 128 tokens 89 (143, 76)."""


@triton.jit
def _short_attention(
    q, k, v, o, scale, L, heads, group,
    q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t,
    D: tl.constexpr, S: tl.constexpr, C: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    t, c = tl.arange(0, S), tl.arange(0, C)
    here = (t < L)[:, None] & (c < D)[None, :]
    of_q = b * q_b + h * q_h + t[:, None] * q_t + c[None, :]
    of_k = b * k_b + h // group * k_h + t[:, None] * k_t + c[None, :]
    of_v = b * v_b + h // group * v_h + t[:, None] * v_t + c[None, :]
    queries = tl.load(q + of_q, mask=here, other=0.0).to(DOT)
    keys = tl.load(k + of_k, mask=here, other=0.0).to(DOT)
    values = tl.load(v + of_v, mask=here, other=0.0).to(DOT)
    scores = tl.dot(queries, keys.T, input_precision="ieee") * (scale * 1.4426950408889634)
    scores = tl.where(t[:, None] >= t[None, :], scores, -float("inf"))
    p = tl.exp2(scores - tl.max(scores, 1)[:, None])
    p /= tl.sum(p, 1)[:, None]
    out = tl.dot(p.to(o.dtype.element_ty).to(DOT), values, input_precision="ieee")
    at = ((b * L + t[:, None]) * heads + h) * D + c[None, :]
    tl.store(o + at, out.to(o.dtype.element_ty), mask=here)


@operator
def short_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Compute causal softmax(scale q kᵀ) v, [rows, L, heads, D].

    q: [rows, heads, L, D], k and v: [rows, heads / g, L, D], with stride 1 in the last dimension.
    Query head h attends to head h // g.
    """
    rows, heads, L, D = q.shape
    o = _output(q)
    S = max(16, triton.next_power_of_2(L))
    _short_attention[(rows * heads,)](
        q, k, v, o, scale, L, heads, heads // k.shape[1],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        D=D, S=S, C=max(16, triton.next_power_of_2(D)), DOT=dot_type(q.dtype),
        num_warps=4 if S > 32 else 1, num_stages=1,
    )  # fmt: skip
    return o


@short_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return _output(q)


def _output(q: Tensor) -> Tensor:
    rows, heads, L, D = q.shape
    return q.new_empty(rows, L, heads, D)


def fits_short(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return whether short_attention supports these tensors and gradients are disabled."""
    narrow = {t.dtype for t in (q, k, v)} in ({torch.bfloat16}, {torch.float16})
    alike = k.shape == v.shape and q.shape[2] == k.shape[2] <= LONGEST and q.shape[3] <= 128
    dense = all(t.stride(3) == 1 for t in (q, k, v))
    placed = q.is_cuda or INTERPRETED
    return placed and narrow and alike and dense and not torch.is_grad_enabled()
