"""Bi-Phase Training (Gurung and Campbell): diagonals and merged factors around a frozen W."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peptrain.distributed.owners import owners
from peptrain.methods.base import Method, Metrics
from peptrain.methods.rank import RankMethod
from peptrain.models.sites import ReparamLinear, Site, reparametrized
from peptrain.ops.linear import bpt_linear, bpt_weight
from peptrain.ops.precision import at_least_fp32
from peptrain.ops.rounding import add_
from peptrain.ops.spectral import frame, gaussian
from peptrain.optim.adamw import ResetMode, reset_moments
from peptrain.optim.schedule import Schedule, ScheduleConfig, restarted
from peptrain.rng import Rng, drawn
from peptrain.settings.fields import (
    added,
    changeable,
    check,
    check_whole,
    essential,
    fill,
    interval,
)

log = logging.getLogger("peptrain")
Init = Literal["kaiming_uniform", "kaiming_normal", "model"]


class BPTLinear(ReparamLinear):
    """W_eff = diag(a) (W + U V) diag(b); W frozen, a: [out], b: [in], U: [out, r], V: [r, in].

    The diagonals are at least fp32 because they stay near 1, where neighbouring bf16 values differ
    by 0.4 to 0.8 %. A bias is not scaled by them.
    """

    def __init__(self, site: Site, rank: int, init: Init, rng: Rng) -> None:
        super().__init__(site)
        n, m = site.shape
        W = site.linear.weight
        if site.fresh:
            initialise(W, init, rng(site.name, purpose="W"))
        wide = at_least_fp32(W.dtype)
        self.weight = W.requires_grad_(False)
        self.U = nn.Parameter(fresh_U(site.name, 0, n, rank, rng, W))
        self.V = nn.Parameter(W.new_zeros(rank, m))
        self.a = nn.Parameter(W.new_ones(n, dtype=wide))
        self.b = nn.Parameter(W.new_ones(m, dtype=wide))
        self.linear: Callable[..., Tensor] = bpt_linear
        """The linear map, in its plain or fused form."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x, *self.parts)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.weight, self.U, self.V, self.a, self.b

    def effective_weight(self) -> Tensor:
        return bpt_weight(*self.parts)

    @torch.no_grad()
    def merge(self, step: int, rng: Rng) -> None:
        """W += U V inside the diagonals, V = 0: the function is kept (equation 3), and U may be
        re-drawn."""
        dtype = at_least_fp32(self.weight.dtype)
        add_(
            self.weight, self.U.to(dtype) @ self.V.to(dtype), rng.integer(self.site, step, "round")
        )
        self.V.zero_()

    def draw(self, step: int, rng: Rng) -> Tensor:
        """Draw, on the CPU, the Gaussian matrix that a merge at `step` orthonormalises to U."""
        n, r = self.U.shape
        return gaussian_U(self.site, step, n, r, rng)


def fresh_U(site: str, step: int, n: int, r: int, rng: Rng, like: Tensor) -> Tensor:
    """Draw U [n, r] with orthonormal columns, for the start (step 0) or a merge at `step`.

    The output factor is the random one, so V is the first to receive a gradient.
    """
    return frame(gaussian_U(site, step, n, r, rng), dtype=like.dtype, device=like.device)


def gaussian_U(site: str, step: int, n: int, r: int, rng: Rng) -> Tensor:
    """Draw the Gaussian matrix of `fresh_U`, on the CPU."""
    return gaussian(n, r, rng(site, step, "U"))


@torch.no_grad()
def initialise(W: Tensor, init: Init, generator: torch.Generator) -> None:
    """Initialise the frozen W in place.

    kaiming_uniform is nn.Linear's own, U(+-1/sqrt(in)). kaiming_normal has gain sqrt 2 and is 2.4
    times larger. model keeps the model's own initialisation.
    """
    if init == "model":
        return
    fresh = torch.empty(W.shape, device="cpu")
    if init == "kaiming_uniform":
        nn.init.kaiming_uniform_(fresh, a=5**0.5, generator=generator)
    else:
        nn.init.kaiming_normal_(fresh, generator=generator)
    W.copy_(fresh)


@dataclass(frozen=True, kw_only=True)
class BPT(RankMethod):
    """Train U, V and two diagonals around a frozen W, and merge U V periodically."""

    name: ClassVar[str] = "bpt"
    purpose: ClassVar[str] = "full-size model without a full-rank warm start"
    equation: ClassVar[str] = (
        "W_eff = diag(a) (W + U V) diag(b), U V merged into W every `merge_every` steps"
    )
    keeps_function_with: ClassVar[Mapping[str, Any] | None] = {"init": "model"}
    zero_factor = True
    merges = True
    # The paper's, ten times that of full training. 1e-3 is better at llama-60m, at 19.7M tokens
    # (docs/all-methods.md).
    optim_defaults = replace(Method.optim_defaults, lr=2e-3)
    schedule_defaults = fill(ScheduleConfig(kind="wsd", floor=0.0), Method.schedule_defaults)

    merge_every: int | None = essential(interval(0.25, most=2000))
    """Steps between merges; 0 is never. Unset: a quarter of the run, at most 2000. The paper gives
    no number, it only says that less often is better."""
    init: Init = "kaiming_uniform"
    """Initialisation of the frozen W, unless --init-from gives it. model: the model's own."""
    reset: ResetMode = "zero"
    """How a merge resets the Adam moments of U and V; keep leaves them."""
    reset_fraction: float = 0.99
    """Fraction of the moments that magnitude and random resets set to zero."""
    reset_step: Literal["restart", "keep"] = added("restart", before="restart")
    """Adam's step count at a reset: restart is right for moments that are zeroed, keep for those
    that are kept. ReLoRA's released code keeps it."""
    restart_warmup: int = changeable(0)
    """Steps of learning-rate warm-up from 0 after each merge; 0 is none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("merge_every", "restart_warmup"):
            check_whole(f"method.{key}", getattr(self, key), 0)
        check(
            0 <= self.reset_fraction <= 1, "method.reset_fraction", self.reset_fraction, "in [0, 1]"
        )

    def cost(self, n: int, m: int, rank: int) -> int:
        return rank * (n + m) + n + m

    def layer(self, site: Site, rng: Rng) -> BPTLinear:
        return BPTLinear(site, self.rank_of(site.name), self.init, rng)

    def fuse(self, model: nn.Module) -> None:
        from peptrain.kernels import linear as fused
        from peptrain.kernels.swiglu_mlp import BPTMLP, fuse_mlps  # Triton is not everywhere

        for layer in reparametrized(model):
            assert isinstance(layer, BPTLinear)
            layer.linear = fused.bpt_linear
        fuse_mlps(model, BPTLinear, BPTMLP)
        log.info("bpt: linear maps fused by Triton (train.kernels)")

    def schedule(self, base: Schedule) -> Schedule:
        return restarted(base, every=self.merge_every or 0, rewarm=self.restart_warmup)

    def after_step(self, model: nn.Module, optimizer: Optimizer, step: int, rng: Rng) -> Metrics:
        if not self.merge_every or step % self.merge_every:
            return {}
        layers = [layer for layer in reparametrized(model) if isinstance(layer, BPTLinear)]
        draws = owners([layer.U.numel() for layer in layers])
        own = [layers[i] for i in draws.own]
        fresh = drawn([partial(layer.draw, step, rng) for layer in own])
        for layer in layers:
            layer.merge(step, rng)
            for factor, name in ((layer.U, "U"), (layer.V, "V")):
                generator = rng(layer.site, step, f"reset {name}")
                reset_moments(optimizer, factor, self.reset, self.reset_fraction, generator,
                              step=self.reset_step)  # fmt: skip
        with torch.no_grad():
            for layer, X in zip(own, fresh, strict=True):
                layer.U.copy_(frame(X, dtype=layer.U.dtype, device=layer.U.device))
        draws.send_([[layer.U] for layer in layers])
        return {"merges": step // self.merge_every}
