"""Spectron (Janson et al., 2026) and its relatives: W = B A by spectral steps on the factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn
from torch.optim import Optimizer

from peptrain.methods.base import Method
from peptrain.methods.lowrank import Init, LowRank, LowRankLinear
from peptrain.models.sites import Site, reparametrized
from peptrain.optim.adamw import Kind, OptimConfig
from peptrain.optim.spectron import Rule, spectron
from peptrain.settings.fields import check, essential


@dataclass(frozen=True, kw_only=True)
class Spectron(LowRank):
    """Train W = B A by steps on B and A that change W by a bounded spectral norm."""

    name: ClassVar[str] = "spectron"
    purpose: ClassVar[str] = "smaller model, stepped as Muon steps a dense one"
    equation: ClassVar[str] = "W = B A, stepped along polar factors of the gradients"
    # The factors have no other optimizer, and dense matrices in the layers are Muon's already.
    optim_kinds: ClassVar[tuple[Kind, ...]] = ("adamw",)
    # The best of 2e-2, 4e-2 and 8e-2 at llama-130m (docs/methods/spectron.md).
    optim_defaults = replace(Method.optim_defaults, lr=4e-2, embedding_lr=5e-3, clip=0.0)

    rule: Rule = "spectron"
    """What the factors follow. spectron: polar factors of N_B = G Aᵀ and N_A = Bᵀ G, over
    |A| + |B| + 1. lora-muon and tangent: steps in W, whatever B and A are. factors: Muon on each
    factor."""
    momentum: float = 0.95
    """μ: decay of the averaged gradient that the factors, and dense matrices, follow (Nesterov)."""
    init: Init = essential("orthogonal")
    """Initialisation of both factors, unless --init-from gives W. orthogonal: orthonormal columns
    of B and rows of A, scaled so that W has entries of std 0.02. normal: N(0, init_std²)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 <= self.momentum < 1, "method.momentum", self.momentum, "in [0, 1)")

    def optimizer(
        self, model: nn.Module, sites: Sequence[Site], optim: OptimConfig, phase: int
    ) -> Optimizer:
        layers = [m for m in reparametrized(model) if isinstance(m, LowRankLinear)]
        factors = [p for layer in layers for p in (layer.B, layer.A)]
        return spectron(model, sites, factors, optim, rule=self.rule, momentum=self.momentum)
