"""The common budget of a grid, in FLOPs or seconds, and the number of steps it buys each run."""

from __future__ import annotations

import hashlib
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
from peptrain.files import read_json_object, write_atomically
from peptrain.runs.build import bounds
from peptrain.settings.fields import quiet
from peptrain.training.signals import stop_on_signals

log = logging.getLogger("peptrain")
Costs = Callable[[GridRun], Sequence[float]]
"""Returns the cost of a step of a run in each of its phases."""
KINDS = {"flops": "flops", "time": "seconds"}
"""What is measured, by what is equal."""
CHECKSUM = "sha256"
LARGEST = 1e30
ROUNDING = 1e-9  # relative; equal costs may be summed in different orders


@dataclass
class Price:
    """Cost of the runs of one configuration, for any number of steps.

    The cost of a step depends only on its phase, so `costs` is called once per number of phases.
    That number changes with the steps: a warm start of a quarter of a one-step run has no steps.
    """

    costs: Costs
    known: dict[int, Sequence[float]] = field(default_factory=dict)
    """Costs of a step, by number of phases."""

    def of_step(self, run: GridRun) -> Sequence[float]:
        """Cost of a step in each phase."""
        phases = len(bounds(run.config)) - 1
        if phases not in self.known:
            self.known[phases] = self.costs(run)
        return self.known[phases]

    def __call__(self, run: GridRun) -> float:
        lengths = (end - begin for begin, end in pairwise(bounds(run.config)))
        return sum(n * cost for n, cost in zip(lengths, self.of_step(run), strict=True))


def allot(grid: Grid, costs: Costs) -> list[GridRun]:
    """Give each run of a grid the most steps that cost no more than the baseline's run.

    Raises ConfigError if the budget is too small for a run, and for runs that are not comparable.
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
    """`run` with the steps for `tokens` tokens at its own batch size, where the search starts."""
    return run.lasting(max(1, tokens * run.steps // run.tokens))


def _most_steps(run: GridRun, price: Price, budget: float) -> int:
    """The most steps within the budget, searched from the steps of `run`.

    A stride assumes that each of its steps costs as much as the most expensive phase. So no stride
    overshoots, and every trial lies between the start and the result, where a run is valid if it is
    valid at both. (A stride up may overshoot if it adds a more expensive phase; the second loop
    goes back down.)
    """
    most = budget * (1 + ROUNDING)
    try:
        price.of_step(run)  # slow, so it logs; hence outside of quiet()
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
    """Cost function that caches to files in `directory`, calling `measure` for missing files."""

    def costs(run: GridRun) -> Sequence[float]:
        file = directory / f"{equal}-{run.costs_name}.json"
        if not file.is_file():
            directory.mkdir(exist_ok=True)
            measure(run, file)
        try:
            return _read_costs(file, equal, len(bounds(run.config)) - 1)
        except ValueError as error:
            raise CheckpointError(
                f"{file}: damaged ({error}); delete it to have it measured again"
            ) from error

    return costs


def write_costs(file: Path, kind: str, costs: Sequence[float]) -> None:
    """Write the costs of a step in each phase, with their checksum. kind: "flops" or "seconds"."""
    write_atomically(file, json.dumps({kind: list(costs), CHECKSUM: _checksum(costs)}))


def _read_costs(file: Path, equal: str, phases: int) -> list[float]:
    """Read what `write_costs` wrote, or 0.1.0, without a checksum. Raise ValueError if damaged."""
    content = read_json_object(file)
    costs = content.get(KINDS[equal])
    if not isinstance(costs, list) or len(costs) != phases:
        raise ValueError(f"{KINDS[equal]}: must be a list of {phases} numbers")
    if not all(type(cost) in (int, float) and 0 < cost < LARGEST for cost in costs):
        raise ValueError(f"{KINDS[equal]}: must be positive numbers")
    if CHECKSUM in content and content[CHECKSUM] != _checksum(costs):
        raise ValueError("its content differs from what was written")
    return costs


def _checksum(costs: Sequence[float]) -> str:
    return hashlib.sha256(json.dumps(list(costs)).encode()).hexdigest()


def count_flops(run: GridRun, file: Path) -> None:
    """Write the FLOPs of a step in each phase to `file`, as `peptrain estimate` counts them.

    They include forward and backward passes, and the matrix products of merges, resets and the
    optimizer, spread evenly over the steps of their phase.
    """
    log.info("counting the FLOPs of %s", run.label)
    said = "stopped while FLOPs were counted; run the same command to continue"
    with quiet(), stop_on_signals() as stop:
        stop.at_once = said
        phases = estimate(run.config).phases
    if stop.code:  # an exception in a callback of a library is lost
        raise Interrupted(said, stop.code)
    tokens = run.tokens // run.steps
    extra = (sum(e.times * e.flops for e in p.events) / (p.last - p.first) for p in phases)
    each = [tokens * p.flops_per_token + more for p, more in zip(phases, extra, strict=True)]
    write_costs(file, "flops", each)


@dataclass(frozen=True)
class Timing(Job):
    """A job that times a configuration's steps in a process like a run's.

    `run` is the file it writes.
    """

    def command(self) -> list[str]:
        timing = [sys.executable, "-m", "peptrain.comparison.timing"]
        return [*timing, str(self.settings.absolute()), str(self.run.absolute())]

    def result(self) -> str | None:
        return "timed" if self.run.is_file() else None


def clock(out: Path, gpus: Sequence[str], lock: int) -> Callable[[GridRun, Path], None]:
    """Return a function that times the steps of a run and writes the seconds to a file.

    No other job of this call runs at the same time.
    """

    def measure(run: GridRun, file: Path) -> None:
        settings, log_file = (
            out / "settings" / f"{file.stem}.toml",
            out / "logs" / f"{file.stem}.log",
        )
        log.info("timing the steps of %s", run.label)
        write_atomically(settings, dump(run.config))
        status = work([Timing(file.stem, file, settings, log_file, run.steps)], 1, gpus, lock)
        if status.interrupted:
            said = "stopped while steps were timed; run the same command to continue"
            raise Interrupted(said, status.interrupted)
        if error := status.failed.get(file.stem):
            raise PeptrainError(
                f"{run.label}: steps can't be timed: {error}; see {log_file}, and fix or remove"
                " the block"
            )

    return measure
