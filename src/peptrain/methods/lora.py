"""LoRA from scratch: a frozen matrix plus a low-rank one, optionally after a full warm start."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from peptrain.methods.base import Method
from peptrain.methods.rank import RankMethod
from peptrain.models.sites import ReparamLinear, Site, reparametrized
from peptrain.ops.linear import added_linear
from peptrain.ops.precision import at_least_fp32
from peptrain.ops.rounding import add_
from peptrain.optim.adamw import Kind, OptimConfig
from peptrain.optim.schedule import Schedule, restarted
from peptrain.rng import Rng
from peptrain.settings.fields import (
    changeable,
    check,
    check_positive,
    check_whole,
    essential,
    length,
)

log = logging.getLogger("peptrain")
WARM_START_LR = 1e-3


class LoRALinear(ReparamLinear):
    """W_eff = W + s B A; W frozen, A: [r, in], B: [out, r], s = alpha / r.

    A is random and B = 0, so B is the first to receive a gradient. (ReLoRA's released code starts
    both at 0, where both gradients are 0 and stay 0.) Dropout applies to the input of A.
    """

    def __init__(self, site: Site, rank: int, alpha: float, dropout: float, rng: Rng) -> None:
        super().__init__(site)
        n, m = site.shape
        W = site.linear.weight
        self.alpha, self.dropout = alpha, dropout
        self.weight = W.requires_grad_(False)
        self.A = nn.Parameter(fresh_A(site.name, 0, rank, m, rng, W))
        self.B = nn.Parameter(W.new_zeros(n, rank))
        self.register_parameter("s", None)
        self.linear: Callable[..., Tensor] = added_linear
        """The linear map, in its plain or fused form."""

    def train_scale(self) -> None:
        """Make s a parameter, [1], at least fp32, initialised to alpha / r."""
        wide = at_least_fp32(self.B.dtype)
        self.s = nn.Parameter(self.B.new_full((1,), self.alpha / self.B.shape[1], dtype=wide))

    def sB(self) -> Tensor:
        s = self.alpha / self.B.shape[1] if self.s is None else self.s
        return s * self.B

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x, self.sB().to(self.B.dtype))
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def product(self, x: Tensor, sB: Tensor) -> Tensor:
        """Return x (W + s B A)ᵀ, given sB = s B."""
        if not (self.dropout and self.training):
            return self.linear(x, self.weight, sB, self.A)
        low = F.linear(F.dropout(x, self.dropout), self.A)
        return F.linear(x, self.weight) + F.linear(low, sB)

    def effective_weight(self) -> Tensor:
        dtype = at_least_fp32(self.weight.dtype)
        return self.weight.to(dtype) + self.sB().to(dtype) @ self.A.to(dtype)

    @torch.no_grad()
    def merge(self, step: int, rng: Rng, *, scaled: bool = True) -> None:
        """W += s B A, B = 0: the function is unchanged (ReLoRA, equation 1), and A may be re-drawn.

        A trained s is reset to alpha / r, because an s near 0 would keep the new factors from
        training. If `scaled` is False, the merge is W += B A and changes the function unless s = 1.
        """
        dtype = at_least_fp32(self.weight.dtype)
        delta = (self.sB() if scaled else self.B).to(dtype) @ self.A.to(dtype)
        add_(self.weight, delta, rng.integer(self.site, step, "round"))
        self.B.zero_()
        if self.s is not None:
            self.s.fill_(self.alpha / self.A.shape[0])

    def draw(self, step: int, rng: Rng) -> Tensor:
        """Draw the A that follows a merge at `step`, on the CPU in float32."""
        r, m = self.A.shape
        return uniform_A(self.site, step, r, m, rng)


def fresh_A(site: str, step: int, r: int, m: int, rng: Rng, like: Tensor) -> Tensor:
    """Draw A [r, m] for the start (step 0) or a merge: U(+-1/sqrt(m)), as nn.Linear does."""
    return uniform_A(site, step, r, m, rng).to(like)


def uniform_A(site: str, step: int, r: int, m: int, rng: Rng) -> Tensor:
    """Draw the A of `fresh_A`, on the CPU in float32."""
    A = torch.empty(r, m, device="cpu")
    return nn.init.kaiming_uniform_(A, a=5**0.5, generator=rng(site, step, "A"))


@dataclass(frozen=True, kw_only=True)
class LoRA(RankMethod):
    """Train B and A of W + s B A around a frozen W, after a full warm start or none."""

    name: ClassVar[str] = "lora"
    kind: ClassVar[type[LoRALinear]] = LoRALinear
    purpose: ClassVar[str] = "baseline: relora without merges"
    equation: ClassVar[str] = "W_eff = W + s B A, W frozen (after a full warm start, if any)"
    zero_factor = True
    optim_kinds: ClassVar[tuple[Kind, ...]] = ("adamw", "muon")
    # At llama-60m 1e-3 and 2e-3 are equally good without a warm start, and higher rates are better
    # after one. In the default model 2e-3 beats 1e-3 and 4e-3 (docs/first-table.md, docs/log.md).
    optim_defaults = replace(Method.optim_defaults, lr=2e-3)

    alpha: float = 32.0
    """s = alpha / rank."""
    dropout: float = 0.0
    """Dropout on the input of A. Above 0 training is slower: W and B A are applied separately."""
    train_scale: bool = False
    """Whether s of each adapted matrix is trained, starting at alpha / rank."""
    warm_start_steps: int | None = essential(0)
    """Steps of full training before the adapters are added; 0 is none."""
    warm_start_lr: float = changeable(WARM_START_LR)
    """Peak learning rate of the warm start, in place of optim.lr; the default is full training's.
    optim.embedding_lr and head_lr hold in the warm start too, and with optim.kind muon so does
    optim.lr, which is that of the dense matrices."""
    warm_start_warmup: int | None = changeable(None)
    """Steps of learning-rate warm-up at the beginning of the warm start. Unset: schedule.warmup."""
    warm_start_then: Literal["continue", "fresh"] = "continue"
    """After the warm start: continue keeps the schedule and the moments of parameters that stay
    trainable; fresh restarts both, with another warm-up, as ReLoRA's released code does."""
    restart_warmup: int | None = length(0.01, most=50, changeable=True)
    """Steps of learning-rate warm-up from 0 when the adapters are added and after each reset; 0 is
    none. Unset: a hundredth of the run, at most 50."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("method.alpha", self.alpha)
        check(0 <= self.dropout < 1, "method.dropout", self.dropout, "in [0, 1)")
        check_positive("method.warm_start_lr", self.warm_start_lr, or_zero=True)
        for key in ("warm_start_steps", "warm_start_warmup", "restart_warmup"):
            check_whole(f"method.{key}", getattr(self, key), 0)

    @property
    def warm(self) -> int:
        """The step at which the adapters are added."""
        return self.warm_start_steps or 0

    def cost(self, n: int, m: int, rank: int) -> int:
        return rank * (n + m) + self.train_scale

    def layer(self, site: Site, rng: Rng) -> LoRALinear:
        made = self.kind(site, self.rank_of(site.name), self.alpha, self.dropout, rng)
        if self.train_scale:
            made.train_scale()
        return made

    def phases(self, steps: int) -> tuple[int, ...]:
        fits = self.warm < steps
        wanted = f"less than train.steps = {steps}"
        check(fits, "method.warm_start_steps", self.warm, wanted)
        first = self.warm_start_warmup or 0
        wanted = f"at most method.warm_start_steps = {self.warm}"
        check(not self.warm or first <= self.warm, "method.warm_start_warmup", first, wanted)
        return (self.warm,) if self.warm else ()

    def install(self, model: nn.Module, sites: Sequence[Site], rng: Rng, phase: int) -> None:
        if not self._warming(phase):
            super().install(model, sites, rng, phase)
            return
        chosen = self.chosen(sites)  # checked now: a useless rank would only fail at the switch
        self.freeze(model, chosen)
        for site in chosen if self.freezes else ():
            site.linear.weight.requires_grad_(True)

    def optimizer(
        self, model: nn.Module, sites: Sequence[Site], optim: OptimConfig, phase: int
    ) -> Optimizer:
        if optim.kind == "muon":
            unset = not self.warm or self.warm_start_lr == WARM_START_LR
            wanted = "left out with optim.kind muon, whose matrices have optim.lr in every phase"
            check(unset, "method.warm_start_lr", self.warm_start_lr, wanted)
        elif self._warming(phase):
            optim = replace(optim, lr=self.warm_start_lr)
        return super().optimizer(model, sites, optim, phase)

    def on_phase_start(self, model: nn.Module, optimizer: Optimizer, phase: int) -> None:
        if self.warm_start_then == "fresh":
            optimizer.state.clear()

    def fuse(self, model: nn.Module) -> None:
        from peptrain.kernels import linear as fused  # Triton is not everywhere

        layers = list(reparametrized(model))  # empty during a warm start
        for layer in layers:
            assert isinstance(layer, LoRALinear)
            layer.linear = fused.added_linear
        if layers:
            log.info("%s: linear maps fused by Triton (train.kernels)", self.name)

    def schedule(self, base: Schedule) -> Schedule:
        return self._restarted(base, 0)

    def _restarted(self, base: Schedule, every: int) -> Schedule:
        """Return `base` with restarts at the switch and at the multiples of `every` after it."""
        if self.warm:
            base = replace(base, multiplier=self._switched(base))
        return restarted(base, every=every, rewarm=self.restart_warmup or 0, start=self.warm)

    def _switched(self, base: Schedule) -> Callable[[int], float]:
        """Return `base` with the warm start's own warm-up. After the switch `base` continues, or
        restarts over the remaining steps if `warm_start_then` is fresh."""
        start, warmup = self.warm, self.warm_start_warmup
        first = base if warmup is None else base.over(base.steps, warmup)
        if self.warm_start_then == "continue":
            return lambda t: first(t) if t < start else base(t)
        rest = base.over(base.steps - start)
        return lambda t: first(t) if t < start else rest(t - start)

    def _warming(self, phase: int) -> bool:
        return phase == 0 and self.warm > 0
