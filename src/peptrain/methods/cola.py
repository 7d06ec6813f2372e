"""CoLA (Liu et al., 2025): y = B silu(A x), low-rank activations in place of low-rank weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from peptrain.methods.base import Method
from peptrain.methods.rank import RankMethod
from peptrain.models.sites import ReparamLinear, Site, reparametrized
from peptrain.optim.adamw import Kind, OptimConfig
from peptrain.optim.muon import muon
from peptrain.rng import Rng


class CoLALinear(ReparamLinear):
    """y = B silu(A x) + bias. B: [out, r], A: [r, in]; it is not linear in x, so no W exists."""

    def __init__(self, site: Site, rank: int, rng: Rng) -> None:
        super().__init__(site)
        like = site.linear.weight
        B, A = fresh_factors(site, rank, rng)
        self.B, self.A = nn.Parameter(B.to(like)), nn.Parameter(A.to(like))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.A)), self.B, self.bias)


def fresh_factors(site: Site, rank: int, rng: Rng) -> tuple[Tensor, Tensor]:
    """Draw B [n, r] and A [r, m] on the CPU, in fp32, with entries N(0, 1 / sqrt(r (n + m))).

    That is the variance; the standard deviation of both is (r (n + m))^(-1/4). An entry of B A has
    the variance 1 / (n + m). Source: `ColaLayer.__init__` in cola/cola_layer.py of the released
    code (alvin-zyl/CoLA), which divides a standard normal by r^(1/4) and by (n + m)^(1/4).
    """
    (n, m), r = site.shape, rank
    std = (r * (n + m)) ** -0.25
    B, A = (torch.empty(shape, device="cpu") for shape in ((n, r), (r, m)))
    for name, factor in (("B", B), ("A", A)):
        nn.init.normal_(factor, std=std, generator=rng(site.name, purpose=name))
    return B, A


@dataclass(frozen=True, kw_only=True)
class CoLA(RankMethod):
    """Train y = B silu(A x) + bias by AdamW on both factors, or by Muon.

    Muon moves each factor along the polar factor of its own momentum: with silu between them no
    other spectral rule has a W.

    The model keeps its own nonlinearities: silu(gate) * up stays in an MLP beside the silu inside
    each of its three layers, as in the released configurations for 60M and 130M parameters
    (`only_lr_act: false`). Those for 350M and more leave the MLP's own silu out, which a model
    whose config.json has `"hidden_act": "linear"` does.
    """

    name: ClassVar[str] = "cola"
    purpose: ClassVar[str] = "smaller non-linear model, half the FLOPs"
    equation: ClassVar[str] = "y = B silu(A x), both factors trained by AdamW; no W"
    has_dense_equivalent = False
    activation: ClassVar[str | None] = "silu"
    keeps_function_with: ClassVar[Mapping[str, Any] | None] = None
    from_scratch_only = True
    optim_kinds: ClassVar[tuple[Kind, ...]] = ("adamw", "muon")
    # scripts/cola_scripts/cola60m.sh of the released code; 3e-3 at 130M and 350M, 2e-3 at 1B.
    optim_defaults = replace(Method.optim_defaults, lr=6e-3, weight_decay=0.01, clip=0.5)

    def layer(self, site: Site, rng: Rng) -> CoLALinear:
        return CoLALinear(site, self.rank_of(site.name), rng)

    def optimizer(
        self, model: nn.Module, sites: Sequence[Site], optim: OptimConfig, phase: int
    ) -> Optimizer:
        if optim.kind == "muon":
            layers = [m for m in reparametrized(model) if isinstance(m, CoLALinear)]
            factors = [p for layer in layers for p in (layer.B, layer.A)]
            return muon(model, sites, optim, phase, factors=factors)
        return super().optimizer(model, sites, optim, phase)
