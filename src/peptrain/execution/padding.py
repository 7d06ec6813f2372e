"""MLPs of odd width, computed at an aligned one: the parameters keep their shapes.

LLaMA-1B's f is 5461, and a matrix product with an odd side falls to a GPU kernel that is several
times slower. So the linear layers of such an MLP take zeros beyond f as they compute: gate and up
answer with columns of 0, silu(0) * 0 = 0, and down has zeros for them. What a layer is to all else,
to optimizers, checkpoints, merges and counts, stays f wide, since only `forward` is another.
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
"""In elements. A row of fewer than 8 bf16 numbers more or less is not aligned to the 16 bytes that
a GPU's loads take; 64 is the side of its tiles."""


def pad_mlps(model: nn.Module, *, tried: bool = True) -> int:
    """Compute every gated MLP of an unaligned width at the next multiple of 64; their number.

    Found by structure in the decoder layers: two or more linear layers d -> f and one f -> d under
    one parent, f not a multiple of 8, d one. Each is tried, and one whose function or gradients
    would change (a norm over f, say) is left as it is.

    What a layer saves of its parameters for the backward pass are now padded copies: of LLaMA-1B's
    MLPs 1.6 GB in bf16. nn.Linear under autocast saves a bf16 copy anyway, and with activation
    checkpointing only one layer's copies exist at a time. A model of fake tensors can't be `tried`.
    """
    done: Counter[tuple[bool, int]] = Counter()
    for mlp in _candidates(model):
        done[_pad(mlp, tried), mlp.f] += 1
    for (padded, f), times in done.items():
        what = f"computed at {_aligned(f)}" if padded else "left as they are, padding changes them"
        log.info("%d MLPs of width %d: %s", times, f, what)
    return sum(times for (padded, _), times in done.items() if padded)


def widen_mlps(model: nn.Module) -> int:
    """`pad_mlps` for good, for a dense or low-rank model that only runs: its weights keep the
    zeros, so a pass over few tokens needn't copy them. Shapes and counts are of the aligned width.
    Other methods' MLPs are padded as by `pad_mlps`.
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
"""Layers that are nothing but their parameters and sides."""


def _candidates(model: nn.Module) -> list[GatedMLP]:
    """The gated MLPs of an unaligned width f, and an aligned d."""
    found = gated_mlps(decoder_layers(model)[1], nn.Linear, ReparamLinear)
    return [mlp for mlp in found if mlp.f % VECTOR and not mlp.d % VECTOR]


def _linears(parent: nn.Module) -> list[Linear]:
    return [m for m in parent.children() if isinstance(m, Linear)]


def _pad(mlp: GatedMLP, tried: bool) -> bool:
    """Pad what f is a side of in the MLP, unless that changes what it does."""
    module, f = mlp.module, mlp.f
    if not tried:
        clear = all(p.shape.count(f) < 2 for p in module.parameters())
        if clear:
            _install(module, f, _aligned(f))
        return clear
    x = noise(next(module.parameters()), 1, 8, mlp.d)
    with evaluating(module):  # dropout would draw other numbers for another width
        wanted = behaviour(module, x)
        _install(module, f, 2 * f)  # where a mean over the width would show in any dtype
        same = wanted is not None and _unchanged(wanted, behaviour(module, x))
    _install(module, f, _aligned(f)) if same else _uninstall(module)
    return same


def _unchanged(wanted: list[Tensor], found: list[Tensor] | None) -> bool:
    """Whether all is the same up to rounding, and there is something to compare."""
    if found is None or len(found) != len(wanted) or not wanted[0].any():
        return False
    # 9 % in bf16; a norm changes by 29 % or more.
    tolerance = torch.finfo(wanted[0].dtype).eps ** 0.5
    return all(alike(a, b, tolerance) for a, b in zip(wanted, found, strict=True))


class _Padded:
    """Mixed into the class of an MLP: its own forward, on parameters with zeros beyond f."""

    _f: int
    _working_f: int

    def forward(self: Any, x: Tensor) -> Tensor:
        f, working = self._f, self._working_f
        padded = {n: _wider(p, f, working) for n, p in self.named_parameters() if f in p.shape}
        if not padded:  # inside of the call below
            y: Tensor = super().forward(x)  # type: ignore[misc]
            return y
        made: Tensor = functional_call(self, padded, (x,))
        return made


def _wider(p: Tensor, f: int, working: int) -> Tensor:
    """p with zeros after every side that is f. Their gradients are cut off, NaN or not.

    Raises ValueError where two sides are f, one of which would be a rank.
    """
    if p.shape.count(f) > 1:
        raise ValueError(f"which side of {list(p.shape)} is the width?")
    pads = [(0, working - f if side == f else 0) for side in reversed(p.shape)]
    return F.pad(p, [n for pair in pads for n in pair])


def _install(mlp: nn.Module, f: int, working: int) -> None:
    """By class, not by an attribute `forward`: that would make a cycle, which keeps a model that
    is let go in memory, and a copy would compute with the weights of the original."""
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
