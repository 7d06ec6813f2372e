"""Values of a grid's table: means over seeds with intervals, at the best learning rate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peptrain.comparison.grid import Equal, GridRun
from peptrain.ops.student import half_width
from peptrain.runs.directory import LAST, RunDir
from peptrain.tuning.tasks import tuning_task


@dataclass(frozen=True)
class Outcome:
    """The result of one run."""

    planned: GridRun
    run: RunDir
    end: Mapping[str, Any] | None
    """The last metrics row of a finished run."""
    error: str = ""
    diverged: bool = False
    """Whether the error is divergence, which a retry would repeat."""

    @property
    def loss(self) -> float:
        """The held-out loss: infinite if training diverged, nan if not known."""
        if self.end is not None:
            return float(self.end["held_out_loss"])
        return math.inf if self.diverged else math.nan

    @property
    def score(self) -> float:
        """What the best learning rate has least of: the held-out loss, or the negative result of a
        fine-tuning after its last epoch. Infinite and nan as for `loss`."""
        task = self.planned.config.tune.task
        if not task or self.end is None:
            return self.loss
        found = self.end.get(tuning_task(task).best_by)
        return math.inf if found is None else -float(found)

    @property
    def state(self) -> str:
        """One of finished, diverged, failed, unfinished."""
        if self.end:
            return "finished"
        return "diverged" if self.diverged else "failed" if self.error else "unfinished"


def outcome(planned: GridRun, run: RunDir, error: str = "") -> Outcome:
    """Read the outcome of a run, which may not exist yet. `error`: that of its process, if any."""
    last = {row["event"]: row for row in run.metrics() if row["event"] in LAST}
    if "end" not in last and "diverged" in last:
        return Outcome(planned, run, None, last["diverged"]["error"], diverged=True)
    return Outcome(planned, run, last.get("end"), error)


@dataclass(frozen=True)
class Line:
    """A line of the table: a configuration with its values at the best learning rate.

    Values are None while that rate is not known.
    """

    label: str
    method: str
    runs: int
    finished: int
    steps: int
    tokens: int
    """Training tokens of each run."""
    rates: tuple[float, ...]
    """Learning rates in the grid, ascending."""
    cost: float | None = None
    """FLOPs or seconds of each run; None at equal tokens."""
    tried: tuple[float, ...] = ()
    """Learning rates whose runs all finished or diverged."""
    lr: float | None = None
    """The rate with the lowest mean held-out loss, among those whose seeds all finished."""
    place: str = ""
    """"lowest" or "highest" if the best rate is at the edge of those tried, "only" if it is the
    only one tried, else empty."""
    seeds: int = 0
    loss: float | None = None
    """Mean held-out loss over the seeds, in nats per token."""
    half_width: float | None = None
    """Half width of the mean's 95 % interval (Student's t); None for one seed."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """Held-out loss by seed."""
    trainable: int | None = None
    state_bytes: int | None = None
    """Bytes of the optimizer's moments, in the phase that has the most of them."""
    tokens_per_second: float | None = None
    tasks: Mapping[str, float] = field(default_factory=dict)
    """Mean results of `eval.tasks` or of a fine-tuning over the seeds, such as blimp_acc."""
    widths: Mapping[str, float] = field(default_factory=dict)
    """Half widths of the 95 % intervals of `tasks`, from two seeds on."""
    errors: tuple[str, ...] = ()
    """Errors of failed runs, which the next call retries."""
    diverged: tuple[str, ...] = ()
    """Errors of diverged runs, which are not retried."""

    @property
    def perplexity(self) -> float | None:
        """exp of the mean loss; None if the loss is unknown or too large."""
        return None if self.loss is None or self.loss >= 700 else math.exp(self.loss)

    def difference(self, other: Line) -> tuple[float, float | None] | None:
        """Return the mean of this line's loss minus the other's over the seeds that both have, and
        the half width of its 95 % interval (Student's t), None for one seed. None without any."""
        shared = [loss - other.losses[s] for s, loss in self.losses.items() if s in other.losses]
        return (statistics.fmean(shared), half_width(shared)) if shared else None


def summarize(outcomes: Sequence[Outcome], equal: Equal = "tokens") -> list[Line]:
    """Return a line per configuration, in the grid's order.

    At equal time a line's speed is that of its timing, which no other run slowed down.
    """
    groups: dict[str, list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault(one.planned.configuration, []).append(one)
    lines = [_line(group) for group in groups.values()]
    if equal != "time":
        return lines
    return [replace(line, tokens_per_second=line.cost and line.tokens / line.cost)
            for line in lines]  # fmt: skip


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
    means = {rate: statistics.fmean(o.score for o in of_rate[rate]) for rate in rates}
    tried = [rate for rate in rates if not math.isnan(means[rate])]
    whole = [rate for rate in tried if means[rate] < math.inf]
    line["tried"] = tuple(tried)
    if not whole:
        return Line(**line)
    best = min(whole, key=means.__getitem__)
    seeds = [o.end for o in of_rate[best] if o.end]
    losses = {str(o.planned.config.train.seed): o.loss for o in of_rate[best]}
    found = _tasks(seeds)
    speeds = [end["tokens_per_second"] for end in seeds if end["tokens_per_second"] > 0]
    return Line(
        **line,
        lr=best,
        place=_place(best, tried),
        seeds=len(seeds),
        loss=statistics.fmean(losses.values()),
        half_width=half_width(list(losses.values())),
        losses=losses,
        trainable=seeds[0]["trainable"],
        state_bytes=seeds[0]["state_bytes"],
        tokens_per_second=statistics.fmean(speeds) if speeds else None,  # rows may be lost
        tasks={name: statistics.fmean(values) for name, values in found.items()},
        widths={k: w for k, v in found.items() if (w := half_width(v)) is not None},
    )


RESULTS = ("_acc", "_acc_norm", "_byte_perplexity", "_f1", "_matthews", "_pearson", "_spearman")
"""How the results of tasks that are columns end."""


def _tasks(ends: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Return the values of each result that all the last rows have."""
    names = [key for key in ends[0] if key.endswith(RESULTS)]
    known = [key for key in names if all(isinstance(end.get(key), float) for end in ends)]
    return {key: [end[key] for end in ends] for key in known}


def _place(best: float, tried: Sequence[float]) -> str:
    if len(tried) == 1:
        return "only"
    return {tried[0]: "lowest", tried[-1]: "highest"}.get(best, "")
