"""Plain low-rank training: W = B A, both factors trained by AdamW; LORO's layer and baseline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peptrain.methods.base import Method
from peptrain.methods.rank import RankMethod
from peptrain.models.sites import ReparamLinear, Site
from peptrain.ops.precision import at_least_fp32
from peptrain.ops.spectral import best_factors
from peptrain.rng import Rng


class LowRankLinear(ReparamLinear):
    """W = B A, so y = x Aᵀ Bᵀ. B: [out, r], A: [r, in]; no dense W exists.

    The factors are initialised by xavier_normal, or by the truncated SVD of a trained W.
    """

    def __init__(self, site: Site, rank: int, rng: Rng) -> None:
        super().__init__(site)
        n, m = site.shape
        self.width = site.width
        W = site.linear.weight.detach()
        if site.fresh:
            B = _xavier_normal(n, rank, rng(site.name, purpose="B"))
            A = _xavier_normal(rank, m, rng(site.name, purpose="A"))
        else:
            B, A = best_factors(W.to(at_least_fp32(W.dtype)), rank)
        self.B, self.A = nn.Parameter(B.to(W)), nn.Parameter(A.to(W))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.A), self.B, self.bias)

    def effective_weight(self) -> Tensor:
        dtype = at_least_fp32(self.B.dtype)
        return self.B.to(dtype) @ self.A.to(dtype)


def _xavier_normal(n: int, m: int, generator: torch.Generator) -> Tensor:
    return nn.init.xavier_normal_(torch.empty(n, m, device="cpu"), generator=generator)


@dataclass(frozen=True, kw_only=True)
class LowRank(RankMethod):
    """Train W = B A by AdamW on both factors."""

    name: ClassVar[str] = "lowrank"
    purpose: ClassVar[str] = "baseline: plain low-rank factors"
    equation: ClassVar[str] = "W = B A, both factors trained by AdamW"
    keeps_function_with = None
    # The best of 5e-4, 1e-3, 3e-3 and 1e-2 at llama-60m (docs/first-table.md).
    optim_defaults = replace(Method.optim_defaults, lr=1e-3)

    def layer(self, site: Site, rng: Rng) -> LowRankLinear:
        return LowRankLinear(site, self.r, rng)

    def fuse(self, model: nn.Module) -> None:
        from peptrain.kernels.llama_layer import fuse_layers  # Triton is not everywhere
        from peptrain.kernels.swiglu_mlp import LowRankMLP, fuse_mlps

        fuse_mlps(model, LowRankLinear, LowRankMLP)
        fuse_layers(model)
