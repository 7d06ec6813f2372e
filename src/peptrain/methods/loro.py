"""LORO (Mo et al., ICLR 2025): W = B A, or B A around a frozen W, on the manifold of rank r."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import nn
from torch.optim import Optimizer

from peptrain.errors import ConfigError
from peptrain.methods.base import Method, Metrics
from peptrain.methods.lora import LoRALinear
from peptrain.methods.lowrank import LowRank, LowRankLinear
from peptrain.models.sites import ReparamLinear, Site, reparametrized
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
    """Train W = B A by Adam, with an exact Riemannian step every `exact_every` steps.

    With `around` frozen it is W + lambda B A around a frozen, trained W (section 5.3, Appendix
    A.2). All steps are in the product B A, not in lambda B A, as the paper applies them "to B and A
    exclusively": the loss depends on it through lambda B A, so its gradient is dL/d(BA) = lambda
    dL/dW_eff, and B and A receive that factor from autograd. A raw exact step therefore moves W_eff
    by lambda^2 lr P(dL/dW_eff). Along Adam's directions, which have no scale, it moves by lambda
    times what it would without it. B starts at 0 and A as in `lora`, so that the function is that
    of the given model. Until the first exact step all are approximate. If that is the very first
    step of all, B is singular with pseudo-inverse 0, and the step goes from B A = 0 to
    -lr D_B (A+)ᵀ, with the pseudo-inverse A+ of A.
    """

    name: ClassVar[str] = "loro"
    purpose: ClassVar[str] = "smaller model, faster to train and to run"
    equation: ClassVar[str] = "W = B A, stepped on the manifold of rank-r matrices"
    keeps_function_with: ClassVar[Mapping[str, Any] | None] = {"around": "frozen"}
    only_reports = True
    optim_defaults = replace(Method.optim_defaults, lr=1e-2, eps=1e-6, clip=0.0)

    around: Literal["none", "frozen"] = added("none", before="none")
    """frozen: train W + lambda B A around the frozen W of --init-from, to fine-tune it."""
    alpha: float = added(16.0, before=16.0)
    """lambda of around frozen. The paper takes 8 to 32."""
    alpha_over_rank: bool = added(False, before=False)
    """Whether lambda is alpha / rank, as the scale of lora is. The paper can be read both ways."""
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
    retraction: Literal["riemannian", "orthographic", "svd"] = "riemannian"
    """riemannian: an exact step ends in the truncated SVD. orthographic: in another retraction,
    equal to second order, by r x r inverses. svd replaces the exact step by an approximate one and
    a balanced SVD of B A (ablation)."""
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
        capped = self.exact_cap is None or self.retraction != "svd"
        check(capped, "method.exact_cap", self.exact_cap, "unset with retraction svd")
        check_positive("method.alpha", self.alpha)
        self._check_around()
        if self.scale not in ("hidden", "rows", "min"):
            self._number()

    def _check_around(self) -> None:
        """Raise ConfigError for a setting that the other kind of layer has."""
        frozen = self.around == "frozen"
        others = {"init": "xavier"} if frozen else {"alpha": 16.0, "alpha_over_rank": False}
        for key, default in others.items():
            if (value := getattr(self, key)) != default:
                raise ConfigError(
                    f"method.{key}: is of method.around {'none' if frozen else 'frozen'} only (got"
                    f" {value} with {self.around}); leave it out, or change method.around"
                )
        moves = not frozen or self.exact_cap is None or self.exact_every != 1
        wanted = "0, or > 1, with method.exact_cap and around frozen, or B A stays 0"
        check(moves, "method.exact_every", self.exact_every, wanted)

    @property
    def needs_weights(self) -> str:
        return "method.around: frozen" if self.around == "frozen" else ""

    def layer(self, site: Site, rng: Rng) -> ReparamLinear:
        if self.around == "none":
            return super().layer(site, rng)
        rank = self.rank_of(site.name)
        times_rank = 1 if self.alpha_over_rank else rank  # LoRALinear divides by it
        return LoRALinear(site, rank, self.alpha * times_rank, 0.0, rng)

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
        layers = [m for m in reparametrized(model) if isinstance(m, LowRankLinear | LoRALinear)]
        widths = {site.name: site.width for site in sites}
        factors = [p for layer in layers for p in (layer.B, layer.A)]
        scales = [c for m in layers for c in [self._scale(m, widths[m.site])] * 2]
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

    def _scale(self, layer: ReparamLinear, width: int) -> float:
        """Return c of the approximate step. The released code divides r by the hidden size."""
        n, m = layer.out_features, layer.in_features
        widths = {"hidden": width, "rows": n, "min": min(n, m)}
        rank = self.rank_of(layer.site)
        return rank / widths[self.scale] if self.scale in widths else self._number()

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
