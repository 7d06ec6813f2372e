"""What the runs of a grid may spend, and the steps in which each of them spends it."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from peptrain.comparison.grid import Grid, GridRun, check_comparable
from peptrain.comparison.workers import Job, work
from peptrain.config import dump
from peptrain.errors import CheckpointError, ConfigError, Interrupted, PeptrainError
from peptrain.estimation.estimate import estimate
from peptrain.files import write_atomically
from peptrain.runs.build import bounds
from peptrain.settings.fields import quiet

log = logging.getLogger("peptrain")
Costs = Callable[[GridRun], Sequence[float]]
"""What a step of a run costs in each of its phases."""
ROUNDING = 1e-9  # relative; equal costs are sums in another order


@dataclass
class Price:
    """What runs of one configuration cost, for any number of steps.

    A step's cost depends on its phase alone, so it is asked for once; once more where other steps
    make another number of phases: a warm start of a quarter of one step is none.
    """

    costs: Costs
    known: dict[int, Sequence[float]] = field(default_factory=dict)
    """By the number of phases."""

    def of_step(self, run: GridRun) -> Sequence[float]:
        """In each phase."""
        phases = len(bounds(run.config)) - 1
        if phases not in self.known:
            self.known[phases] = self.costs(run)
        return self.known[phases]

    def __call__(self, run: GridRun) -> float:
        lengths = (end - begin for begin, end in pairwise(bounds(run.config)))
        return sum(n * cost for n, cost in zip(lengths, self.of_step(run), strict=True))


def allot(grid: Grid, costs: Costs) -> list[GridRun]:
    """The runs of a grid with the steps that spend what the baseline spends, or not quite: with one
    more step a run would spend more.

    Raises ConfigError when the budget is too small for a run, and for runs that don't compare.
    """
    base, price = grid.baseline, Price(costs)
    budget, made = price(base), list[GridRun]()
    known = {base.family: (base.steps, price)}
    for run in grid.runs:
        if run.family not in known:
            price = Price(costs)
            known[run.family] = _most_steps(_of_tokens(base.tokens, run), price, budget), price
        steps, price = known[run.family]
        run = run.lasting(steps)
        made.append(replace(run, cost=price(run)))
    check_comparable(made, grid.equal)
    return made


def _of_tokens(tokens: int, run: GridRun) -> GridRun:
    """`run` for as many tokens: near the answer, and a warm start fits as it does there."""
    return run.lasting(max(1, tokens * run.steps // run.tokens))


def _most_steps(run: GridRun, price: Price, budget: float) -> int:
    """The most within the budget, from the steps that `run` has.

    A stride is as long as if all its steps cost as much as the dearest, so none leads past the
    answer, and what is tried lies between the two, where a run is as possible as at both. (One up
    may, into a phase that is new and dearer; it is taken back.)
    """
    most = budget * (1 + ROUNDING)
    try:
        price.of_step(run)  # this takes a while, and says so
        with quiet():
            while (rest := most - price(run.lasting(run.steps + 1))) >= 0:
                run = run.lasting(run.steps + 1 + int(rest / max(price.of_step(run))))
            while (excess := price(run) - most) > 0:
                stride = int(excess / max(price.of_step(run)))
                run = run.lasting(run.steps - max(1, stride))
    except ConfigError as error:
        raise ConfigError(f"{run.label}: at the baseline's budget, {error}") from error
    return run.steps


def kept(directory: Path, equal: str, measure: Callable[[GridRun, Path], None]) -> Costs:
    """Costs that lie in a file of `directory` each, those that don't yet made by `measure`."""

    def costs(run: GridRun) -> Sequence[float]:
        file = directory / f"{equal}-{run.costs_name}.json"
        if not file.is_file():
            directory.mkdir(exist_ok=True)
            measure(run, file)
        try:
            (found,) = json.loads(file.read_text(encoding="utf-8")).values()
        except ValueError as error:
            raise CheckpointError(
                f"{file}: damaged ({error}); delete it, and it is made again"
            ) from error
        return list(found)

    return costs


def count_flops(run: GridRun, file: Path) -> None:
    """Of a step, as `peptrain estimate` counts them: forward and backward passes, and the products
    of merges, resets and the optimizer, spread over the steps of their phase."""
    log.info("counting the FLOPs of %s", run.label)
    with quiet():
        phases = estimate(run.config).phases
    tokens = run.tokens // run.steps
    beside = (sum(e.times * e.flops for e in p.events) / (p.last - p.first) for p in phases)
    each = [tokens * p.flops_per_token + more for p, more in zip(phases, beside, strict=True)]
    write_atomically(file, json.dumps({"flops": each}))


@dataclass(frozen=True)
class Timing(Job):
    """The timing of a configuration's steps, in a process like that of a run; `run` is its file."""

    def command(self) -> list[str]:
        timing = [sys.executable, "-m", "peptrain.comparison.timing"]
        return [*timing, str(self.settings), str(self.run)]

    def result(self) -> str | None:
        return "timed" if self.run.is_file() else None


def clock(out: Path, gpus: Sequence[str], lock: int) -> Callable[[GridRun, Path], None]:
    """Measures the seconds of a step, alone on the machine but for what others do on it."""

    def measure(run: GridRun, file: Path) -> None:
        settings, log_file = (
            out / "settings" / f"{file.stem}.toml",
            out / "logs" / f"{file.stem}.log",
        )
        log.info("timing the steps of %s", run.label)
        write_atomically(settings, dump(run.config))
        status = work([Timing(file.stem, file, settings, log_file, run.steps)], 1, gpus, lock)
        if status.interrupted:
            raise Interrupted("stopped while steps were timed; the same command goes on")
        if error := status.failed.get(file.stem):
            raise PeptrainError(
                f"{run.label}: its steps can't be timed: {error}; see {log_file}, and mend the"
                " block or take it out"
            )

    return measure
