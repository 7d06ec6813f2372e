"""SwiGLU between three layers of a method as one fused map, for `Method.fuse`."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import signature
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peptrain.methods.base import ReparamLinear
from peptrain.methods.lowrank import LowRankLinear
from peptrain.ops.fused import bpt_mlp
from peptrain.ops.fused_lowrank import fits, lowrank_mlp


class FusedMLP(nn.Module):
    """A Hugging Face MLP whose forward pass is a subclass's; its children and their names stay."""

    roles: tuple[str, str, str]
    """The children's names: gate, up, down."""

    def forward(self, x: Tensor) -> Tensor:
        """The model's own, for what a subclass doesn't fuse."""
        y: Tensor = super().forward(x)
        return y

    def layers(self) -> list[Any]:
        """gate, up and down."""
        return [getattr(self, name) for name in self.roles]


class BPTMLP(FusedMLP):
    """Three BPTLinear around SwiGLU, forward and backward."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (layer.parts for layer in self.layers())
        return bpt_mlp(x, gate, up, down)


class LowRankMLP(FusedMLP):
    """Three LowRankLinear around SwiGLU; fused where no gradient is asked for."""

    def forward(self, x: Tensor) -> Tensor:
        layers = self.layers()
        if torch.is_grad_enabled() or not all(isinstance(m, LowRankLinear) for m in layers):
            return super().forward(x)
        gate, up, down = ((layer.B, layer.A) for layer in layers)
        return lowrank_mlp(x, gate, up, down) if fits(x, gate, up) else super().forward(x)


def fuse_mlps(model: nn.Module, layer: type[ReparamLinear], form: type[FusedMLP]) -> None:
    """Turn every down(silu(gate(x)) * up(x)) of three `layer`s into a `form`, in place.

    They are told by what they compute, not by names; other MLPs keep their forward pass.
    """
    fused: dict[type, type] = {}
    for module in list(model.modules()):
        for roles in _candidates(module, layer):
            if _is_swiglu(module, roles):
                cls = type(module)
                if cls not in fused:
                    fused[cls] = type(f"Fused{cls.__name__}", (form, cls), {})
                module.__class__ = fused[cls]
                assert isinstance(module, FusedMLP)
                module.roles = roles
                break


def _candidates(module: nn.Module, layer: type[ReparamLinear]) -> Iterator[tuple[str, str, str]]:
    """Names of three children that could be gate, up and down, of an MLP that isn't fused yet."""
    names = [n for n, child in module.named_children() if isinstance(child, layer)]
    wanted = [p for p in signature(module.forward).parameters.values() if p.default is p.empty]
    if isinstance(module, FusedMLP) or len(names) != 3 or len(wanted) != 1:
        return
    if any(getattr(module, n).bias is not None for n in names):
        return
    for gate, up, down in permutations(names):
        g, u, d = (getattr(module, n) for n in (gate, up, down))
        into = (g.in_features, g.out_features)
        if into == (u.in_features, u.out_features) == (d.out_features, d.in_features):
            yield gate, up, down


@torch.no_grad()
def _is_swiglu(module: nn.Module, roles: tuple[str, str, str]) -> bool:
    gate, up, down = (getattr(module, name) for name in roles)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, gate.in_features, generator=generator, device="cpu")
    x = x * x.new_tensor([1.0, 10.0, 1e2, 1e3])[:, None]  # a cap would show
    x = x.to(next(gate.parameters()))
    wanted = down(F.silu(gate(x)) * up(x))
    try:
        y = module(x)
    except Exception:  # whatever a module says to an input that it does not take
        return False
    return isinstance(y, Tensor) and bool(wanted.any()) and torch.equal(y, wanted)
