"""Full training: AdamW, SGD or Muon on every parameter, the baseline of all the papers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from torch.optim import Optimizer

from peptrain.methods.base import Method
from peptrain.models.sites import Site
from peptrain.optim.adamw import Kind, OptimConfig, sgd


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Train every parameter with AdamW, or with SGD or Muon."""

    name: ClassVar[str] = "full"
    purpose: ClassVar[str] = "reference: all weights trained by AdamW"
    equation: ClassVar[str] = "W, all trainable"
    optim_kinds: ClassVar[tuple[Kind, ...]] = ("adamw", "sgd", "muon")

    def optimizer(
        self, model: nn.Module, sites: Sequence[Site], optim: OptimConfig, phase: int
    ) -> Optimizer:
        if optim.kind == "sgd":
            return sgd(model, optim)
        return super().optimizer(model, sites, optim, phase)
