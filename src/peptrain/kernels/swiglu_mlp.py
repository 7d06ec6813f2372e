"""Fused MLPs of three layers of a method around SwiGLU, for `Method.fuse`."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from peptrain.kernels.linear import bpt_mlp
from peptrain.kernels.lowrank import fits, lowrank_mlp
from peptrain.models.probe import gated_mlps, swiglu_roles


class LowRankMap(Protocol):
    """Interface of a layer y = x (B A)ᵀ + bias, with B: [out, r] and A: [r, in]."""

    B: Tensor
    A: Tensor
    bias: Tensor | None


class FusedMLP(nn.Module):
    """Base class of fused forward passes for Hugging Face MLPs, which keep children and names."""

    kind: ClassVar[type[nn.Module]]
    """Class of the three layers."""
    roles: tuple[str, str, str]
    """Names of the children gate, up and down."""

    def forward(self, x: Tensor) -> Tensor:
        """Run the model's own forward pass, for cases that a subclass doesn't fuse."""
        y: Tensor = super().forward(x)
        return y

    def layers(self) -> list[Any]:
        """Return gate, up and down."""
        return [getattr(self, name) for name in self.roles]

    def whole(self) -> bool:
        """Return whether no layer has been replaced, for example by a plain nn.Linear."""
        return all(isinstance(layer, self.kind) for layer in self.layers())


class BPTMLP(FusedMLP):
    """Three BPT maps around SwiGLU, fused in the forward and backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (layer.parts for layer in self.layers())
        return bpt_mlp(x, gate, up, down)


class LowRankMLP(FusedMLP):
    """Three LowRankMaps around SwiGLU, fused if gradients are disabled."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not self.whole():
            return super().forward(x)
        gate, up, down = ((layer.B, layer.A) for layer in self.layers())
        return lowrank_mlp(x, gate, up, down) if fits(x, gate, up) else super().forward(x)


def fuse_mlps(model: nn.Module, layer: type[nn.Module], form: type[FusedMLP]) -> None:
    """Turn every down(silu(gate(x)) * up(x)) of three layers of class `layer` into a `form`.

    The model is changed in place. The MLPs are recognised by what they compute, not by names, and
    others keep their forward pass.
    """
    fused: dict[type, type] = {}
    for mlp in list(gated_mlps(model, layer)):
        module = mlp.module
        maps = [m for m in module.children() if isinstance(m, layer)]
        plain = len(maps) == 3 and all(m.bias is None for m in maps)
        if not plain or isinstance(module, FusedMLP) or (roles := swiglu_roles(mlp)) is None:
            continue
        cls = type(module)
        if cls not in fused:
            fused[cls] = type(f"Fused{cls.__name__}", (form, cls), {"kind": layer})
        module.__class__ = fused[cls]
        assert isinstance(module, FusedMLP)
        module.roles = roles
