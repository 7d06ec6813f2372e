"""GaLore (Zhao et al., ICML 2024): dense weights, Adam in a low-rank subspace of the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from peptrain.methods.base import Method
from peptrain.methods.rank import RankMethod
from peptrain.models.sites import ReparamLinear, Site, reparametrized
from peptrain.ops.precision import at_least_fp32
from peptrain.optim.adamw import OptimConfig, groups_around
from peptrain.optim.galore import GaLoreOptimizer, GaLoreRule
from peptrain.rng import Rng
from peptrain.settings.fields import check_positive, check_whole, essential, interval, of_width


class ProjectedLinear(ReparamLinear):
    """W_eff = W, [out, in], trained. The class marks the weights whose gradients are projected."""

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.weight = site.linear.weight.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def effective_weight(self) -> Tensor:
        return self.weight.to(at_least_fp32(self.weight.dtype))


@dataclass(frozen=True, kw_only=True)
class GaLore(RankMethod):
    """Train W in full, with Adam's moments in a rank-r subspace of its gradient."""

    name: ClassVar[str] = "galore"
    purpose: ClassVar[str] = "all weights trained, smaller optimizer state"
    equation: ClassVar[str] = "W, all trainable; Adam on Pᵀ G, P by SVD of G every `gap` steps"
    saves: ClassVar[str] = "optimizer state"
    optim_defaults = replace(Method.optim_defaults, lr=1e-2, eps=1e-6)

    rank: int | None = essential(of_width(0.25))
    """r, the dimension of the gradient's subspace. Unset: a quarter of the hidden size."""
    gap: int | None = essential(interval(0.25, most=200))
    """Steps between two SVDs of the gradient, T in the paper; 0 keeps the P of the first step.
    Unset: a quarter of the run, at most 200."""
    scale: float = 0.25
    """Factor of the projected update, alpha in the paper: W -= lr scale P N."""
    moments: Literal["keep", "rotate"] = "keep"
    """Adam's moments when P changes: keep leaves their values unchanged, rotate transforms them to
    the new basis."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("method.gap", self.gap, 0)
        check_positive("method.scale", self.scale)

    def cost(self, n: int, m: int, rank: int) -> int:
        """Return half the number of values in the optimizer state; half of Adam's 2 n m is n m.

        The state has 2 r max(n, m) values of moments and r min(n, m) of P.
        """
        return rank * max(n, m) + rank * min(n, m) // 2

    def layer(self, site: Site, rng: Rng) -> ProjectedLinear:
        return ProjectedLinear(site)

    def optimizer(
        self, model: nn.Module, sites: Sequence[Site], optim: OptimConfig, phase: int
    ) -> Optimizer:
        assert self.gap is not None
        layers = [m for m in reparametrized(model) if isinstance(m, ProjectedLinear)]
        ranks = {layer.weight: self.rank_of(layer.site) for layer in layers}
        groups = groups_around(model, optim, list(ranks), projected=True)
        rule = GaLoreRule(self.gap, self.scale, self.moments)
        return GaLoreOptimizer(groups, rule, ranks, **optim.adam())
