"""LORO (Mo et al., ICLR 2025): W = B A only, optimized on the manifold of rank-r matrices."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import nn
from torch.optim import Optimizer

from peptrain.methods.base import Method, Metrics
from peptrain.methods.lowrank import LowRank, LowRankLinear
from peptrain.models.sites import Site, reparametrized
from peptrain.optim.adamw import OptimConfig, groups_around
from peptrain.optim.loro import LOROOptimizer, LORORule
from peptrain.optim.schedule import Schedule, cosine, restarted
from peptrain.rng import Rng
from peptrain.settings.fields import (
    LARGEST,
    added,
    check,
    check_positive,
    check_whole,
    essential,
    interval,
    length,
    same_as,
)

log = logging.getLogger("peptrain")


@dataclass(frozen=True, kw_only=True)
class LORO(LowRank):
    """Train W = B A by Adam, with an exact Riemannian step every `exact_every` steps."""

    name: ClassVar[str] = "loro"
    purpose: ClassVar[str] = "smaller model, faster to train and to run"
    equation: ClassVar[str] = "W = B A, stepped on the manifold of rank-r matrices"
    optim_defaults = replace(Method.optim_defaults, lr=1e-2, eps=1e-6, clip=0.0)

    exact_every: int | None = essential(interval(0.25, most=500))
    """K: every K-th step is exact; 0 is never. Unset: a quarter of the run, at most 500."""
    refresh_every: int | None = same_as("exact_every")
    """Steps between refreshes of the Adam state. Unset: at every exact step."""
    refresh: Literal["all", "factors", "none"] = "all"
    """Parameters whose Adam state a refresh zeroes: all, only the factors, or none."""
    restart_warmup: int | None = length(0.025, most=5, changeable=True)
    """Steps of learning-rate warm-up from 0 after each refresh. Unset: a fortieth of the run, at
    most 5, because the refreshes of a short run are close together."""
    scale: str = "hidden"
    """c of the approximate step: hidden (r / hidden size), rows (r/n), min (r/min(n, m)), or a
    number."""
    direction: Literal["adam", "raw"] = "adam"
    """Direction of the exact step: Adam's, or the raw gradient (the Riemannian step)."""
    exact_cap: float | None = added(None, before=None)
    """c: the rate of a pair's exact step is multiplied by min(1, c / ratio), where ratio is
    |lr P(G)| / |W|, the step before truncation. Unset: no limit, as in the paper."""
    retraction: Literal["riemannian", "svd"] = "riemannian"
    """svd replaces the exact step by an approximate one and a balanced SVD of B A (ablation)."""
    update: Literal["adam", "precond"] = "adam"
    """precond: steps along raw gradients preconditioned by the other factor (ablation)."""
    precond_eps: float = 1e-6
    """Damping of precond, relative to the trace; 0 is the paper's form, reported as unstable."""
    reference_schedule: bool = False
    """Use the released code's shifted cosine and restarts instead of schedule.kind."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("exact_every", "refresh_every", "restart_warmup"):
            check_whole(f"method.{key}", getattr(self, key), 0)
        check_positive("method.precond_eps", self.precond_eps, or_zero=True)
        check_positive("method.exact_cap", self.exact_cap)
        if self.scale not in ("hidden", "rows", "min"):
            self._number()

    def install(self, model: nn.Module, sites: Sequence[Site], rng: Rng, phase: int) -> None:
        super().install(model, sites, rng, phase)
        if (self.exact_every or 0) > 600:
            log.warning(
                "method.exact_every: the paper reports divergence above 650 to 750 steps (got %d)",
                self.exact_every,
            )

    def optimizer(
        self, model: nn.Module, sites: Sequence[Site], optim: OptimConfig, phase: int
    ) -> Optimizer:
        layers = [m for m in reparametrized(model) if isinstance(m, LowRankLinear)]
        factors = [p for layer in layers for p in (layer.B, layer.A)]
        scales = [c for layer in layers for c in [self._scale(layer)] * 2]
        groups = groups_around(model, optim, factors, factors=True, scales=scales)
        return LOROOptimizer(groups, self._rule(), **optim.adam())

    def schedule(self, base: Schedule) -> Schedule:
        every = self._rule().refresh_every if self.refresh != "none" else 0
        if self.reference_schedule:
            return reference_schedule(base, every)
        return restarted(base, every=every, rewarm=self.restart_warmup or 0)

    def after_step(self, model: nn.Module, optimizer: Optimizer, step: int, rng: Rng) -> Metrics:
        assert isinstance(optimizer, LOROOptimizer)
        if not self.exact_every or step % self.exact_every:
            return {}
        moved = {} if self.retraction == "svd" else {
            "exact_step_ratio": optimizer.largest_ratio,
            "pairs_with_exact_step_ratio_above_half_warning": optimizer.large_ratios,
        }  # fmt: skip
        return {
            "exact_steps": step // self.exact_every,
            "singular_factor_pairs_warning": optimizer.damped,
            **moved,
        }

    def _rule(self) -> LORORule:
        assert self.exact_every is not None and self.refresh_every is not None
        return LORORule(
            exact_every=self.exact_every,
            refresh_every=self.refresh_every,
            retraction=self.retraction,
            direction=self.direction,
            update=self.update,
            precond_eps=self.precond_eps,
            refresh=self.refresh,
            exact_cap=self.exact_cap,
        )

    def _scale(self, layer: LowRankLinear) -> float:
        """Return c of the approximate step. The released code divides r by the hidden size."""
        n, m = layer.out_features, layer.in_features
        widths = {"hidden": layer.width, "rows": n, "min": min(n, m)}
        return self.r / widths[self.scale] if self.scale in widths else self._number()

    def _number(self) -> float:
        try:
            number = float(self.scale)
        except ValueError:
            number = math.nan
        usable = 0 < number <= LARGEST
        check(usable, "method.scale", self.scale, "hidden, rows, min or a number > 0")
        return number


def reference_schedule(base: Schedule, every: int) -> Schedule:
    """Return the schedule of the released code: N steps, warm-up w, restarts every R, floor mn.

    Its cosine and its restarts are 0.1 N steps late. A restart begins at 1e-6 and rises within 5
    steps to the value of the warm-up or cosine at the restart itself.
    """
    N, w, mn, late = base.steps, base.warmup, base.floor, -round(0.1 * base.steps)
    e, rewarm = 1e-6, 5

    def M(c: int) -> float:
        return cosine((c - w) / (N - w), mn)

    peak = 0.5 * (1 + math.cos(math.pi * -late / (N - w)))

    def climb(c: int, target: float) -> float:
        return c % every / rewarm * (target - e) + e

    def restarting(c: int) -> bool:
        return every > 0 and c >= every and c % every < rewarm

    def multiplier(t: int) -> float:
        if t < w:
            start = t // every * every if restarting(t) else t
            base_value = start / w * (peak - mn) + mn
            return climb(t, base_value) if restarting(t) else base_value
        c = t + late
        return climb(c, M(c // every * every)) if restarting(c) else M(c)

    return replace(base, multiplier=multiplier)
