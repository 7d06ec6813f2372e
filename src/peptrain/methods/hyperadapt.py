"""HyperAdapt (Gurung and Campbell, 2025) from scratch: two diagonals around a frozen matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from peptrain.methods.base import Method
from peptrain.methods.bpt import BPT
from peptrain.methods.targets import TargetedMethod
from peptrain.models.sites import ReparamLinear, Site
from peptrain.ops.linear import scaled_linear
from peptrain.ops.precision import at_least_fp32
from peptrain.rng import Rng


class HyperAdaptLinear(ReparamLinear):
    """W_eff = diag(a) W diag(b); W frozen, a: [out], b: [in], both 1 at the start.

    The diagonals are at least fp32, as in BPT. A bias is not scaled by them.
    """

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        n, m = site.shape
        W = site.linear.weight
        wide = at_least_fp32(W.dtype)
        self.weight = W.requires_grad_(False)
        self.a = nn.Parameter(W.new_ones(n, dtype=wide))
        self.b = nn.Parameter(W.new_ones(m, dtype=wide))

    def forward(self, x: Tensor) -> Tensor:
        y = scaled_linear(x, self.weight, self.a, self.b)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def effective_weight(self) -> Tensor:
        return self.a[:, None] * self.weight.to(self.a.dtype) * self.b


@dataclass(frozen=True, kw_only=True)
class HyperAdapt(TargetedMethod):
    """Train the diagonals a and b of diag(a) W diag(b) around a frozen W."""

    name: ClassVar[str] = "hyperadapt"
    purpose: ClassVar[str] = "baseline: bpt without U V"
    equation: ClassVar[str] = "W_eff = diag(a) W diag(b)"
    # From BPT's Table 5, for the setup of its Table 2.
    optim_defaults = replace(Method.optim_defaults, lr=2e-3)
    schedule_defaults = BPT.schedule_defaults

    def layer(self, site: Site, rng: Rng) -> HyperAdaptLinear:
        return HyperAdaptLinear(site)
