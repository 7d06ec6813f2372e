"""Compute MLPs of odd width at an aligned width, while the parameters keep their shapes.

LLaMA-1B's f is 5461, and matrix products with an odd side use a GPU kernel that is several times
slower. Therefore the linear layers of such an MLP are padded with zeros beyond f inside `forward`.
gate and up return columns of 0, silu(0) * 0 = 0, and down has zeros for them. Since only `forward`
changes, optimizers, checkpoints, merges and counts still see layers of width f.
"""

from __future__ import annotations

import logging
from collections import Counter
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from peptrain.methods.lowrank import LowRankLinear
from peptrain.models.probe import GatedMLP, alike, behaviour, evaluating, gated_mlps, noise
from peptrain.models.sites import ReparamLinear, decoder_layers

log = logging.getLogger("peptrain")

VECTOR, TILE = 8, 64
"""In elements. A row whose length isn't a multiple of 8 bf16 values is not aligned to the 16 bytes
of a GPU's loads; 64 is the side of its tiles."""


def pad_mlps(model: nn.Module, *, tried: bool = True) -> int:
    """Compute every gated MLP of an unaligned width at the next multiple of 64.

    Return the number of MLPs padded. They are found by structure in the decoder layers: two or more
    linear layers d -> f and one f -> d under one parent, where f is not a multiple of 8 and d is.
    Each is tried, and an MLP whose function or gradients would change (because of a norm over f,
    for example) is not padded.

    The weights that a layer saves for the backward pass are now padded copies, 1.6 GB in bf16 for
    LLaMA-1B's MLPs. nn.Linear under autocast saves a bf16 copy anyway, and with activation
    checkpointing only one layer's copies exist at a time. A model of fake tensors cannot be
    `tried`.
    """
    done: Counter[tuple[bool, int]] = Counter()
    for mlp in _candidates(model):
        done[_pad(mlp, tried), mlp.f] += 1
    for (padded, f), times in done.items():
        what = f"computed at {_aligned(f)}" if padded else "not padded, it would change results"
        log.info("%d MLPs of width %d: %s", times, f, what)
    return sum(times for (padded, _), times in done.items() if padded)


def widen_mlps(model: nn.Module) -> int:
    """Pad MLPs permanently in a dense or low-rank model used for inference only.

    Return the number of MLPs padded. Unlike with `pad_mlps`, the weights themselves contain the
    zeros, so that a pass over few tokens need not copy them, and shapes and parameter counts are
    those of the aligned width. MLPs of other methods are padded as by `pad_mlps`.
    """
    padded = pad_mlps(model)
    for parent in [m for m in model.modules() if isinstance(m, _Padded)]:
        if all(isinstance(layer, WIDENABLE) for layer in _linears(parent)):
            _widen(parent, parent._f, parent._working_f)
    return padded


def _widen(parent: nn.Module, f: int, working: int) -> None:
    _uninstall(parent)
    for layer in _linears(parent):
        sides = (layer.in_features, layer.out_features)
        layer.in_features, layer.out_features = (working if s == f else s for s in sides)
    for module in parent.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if f in p.shape:
                wide = _wider(p.detach(), f, working)
                setattr(module, name, nn.Parameter(wide, p.requires_grad))


Linear = nn.Linear | ReparamLinear
WIDENABLE = (nn.Linear, LowRankLinear)
"""Layers fully described by their parameters, in_features and out_features."""


def _candidates(model: nn.Module) -> list[GatedMLP]:
    """Return the gated MLPs with an unaligned width f and an aligned d."""
    found = gated_mlps(decoder_layers(model)[1], nn.Linear, ReparamLinear)
    return [mlp for mlp in found if mlp.f % VECTOR and not mlp.d % VECTOR]


def _linears(parent: nn.Module) -> list[Linear]:
    return [m for m in parent.children() if isinstance(m, Linear)]


def _pad(mlp: GatedMLP, tried: bool) -> bool:
    """Pad the MLP's parameters with a side f, unless that changes its results."""
    module, f = mlp.module, mlp.f
    if not tried:
        clear = all(p.shape.count(f) < 2 for p in module.parameters())
        if clear:
            _install(module, f, _aligned(f))
        return clear
    x = noise(next(module.parameters()), 1, 8, mlp.d)
    with evaluating(module):  # dropout would draw other values for another width
        wanted = behaviour(module, x)
        _install(module, f, 2 * f)  # so wide that a mean over the width shows in any dtype
        same = wanted is not None and _unchanged(wanted, behaviour(module, x))
    _install(module, f, _aligned(f)) if same else _uninstall(module)
    return same


def _unchanged(wanted: list[Tensor], found: list[Tensor] | None) -> bool:
    """Return whether all tensors agree up to rounding and the first is not all zeros."""
    if found is None or len(found) != len(wanted) or not wanted[0].any():
        return False
    # 9 % in bf16; a norm over f changes the results by 29 % or more.
    tolerance = torch.finfo(wanted[0].dtype).eps ** 0.5
    return all(alike(a, b, tolerance) for a, b in zip(wanted, found, strict=True))


class _Padded:
    """Mixin for the class of an MLP: runs its own forward on parameters with zeros beyond f."""

    _f: int
    _working_f: int

    def forward(self: Any, x: Tensor) -> Tensor:
        f, working = self._f, self._working_f
        padded = {n: _wider(p, f, working) for n, p in self.named_parameters() if f in p.shape}
        if not padded:  # inside the functional_call below
            y: Tensor = super().forward(x)  # type: ignore[misc]
            return y
        made: Tensor = functional_call(self, padded, (x,))
        return made


def _wider(p: Tensor, f: int, working: int) -> Tensor:
    """Return p with its side f padded with zeros, whose gradients are discarded even if NaN.

    Raises ValueError if two sides are f, one of which would be a rank.
    """
    if p.shape.count(f) > 1:
        raise ValueError(f"a shape with one side {f} is needed to pad it (got {list(p.shape)})")
    pads = [(0, working - f if side == f else 0) for side in reversed(p.shape)]
    return F.pad(p, [n for pair in pads for n in pair])


def _install(mlp: nn.Module, f: int, working: int) -> None:
    """Pad by changing the class instead of setting an attribute `forward`. The attribute would
    create a reference cycle, which keeps a deleted model in memory, and a copy of the model would
    compute with the weights of the original."""
    if not isinstance(mlp, _Padded):
        mlp.__class__ = _padded_class(type(mlp))  # type: ignore[arg-type]
    mlp._f, mlp._working_f = f, working  # type: ignore[assignment]


def _uninstall(mlp: nn.Module) -> None:
    mlp.__class__ = type(mlp).__bases__[1]
    del mlp._f, mlp._working_f


@cache
def _padded_class(of: type[nn.Module]) -> type[nn.Module]:
    return type(of.__name__, (_Padded, of), {"__module__": of.__module__})


def _aligned(f: int) -> int:
    return -(-f // TILE) * TILE
