"""Learning-rate schedules: functions from the step, counted from 0, to a multiplier."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from peptrain.errors import ConfigError
from peptrain.settings.fields import check, check_whole, length

log = logging.getLogger("peptrain")
Curve = Literal["constant", "linear", "cosine", "wsd"]


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Settings of the learning-rate schedule. An unset one takes the method's own default."""

    kind: Curve | None = None
    """constant | linear | cosine | wsd (warm-up, stable, decay)."""
    warmup: int | None = length(0.1)
    """Linear warm-up from 0, in steps. Unset: a tenth of the run."""
    decay: int | None = length(0.2)
    """Steps of the final decay of wsd. Unset: a fifth of the run."""
    decay_shape: Literal["cosine", "linear"] | None = None
    """Shape of the final decay of wsd. Unset: cosine."""
    floor: float | None = None
    """Learning-rate multiplier at the end of the run."""
    restart_every: int | None = None
    """Restart the learning rate from 0, with a warm-up, every N steps; 0, the default, is
    never."""
    restart_warmup: int | None = None
    """Steps of warm-up after each restart."""

    def __post_init__(self) -> None:
        for name in ("warmup", "decay", "restart_every", "restart_warmup"):
            check_whole(f"schedule.{name}", getattr(self, name), 0)
        check(self.floor is None or 0 <= self.floor <= 1, "schedule.floor", self.floor, "in [0, 1]")


@dataclass(frozen=True)
class Schedule:
    """The multiplier for each of `steps` steps, and the settings that a method may need."""

    steps: int
    warmup: int
    floor: float
    multiplier: Callable[[int], float]
    over: Callable[..., Schedule]
    """over(steps, warmup=None): the same schedule for another number of steps, optionally with
    another first warm-up."""
    restarts: bool = False
    """Whether the multiplier begins again at 0 in the course of the run."""

    def __call__(self, step: int) -> float:
        return self.multiplier(step)


def build(config: ScheduleConfig, steps: int, span: str = "of the run") -> Schedule:
    """Return the schedule of a resolved `config` for `steps` steps. `span` names them in errors."""
    assert config.warmup is not None and config.floor is not None and config.decay is not None
    if config.warmup >= steps and config.warmup > 0:
        raise ConfigError(
            f"schedule.warmup: must be less than the {steps} steps {span} (got {config.warmup});"
            " set a shorter warm-up or more train.steps"
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
    """Return a linear warm-up, t / warmup for t < warmup, followed by `base`."""
    return lambda t: t / warmup if t < warmup else base(t)


def restarted(base: Schedule, *, every: int, rewarm: int, start: int = 0) -> Schedule:
    """Return the jagged form of `base`: after a restart t0, (t - t0)/rewarm * base(t0 + rewarm).

    Restarts are the multiples of `every` after `start`, and `start` itself if it is not 0, where a
    warm start ends. With `every` 0 there are no others. Over a cosine, with every >= the warm-up,
    this is ReLoRA's jagged cosine (Lialin et al., section 3); with rewarm = 5, LORO's default.
    """
    if not every and not start:
        return base
    if base.restarts:
        log.warning(
            "schedule.restart_every: the method restarts the learning rate itself"
            " (method.restart_warmup), so that it may stay at 0 for many steps; leave it unset"
        )
    if 0 < every <= rewarm:
        log.warning(
            "restart_warmup: %d steps of warm-up, but the learning rate restarts every %d steps and"
            " never recovers; set fewer than %d",
            *(rewarm, every, every),
        )
    elif start and start + rewarm >= base.steps:
        log.warning(
            "method.restart_warmup: %d steps of warm-up, but the warm start leaves %d, so that the"
            " learning rate never recovers; set fewer",
            *(rewarm, base.steps - start),
        )

    def multiplier(t: int) -> float:
        t0 = max(start, t // every * every if every else 0)
        if not 0 < t0 <= t < t0 + rewarm:
            return base(t)
        return (t - t0) / rewarm * base(t0 + rewarm)

    return replace(base, multiplier=multiplier, restarts=True)
