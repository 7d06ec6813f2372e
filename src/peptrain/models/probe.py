"""Find out what a model or a module computes by running it on a few fixed inputs.

Names differ among Hugging Face's models, so a property is tested on the model itself: run it,
change something, run it again, and compare.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from itertools import permutations
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peptrain.errors import Unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Run a module in evaluation mode and eagerly, then restore its mode.

    Compiled layers would be compiled again for other shapes and another mode.
    """
    was_training = module.training
    module.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        module.train(was_training)


def noise(like: Tensor, *shape: int) -> Tensor:
    """Return fixed normal values with the dtype and device of `like`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, device="cpu").to(like)


def behaviour(module: nn.Module, x: Tensor) -> list[Tensor] | None:
    """Return y = module(x) and, if enabled, the gradients of x and of the trained parameters.

    Returns None for a module that doesn't map one tensor to one tensor, or doesn't accept this x.
    """
    trained = [x.requires_grad_(), *(p for p in module.parameters() if p.requires_grad)]
    try:
        y = module(x)
        if not isinstance(y, Tensor):
            return None
        if not torch.is_grad_enabled():
            return [y]
        grads = torch.autograd.grad(y, trained, torch.ones_like(y), allow_unused=True)
    except Exception:  # modules raise anything for an input or a width that they reject
        return None
    return [y.detach(), *(g for g in grads if g is not None)]


def alike(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Return whether no entry differs by more than `tolerance` times the largest entry of `a`."""
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * a.abs().max())


def rounding(like: Tensor) -> float:
    """Return the largest effect of a kernel's summation order, relative to the largest result."""
    return 8 * torch.finfo(like.dtype).eps


@torch.no_grad()
def check_causal(model: PreTrainedModel) -> None:
    """Raise Unsupported if tokens see later tokens: the loss would be low and meaningless."""
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], device=model.device)
    with evaluating(model):
        logits = model(input_ids=ids, use_cache=False).logits[:, :3]
    # A masked token contributes exactly 0.
    apart = (logits[0] - logits[1]).abs().max()
    if apart > rounding(logits) * logits.abs().max():
        raise Unsupported(
            f"model.config: {type(model).__name__} lets a token see those after it, so it can't be"
            " trained to predict them; set is_decoder in config.json, or choose a decoder"
        )


@dataclass(frozen=True)
class GatedMLP:
    """A module with two or more linear maps d -> f and one f -> d, and possibly other children."""

    module: nn.Module
    into: tuple[str, ...]
    """Names of the children d -> f."""
    down: str
    d: int
    f: int


def gated_mlps(model: nn.Module, *layers: type[nn.Module]) -> Iterator[GatedMLP]:
    """Yield every gated MLP whose maps are `layers`, found by structure.

    If d = f, each of its maps may be `down`, and is yielded once as that.
    """
    for module in model.modules():
        maps: dict[str, Any] = {n: m for n, m in module.named_children() if isinstance(m, layers)}
        sides = {name: (m.in_features, m.out_features) for name, m in maps.items()}
        for down, (f, d) in sides.items():
            into = tuple(name for name, side in sides.items() if side == (d, f) and name != down)
            alone = d == f or list(sides.values()).count((f, d)) == 1
            if len(into) >= 2 and alone:
                yield GatedMLP(module, into, down, d, f)


@torch.no_grad()
def swiglu_roles(mlp: GatedMLP) -> tuple[str, str, str] | None:
    """Return (gate, up, down) if the MLP computes down(silu(gate(x)) * up(x)), else None."""
    wanted = signature(mlp.module.forward).parameters.values()
    if len(mlp.into) != 2 or sum(p.default is p.empty for p in wanted) != 1:
        return None
    x = noise(next(mlp.module.parameters()), 1, 4, mlp.d)
    x = x * x.new_tensor([1.0, 10.0, 1e2, 1e3])[:, None]  # to detect a cap
    for gate, up in permutations(mlp.into):
        g, u, down = (mlp.module.get_submodule(name) for name in (gate, up, mlp.down))
        y, own = down(F.silu(g(x)) * u(x)), behaviour(mlp.module, x)
        if own is not None and bool(y.any()) and torch.equal(own[0], y):
            return gate, up, mlp.down
    return None
