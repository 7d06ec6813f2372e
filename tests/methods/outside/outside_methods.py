"""Methods as other people write them. test_outside.py installs this file as a package."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from peptrain.methods.base import Method
from peptrain.methods.lowrank import LowRank, LowRankLinear
from peptrain.methods.rank import RankMethod
from peptrain.models.sites import ReparamLinear, Site
from peptrain.optim.adamw import OptimConfig, parameter_groups
from peptrain.rng import Rng


class SiluLinear(ReparamLinear):
    """y = B silu(A x) + bias, with A: [r, in] and B: [out, r]: no matrix does the same."""

    def __init__(self, site: Site, rank: int, rng: Rng) -> None:
        super().__init__(site)
        n, m = site.shape
        A = torch.randn(rank, m, generator=rng(site.name, purpose="A"), device="cpu") / 4
        B = torch.randn(n, rank, generator=rng(site.name, purpose="B"), device="cpu") / 4
        like = site.linear.weight
        self.A, self.B = nn.Parameter(A.to(like)), nn.Parameter(B.to(like))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.A)), self.B, self.bias)


@dataclass(frozen=True, kw_only=True)
class Silu(RankMethod):
    """Train y = B silu(A x)."""

    name = "silu"
    equation = "y = B silu(A x)"
    has_dense_equivalent = False
    activation = "silu"
    keeps_function_with = None

    def layer(self, site: Site, rng: Rng) -> SiluLinear:
        return SiluLinear(site, self.r, rng)


class SignedSteps(Optimizer):
    """p -= lr sign(m) in groups that are `signed`, else p -= lr m; m: mean of past gradients."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, beta: float) -> None:
        super().__init__(groups, {"lr": lr, "beta": beta, "signed": False, "clock": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                m = self.state[p].setdefault("mean", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["beta"])
                p -= group["lr"] * (m.sign() if group["signed"] else m)
            group["clock"] += 1


@dataclass(frozen=True, kw_only=True)
class Signed(Method):
    """Train W in full: the matrices by signs at a rate of their own, the rest by momentum."""

    name = "signed"
    equation = "W -= lr sign(m)"

    matrix_lr: float = 0.25
    """Of the matrices, relative to the rest's."""

    def optimizer(
        self, model: nn.Module, sites: Sequence[Site], optim: OptimConfig, phase: int
    ) -> Optimizer:
        assert optim.lr is not None and optim.beta1 is not None
        matrices = [site.linear.weight for site in sites]
        mine = {id(p) for p in matrices}
        rest = [p for p in model.parameters() if id(p) not in mine]
        own = {"lr": optim.lr * self.matrix_lr, "name": "matrices", "signed": True}
        groups = [{"params": rest}, {"params": matrices, **own}]
        return SignedSteps(groups, optim.lr, optim.beta1)


class ScaledSteps(Optimizer):
    """B -= lr G_B (A Aᵀ + e)⁻¹ and A -= lr (Bᵀ B + e)⁻¹ G_A for the pairs B, A; the rest by SGD."""

    def __init__(self, groups: list[dict[str, Any]], lr: float) -> None:
        super().__init__(groups, {"lr": lr, "pairs": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = group["params"]
            if not group["pairs"]:
                for p in (p for p in params if p.grad is not None):
                    p -= group["lr"] * p.grad
                continue
            for B, A in zip(params[::2], params[1::2], strict=True):
                e = 1e-3 * torch.eye(B.shape[1], dtype=B.dtype, device=B.device)
                step_B = torch.linalg.solve(A @ A.mT + e, B.grad.mT).mT
                step_A = torch.linalg.solve(B.mT @ B + e, A.grad)
                B -= group["lr"] * step_B
                A -= group["lr"] * step_A


@dataclass(frozen=True, kw_only=True)
class ScaledGD(LowRank):
    """Train W = B A, each factor's gradient scaled by the other factor."""

    name = "scaledgd"
    equation = "W = B A, B -= lr G_B (A Aᵀ)⁻¹"

    def optimizer(
        self, model: nn.Module, sites: Sequence[Site], optim: OptimConfig, phase: int
    ) -> Optimizer:
        assert optim.lr is not None
        layers = [site.module for site in sites if isinstance(site.module, LowRankLinear)]
        pairs = [p for layer in layers for p in (layer.B, layer.A)]
        mine = {id(p) for p in pairs}
        rest = [p for p in model.parameters() if id(p) not in mine]
        groups = parameter_groups(model, optim, rest)
        return ScaledSteps([*groups, {"params": pairs, "pairs": True, "weight_decay": 0}], optim.lr)
