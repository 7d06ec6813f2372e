"""Find out what a model or a module computes by running it on a few fixed inputs.

Names differ among Hugging Face's models, so a property is tested on the model itself: run it,
change something, run it again, and compare.
"""

from __future__ import annotations

import logging
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
from peptrain.models.sites import LEFT_DENSE, Site, find_sites

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("peptrain")


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
    """Raise Unsupported if tokens see later tokens: the loss would be low and meaningless.

    Also for logits that are not finite.
    """
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]], device=model.device)
    with evaluating(model):
        logits = model(input_ids=ids, use_cache=False).logits[:, :3]
    if not logits.isfinite().all():
        raise Unsupported(
            f"model.config: the logits of {type(model).__name__} are not finite; check the values"
            " in config.json"
        )
    # A masked token contributes exactly 0.
    apart = (logits[0] - logits[1]).abs().max()
    if apart > rounding(logits) * logits.abs().max():
        raise Unsupported(
            f"model.config: {type(model).__name__} lets a token see those after it, so it can't be"
            " trained to predict them; set is_decoder in config.json, or choose a decoder"
        )


@torch.no_grad()
def is_linear_map(linear: nn.Linear) -> bool:
    """Return whether an nn.Linear computes x Wᵀ + bias from these two parameters alone.

    A subclass may compute anything, and weight normalisation computes W from others.
    """
    names = {name for name, _ in linear.named_parameters()}
    if names - {"bias"} != {"weight"}:
        return False
    if type(linear).forward is nn.Linear.forward:
        return True
    x = noise(linear.weight, 1, 3, linear.in_features)
    with evaluating(linear):
        found = behaviour(linear, x)
    wanted = F.linear(x, linear.weight, linear.bias)
    return found is not None and alike(wanted, found[0], rounding(wanted))


class _Watched(nn.Module):
    """An nn.Linear that notes whether it is called, and whether its weight is read by others."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.called, self.read = linear, False, False

    def forward(self, x: Tensor) -> Tensor:
        self.called = True
        y: Tensor = self.linear(x)
        return y

    def __getattr__(self, name: str) -> Any:
        if name == "linear":
            return super().__getattr__(name)
        if name == "weight":
            self.read = True
            return self.linear.weight.detach().clone()  # some models change it in place
        return getattr(self.linear, name)


@torch.no_grad()
def leave_dense(model: PreTrainedModel) -> None:
    """Mark every nn.Linear of the decoder layers that can't be replaced by another linear map.

    Those are the ones whose weight the model reads itself, in training or in evaluation, those
    that it never calls, such as cross-attention without an encoder, and those of a subclass that
    computes something else, such as a router. Experts are called by chance.
    """
    sites = find_sites(model)
    own = {site.name for site in sites if not is_linear_map(site.linear)}
    watched = {site.name: _Watched(site.linear) for site in sites}
    was_training = model.training
    try:
        for site in sites:
            _put(site, watched[site.name])
        for training in (False, True):
            with torch.random.fork_rng(devices=[]):  # for dropout
                model.train(training)(
                    input_ids=torch.zeros(1, 2, dtype=torch.long, device="cpu"), use_cache=False
                )
    finally:
        for site in sites:
            _put(site, watched[site.name].linear)
        model.train(was_training)
    reads, never, computes = "reads the weight of", "never calls", "computes the output of"
    why: dict[str, list[str]] = {reads: [], never: [], computes: []}
    for site in sites:
        seen, in_layer = watched[site.name], site.name.split(".layers.")[-1].split(".")[1:]
        unused = not seen.called and not any(part.isdigit() for part in in_layer)
        if seen.read or unused or site.name in own:
            setattr(seen.linear, LEFT_DENSE, True)
            what = computes if site.name in own else reads if seen.read else never
            why[what].append(in_layer[-1])
    for what, names in why.items():
        if names:
            log.info("%s %s %s itself, so no method adapts it", type(model).__name__, what,
                     ", ".join(sorted({*names})))  # fmt: skip


def _put(site: Site, module: nn.Module) -> None:
    setattr(site.parent, site.name.rpartition(".")[2], module)


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
