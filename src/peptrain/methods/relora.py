"""ReLoRA (Lialin et al., ICLR 2024): LoRA from scratch that merges, begins again, and merges."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import nn
from torch.optim import Optimizer

from peptrain.methods.base import Method, Metrics
from peptrain.methods.lora import LoRA, LoRALinear
from peptrain.models.sites import Site, reparametrized
from peptrain.optim.adamw import ResetMode, reset_moments
from peptrain.optim.schedule import Schedule
from peptrain.rng import Rng
from peptrain.settings.fields import check, essential, interval, length, same_as

log = logging.getLogger("peptrain")


@dataclass(frozen=True, kw_only=True)
class ReLoRA(LoRA):
    """Train W in full for a while, then B and A around it, merged into W now and then."""

    name: ClassVar[str] = "relora"
    equation: ClassVar[str] = "W_eff = W + s B A, W += s B A now and then"
    merges = True
    # The paper has 1.5 to 2 times full training's; at llama-60m after a warm start 4e-3 is better
    # by 0.16 nats than 2e-3, and 8e-3 by 0.05 more (docs/first-table.md).
    optim_defaults = replace(Method.optim_defaults, lr=4e-3)

    warm_start_steps: int | None = essential(length(0.25))
    """Steps of full training before the adapters come; 0 is none. Unset: a quarter of the run."""
    merge_every: int | None = essential(interval(0.25, most=5000))
    """W += s B A at the multiples of this, after the warm start; 0 is never. Unset: a quarter of
    the run, at most 5000."""
    reset_every: int | None = same_as("merge_every")
    """Moments are reset, and the learning rate restarts, at the multiples of this; 0 is never.
    Unset: with every merge. Online ReLoRA merges often and resets seldom."""
    reset: ResetMode = "zero"
    """What is forgotten: zero all, the magnitude-smallest or a random reset_fraction, or none."""
    reset_fraction: float = 0.99
    """The part that magnitude (paper: 0.99) and random (released code: 0.999) resets remove."""
    reset_factors: Literal["both", "A"] = "both"
    """Whose moments are reset; A alone is the paper's Algorithm 1 to the letter."""
    pico_compat: bool = False
    """Reset as the released code and its forks: each moment by a mask of its own, the step count
    kept. The first update where an m outlives its v is tens to thousands of times the learning
    rate (docs/log.md); for comparisons only."""
    start: Literal["random", "zero"] = "random"
    """How A starts. zero, as in the released code and its forks, is a saddle with B = 0: the
    factors stay there until the first merge draws A; for comparisons only."""
    merge_scaled: bool = True
    """Whether a merge adds s B A. The small-model study's code adds B A, which changes the function
    unless s = 1; for comparisons only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("merge_every", "reset_every"):
            check((getattr(self, key) or 0) >= 0, f"method.{key}", getattr(self, key), ">= 0")
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
                "method.merge_every: %d has no multiple between the warm start's %d steps and the"
                " end of the run at %d, so nothing merges",
                *(every, self.warm, steps),
            )
        return super().phases(steps)

    def schedule(self, base: Schedule) -> Schedule:
        return self._restarted(base, self.reset_every or 0)

    def after_step(self, model: nn.Module, optimizer: Optimizer, step: int, rng: Rng) -> Metrics:
        merges = self._times(self.merge_every, step)
        resets = self._times(self.reset_every if self.reset != "keep" else 0, step)
        for layer in reparametrized(model) if merges or resets else ():
            assert isinstance(layer, LoRALinear)
            if merges:
                layer.merge(step, rng, scaled=self.merge_scaled)
            if resets:
                self._reset(layer, optimizer, step, rng)
        return {k: v for k, v in (("merges", merges), ("resets", resets)) if v}

    def _times(self, every: int | None, step: int) -> int:
        """How often what comes `every` so many steps has come, if it comes at `step`; else 0."""
        if not every or step % every or step <= self.warm:
            return 0
        return step // every - self.warm // every

    def _reset(self, layer: LoRALinear, optimizer: Optimizer, step: int, rng: Rng) -> None:
        names = ("A",) if self.reset_factors == "A" else ("A", "B", "s")
        for name in names:
            if (p := getattr(layer, name)) is not None:
                generator = rng(layer.site, step, f"reset {name}")
                reset_moments(optimizer, p, self.reset, self.reset_fraction, generator,
                              pico_compat=self.pico_compat)  # fmt: skip
