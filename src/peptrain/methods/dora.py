"""DoRA (Liu et al., 2024) from scratch: LoRA with normalised rows and trained row lengths."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from peptrain.methods.bpt import BPT
from peptrain.methods.lora import LoRA, LoRALinear
from peptrain.models.sites import Site
from peptrain.ops.linear import dora_linear, over_norms, row_norms
from peptrain.rng import Rng


class DoRALinear(LoRALinear):
    """W_eff = diag(m / N) (W + s B A), N the row norms of W + s B A; m: [out], the rest as LoRA.

    m starts at the row norms of W, so that W_eff = W. The gradient treats N as a constant (section
    4.3). m is at least fp32, because its updates are small compared with its values. A row of W
    that is 0 stays 0.
    """

    def __init__(self, site: Site, rank: int, alpha: float, dropout: float, rng: Rng) -> None:
        super().__init__(site, rank, alpha, dropout, rng)
        self.m = nn.Parameter(row_norms(self.weight))

    def product(self, x: Tensor, sB: Tensor) -> Tensor:
        if not (self.dropout and self.training):
            return dora_linear(x, self.weight, sB, self.A, self.m)
        z = super().product(x, sB)
        return (self.scale() * z).to(z.dtype)

    def scale(self) -> Tensor:
        """Return m / N, [out]. N is a constant: no gradient is kept for it."""
        with torch.no_grad():
            N = row_norms(super().effective_weight())
        return over_norms(self.m, N)

    def effective_weight(self) -> Tensor:
        return self.scale()[:, None] * super().effective_weight()


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """Train m, B and A of diag(m / N) (W + s B A), N its row norms, around a frozen W."""

    name: ClassVar[str] = "dora"
    kind: ClassVar[type[LoRALinear]] = DoRALinear
    purpose: ClassVar[str] = "baseline: lora with direction and length apart"
    equation: ClassVar[str] = "W_eff = diag(m / N) (W + s B A), N the row norms of W + s B A"
    # BPT reports DoRA in Table 2 but no learning rate for it in Table 5: this is its LoRA rate.
    optim_defaults = replace(LoRA.optim_defaults, lr=1e-3)
    schedule_defaults = BPT.schedule_defaults

    def cost(self, n: int, m: int, rank: int) -> int:
        return super().cost(n, m, rank) + n

    def fuse(self, model: nn.Module) -> None:
        """Do nothing: DoRA has no fused form, and LoRA's does not compute row norms."""
