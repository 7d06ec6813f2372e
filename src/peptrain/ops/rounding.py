"""Adding small numbers to weights of low precision without losing them."""

from __future__ import annotations

import torch
from torch import Tensor


def add_(W: Tensor, delta: Tensor, seed: int) -> None:
    """W += delta in place; into bf16 with stochastic rounding, so that the sum is unbiased.

    200 merges of 1e-5 into bf16 weights of 0.02 lose three quarters of the change when rounded
    to nearest (tests/ops/test_rounding.py). The random bits are a function of `seed`.
    """
    if W.dtype != torch.bfloat16:
        W.add_(delta)
        return
    generator = torch.Generator(W.device).manual_seed(seed)
    W.copy_(to_bfloat16(W.float() + delta, generator))


def to_bfloat16(x: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 x to one of its two bf16 neighbours, each as likely as it is near.

    bf16 is the upper half of fp32: adding a uniform 16-bit number and cutting the lower half
    carries into the upper one with the right probability.
    """
    bits = torch.randint(1 << 16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    bits += x.contiguous().view(torch.int32)
    bits &= -(1 << 16)
    return bits.view(torch.float32).to(torch.bfloat16)
