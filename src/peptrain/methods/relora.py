"""ReLoRA (Lialin et al., ICLR 2024): LoRA from scratch, periodically merged and restarted."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from peptrain.distributed.owners import owners
from peptrain.methods.base import Method, Metrics
from peptrain.methods.lora import LoRA, LoRALinear
from peptrain.models.sites import Site, reparametrized
from peptrain.optim.adamw import ResetMode, reset_moments
from peptrain.optim.schedule import Schedule
from peptrain.rng import Rng, drawn
from peptrain.settings.fields import added, check, check_whole, essential, interval, length, same_as

log = logging.getLogger("peptrain")


@dataclass(frozen=True, kw_only=True)
class ReLoRA(LoRA):
    """Train W in full, then B and A around a frozen W, and merge them periodically."""

    name: ClassVar[str] = "relora"
    purpose: ClassVar[str] = "full-size model after a full-rank warm start"
    equation: ClassVar[str] = "W_eff = W + s B A, s B A merged into W every `merge_every` steps"
    merges = True
    # The paper recommends 1.5 to 2 times full training's. At llama-60m after a warm start 4e-3 is
    # 0.16 nats better than 2e-3, and 8e-3 another 0.05 (docs/first-table.md).
    optim_defaults = replace(Method.optim_defaults, lr=4e-3)

    warm_start_steps: int | None = essential(length(0.25))
    """Steps of full training before the adapters are added; 0 is none. Unset: a quarter of the
    run."""
    merge_every: int | None = essential(interval(0.25, most=5000))
    """Merge (W += s B A) at the multiples of this after the warm start; 0 is never. Unset: a
    quarter of the run, at most 5000."""
    reset_every: int | None = same_as("merge_every")
    """Reset the moments and restart the learning rate at the multiples of this; 0 is never. Unset:
    at every merge. Online ReLoRA merges often and resets rarely."""
    reset: ResetMode = "zero"
    """Moments that a reset zeroes: all, the reset_fraction of smallest magnitude, a random
    reset_fraction, or (keep) none."""
    reset_fraction: float = 0.99
    """Fraction that magnitude (paper: 0.99) and random (released code: 0.999) resets zero."""
    reset_step: Literal["restart", "keep"] = added("restart", before="restart")
    """Adam's step count at a reset: restart is right for moments that are zeroed, keep for those
    that are kept. ReLoRA's released code keeps it."""
    reset_factors: Literal["both", "A"] = "both"
    """Factors whose moments are reset. Only A: the paper's Algorithm 1 as printed."""
    pico_compat: bool = False
    """Reset as the released code and its forks do: a separate mask for each moment, and the step
    count kept. Where m is kept and v is zeroed, the first update is tens to thousands of times the
    learning rate (docs/log.md). For comparisons only."""
    start: Literal["random", "zero"] = "random"
    """Initial A. With zero, as in the released code and its forks, A = B = 0 gets no gradient and
    the factors do not train until the first merge draws A. For comparisons only."""
    merge_scaled: bool = True
    """Whether a merge adds s B A. If False it adds B A, as the small-model study's code does, which
    changes the function unless s = 1. For comparisons only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("merge_every", "reset_every"):
            check_whole(f"method.{key}", getattr(self, key), 0)
        check(
            0 <= self.reset_fraction <= 1, "method.reset_fraction", self.reset_fraction, "in [0, 1]"
        )

    def layer(self, site: Site, rng: Rng) -> LoRALinear:
        made = super().layer(site, rng)
        if self.start == "zero":
            nn.init.zeros_(made.A)
        return made

    def phases(self, steps: int) -> tuple[int, ...]:
        every = self.merge_every or 0
        if every and (steps - 1) // every * every <= self.warm:
            log.warning(
                "method.merge_every: no multiple of %d lies between the warm start's %d steps and"
                " the end of the run at %d, so nothing merges",
                *(every, self.warm, steps),
            )
        return super().phases(steps)

    def schedule(self, base: Schedule) -> Schedule:
        return self._restarted(base, self.reset_every or 0)

    def after_step(self, model: nn.Module, optimizer: Optimizer, step: int, rng: Rng) -> Metrics:
        merges = self._times(self.merge_every, step)
        resets = self._times(self.reset_every if self.reset != "keep" else 0, step)
        if not (merges or resets):
            return {}
        layers = [layer for layer in reparametrized(model) if isinstance(layer, LoRALinear)]
        draws = owners([layer.A.numel() for layer in layers])
        own = [layers[i] for i in draws.own] if merges else []
        fresh = drawn([partial(layer.draw, step, rng) for layer in own])
        for layer in layers:
            if merges:
                layer.merge(step, rng, scaled=self.merge_scaled)
            if resets:
                self._reset(layer, optimizer, step, rng)
        with torch.no_grad():
            for layer, A in zip(own, fresh, strict=True):
                # Rounded on its device, since the CPU's threads are busy with drawing.
                layer.A.copy_(A.to(layer.A.device))
        if merges:
            draws.send_([[layer.A] for layer in layers])
        return {k: v for k, v in (("merges", merges), ("resets", resets)) if v}

    def _times(self, every: int | None, step: int) -> int:
        """Return how often an event has occurred if `step` is one of its steps, else 0.

        It occurs at the multiples of `every` after the warm start.
        """
        if not every or step % every or step <= self.warm:
            return 0
        return step // every - self.warm // every

    def _reset(self, layer: LoRALinear, optimizer: Optimizer, step: int, rng: Rng) -> None:
        names = ("A",) if self.reset_factors == "A" else ("A", "B", "s")
        for name in names:
            if (p := getattr(layer, name)) is not None:
                generator = rng(layer.site, step, f"reset {name}")
                reset_moments(optimizer, p, self.reset, self.reset_fraction, generator,
                              step=self.reset_step, pico_compat=self.pico_compat)  # fmt: skip
