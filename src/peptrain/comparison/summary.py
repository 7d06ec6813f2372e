"""The numbers of a grid's table: seeds become a mean with an interval, learning rates the best."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peptrain.comparison.grid import GridRun
from peptrain.runs.directory import LAST, RunDir

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Outcome:
    """What became of one run."""

    planned: GridRun
    run: RunDir
    end: Mapping[str, Any] | None
    """The last row of a finished run."""
    error: str = ""
    diverged: bool = False
    """Whether the error is that training diverged, which it would again."""

    @property
    def loss(self) -> float:
        """The held-out loss; infinite where training diverged, nan where it isn't known."""
        if self.end is not None:
            return float(self.end["held_out_loss"])
        return math.inf if self.diverged else math.nan

    @property
    def state(self) -> str:
        """finished, diverged, failed, or unfinished."""
        if self.end:
            return "finished"
        return "diverged" if self.diverged else "failed" if self.error else "unfinished"


def outcome(planned: GridRun, run: RunDir, error: str = "") -> Outcome:
    """Read a run, whether or not it is there. `error`: what its process ended with, if it did."""
    last = {row["event"]: row for row in run.metrics() if row["event"] in LAST}
    if "end" not in last and "diverged" in last:
        return Outcome(planned, run, None, last["diverged"]["error"], diverged=True)
    return Outcome(planned, run, last.get("end"), error)


@dataclass(frozen=True)
class Line:
    """A configuration: its numbers at its best learning rate, None while that isn't known."""

    label: str
    method: str
    runs: int
    finished: int
    steps: int
    tokens: int
    """What each of them trains on."""
    rates: tuple[float, ...]
    """The learning rates of the grid, ascending."""
    cost: float | None = None
    """Of each of them, by the budget: FLOPs, or seconds; None at equal tokens."""
    tried: tuple[float, ...] = ()
    """Those whose runs all ended, in a result or by diverging."""
    lr: float | None = None
    """The one of the lowest mean held-out loss, of those whose seeds all finished."""
    place: str = ""
    """lowest or highest if the best rate is at the edge of those tried, only if it has no
    other beside it."""
    seeds: int = 0
    loss: float | None = None
    """Mean over the seeds, nats per token."""
    half_width: float | None = None
    """Of the 95 % interval of that mean (Student's t); None for one seed."""
    trainable: int | None = None
    state_bytes: int | None = None
    """Of the optimizer's moments, in the phase that has the most of them."""
    tokens_per_second: float | None = None
    errors: tuple[str, ...] = ()
    """Of the runs that failed, which the next call tries again."""
    diverged: tuple[str, ...] = ()
    """Of those that diverged, which it doesn't."""

    @property
    def perplexity(self) -> float | None:
        """exp of the mean loss, if that is a number."""
        return None if self.loss is None or self.loss >= 700 else math.exp(self.loss)


def summarize(outcomes: Sequence[Outcome]) -> list[Line]:
    """A line per configuration, in the grid's order."""
    groups: dict[str, list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault(one.planned.configuration, []).append(one)
    return [_line(group) for group in groups.values()]


def _line(group: Sequence[Outcome]) -> Line:
    first = group[0].planned
    rates = sorted({o.planned.lr for o in group})
    line: dict[str, Any] = {
        "label": first.label,
        "method": first.method,
        "runs": len(group),
        "finished": sum(o.end is not None for o in group),
        "steps": first.steps,
        "tokens": first.tokens,
        "rates": tuple(rates),
        "cost": first.cost,
        "errors": tuple(f"{o.run.path.name}: {o.error}" for o in group if o.state == "failed"),
        "diverged": tuple(f"{o.run.path.name}: {o.error}" for o in group if o.state == "diverged"),
    }
    of_rate = {rate: [o for o in group if o.planned.lr == rate] for rate in rates}
    means = {rate: statistics.fmean(o.loss for o in of_rate[rate]) for rate in rates}
    tried = [rate for rate in rates if not math.isnan(means[rate])]
    whole = [rate for rate in tried if means[rate] < math.inf]
    line["tried"] = tuple(tried)
    if not whole:
        return Line(**line)
    best = min(whole, key=means.__getitem__)
    seeds = [o.end for o in of_rate[best] if o.end]
    return Line(
        **line,
        lr=best,
        place=_place(best, tried),
        seeds=len(seeds),
        loss=means[best],
        half_width=half_width([end["held_out_loss"] for end in seeds]),
        trainable=seeds[0]["trainable"],
        state_bytes=seeds[0]["state_bytes"],
        tokens_per_second=statistics.fmean(end["tokens_per_second"] for end in seeds),
    )


def _place(best: float, tried: Sequence[float]) -> str:
    if len(tried) == 1:
        return "only"
    return {tried[0]: "lowest", tried[-1]: "highest"}.get(best, "")


def half_width(values: Sequence[float]) -> float | None:
    """t s / sqrt n, half of the mean's 95 % interval; None for one value."""
    n = len(values)
    if n < 2:
        return None
    return student_t(CONFIDENCE, n - 1) * statistics.stdev(values) / math.sqrt(n)


def student_t(confidence: float, df: int) -> float:
    """The t with P(-t < T < t) = confidence, for Student's T of `df` degrees of freedom.

    By bisection of theta = arctan(t / sqrt df), in which the probability is a finite sum
    (Abramowitz and Stegun 26.7.3 and 26.7.4).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(80):
        theta = (low + high) / 2
        low, high = (theta, high) if _within(theta, df) < confidence else (low, theta)
    return math.sqrt(df) * math.tan(low)


def _within(theta: float, df: int) -> float:
    """P(|T| < sqrt(df) tan theta)."""
    odd = df % 2
    term, total = (math.cos(theta) if odd else 1.0), 0.0
    for k in range(1 + odd, df, 2):
        total += term
        term *= k / (k + 1) * math.cos(theta) ** 2
    if odd:
        return 2 / math.pi * (theta + math.sin(theta) * total)
    return math.sin(theta) * total
