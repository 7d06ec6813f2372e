"""Learning-rate schedules: step -> multiplier of the base learning rate, steps counted from 0."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from peptrain.errors import ConfigError
from peptrain.settings.fields import check, length

log = logging.getLogger("peptrain")
Curve = Literal["constant", "linear", "cosine", "wsd"]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The learning rate over time. What is left unset takes the method's own default."""

    kind: Curve | None = None
    """constant | linear | cosine | wsd (warm-up, stable, decay). Unset: the method's own."""
    warmup: int | None = length(0.1)
    """Linear warm-up from 0, in steps. Unset: a tenth of the run."""
    decay: int | None = length(0.2)
    """Length of the final decay of wsd, in steps. Unset: a fifth of the run."""
    decay_shape: Literal["cosine", "linear"] | None = None
    """Shape of the decay of wsd. Unset: cosine."""
    floor: float | None = None
    """The multiplier at the end of the run. Unset: the method's own, mostly 0.1."""
    restart_every: int | None = None
    """Return to 0 and warm up again every so many steps; 0, the default, is never."""
    restart_warmup: int | None = None
    """Length of that warm-up, in steps. Unset: 50."""

    def __post_init__(self) -> None:
        for name in ("warmup", "decay", "restart_every", "restart_warmup"):
            value = getattr(self, name)
            check(value is None or value >= 0, f"schedule.{name}", value, ">= 0")
        check(self.floor is None or 0 <= self.floor <= 1, "schedule.floor", self.floor, "in [0, 1]")


@dataclass(frozen=True)
class Schedule:
    """A multiplier for each step of a run of `steps`, and the numbers that a method may need."""

    steps: int
    warmup: int
    floor: float
    multiplier: Callable[[int], float]
    over: Callable[..., Schedule]
    """The same schedule for a run of so many steps, with another first `warmup` if one is given."""

    def __call__(self, step: int) -> float:
        return self.multiplier(step)


def build(config: ScheduleConfig, steps: int, span: str = "of the run") -> Schedule:
    """The schedule that a resolved `config` describes for the `steps` of a `span`."""
    assert config.warmup is not None and config.floor is not None and config.decay is not None
    if config.warmup >= steps and config.warmup > 0:
        raise ConfigError(
            f"schedule.warmup: {config.warmup} steps of warm-up leave nothing of the {steps} steps"
            f" {span}; set a shorter warm-up or more train.steps"
        )
    multiplier = warmed_up(_after_warmup(config, steps), config.warmup)

    def over(steps: int, warmup: int | None = None) -> Schedule:
        other = config if warmup is None else replace(config, warmup=warmup)
        return build(other, steps, span="that a warm start leaves")

    schedule = Schedule(steps, config.warmup, config.floor, multiplier, over)
    if config.restart_every:
        assert config.restart_warmup is not None
        return restarted(schedule, every=config.restart_every, rewarm=config.restart_warmup)
    return schedule


def _after_warmup(config: ScheduleConfig, steps: int) -> Callable[[int], float]:
    assert config.warmup is not None and config.floor is not None and config.decay is not None
    if config.kind == "constant":
        return lambda t: 1.0
    start, shape = config.warmup, config.kind
    if config.kind == "wsd":
        start, shape = max(start, steps - config.decay), config.decay_shape
    curve, floor, span = CURVES[shape or "cosine"], config.floor, max(1, steps - start)
    return lambda t: curve(min(1.0, max(0.0, (t - start) / span)), floor)


def cosine(progress: float, floor: float) -> float:
    """M(p) = floor + (1 - floor) (1 + cos(pi p)) / 2 for progress p in [0, 1]."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float, floor: float) -> float:
    """M(p) = 1 - (1 - floor) p."""
    return 1 - (1 - floor) * progress


CURVES = {"cosine": cosine, "linear": linear}


def warmed_up(base: Callable[[int], float], warmup: int) -> Callable[[int], float]:
    """t / warmup before `warmup`, `base` from there on."""
    return lambda t: t / warmup if t < warmup else base(t)


def restarted(base: Schedule, *, every: int, rewarm: int, start: int = 0) -> Schedule:
    """The jagged form of `base`: after each restart t0, (t - t0)/rewarm * base(t0 + rewarm).

    Restarts are the multiples of `every` after `start`, and `start` itself if it is not 0: there
    a warm start ends. An `every` of 0 is never. Over a cosine, with every >= the warm-up, this is
    ReLoRA's jagged cosine (Lialin et al., section 3); with rewarm = 5, LORO's default.
    """
    if 0 < every <= rewarm:
        log.warning(
            "restart_warmup: %d steps, and the learning rate restarts every %d, so it never comes"
            " back to its height; set fewer",
            *(rewarm, every),
        )

    def multiplier(t: int) -> float:
        t0 = max(start, t // every * every if every else 0)
        if not 0 < t0 <= t < t0 + rewarm:
            return base(t)
        return (t - t0) / rewarm * base(t0 + rewarm)

    return replace(base, multiplier=multiplier)
