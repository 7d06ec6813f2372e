"""Measure ranks and condition numbers during training, within a budget of its time."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peptrain.analysis.measures import Row
from peptrain.analysis.source import Linear, place_of, ranks_of, weight_of
from peptrain.distributed.world import World
from peptrain.errors import CheckpointError
from peptrain.files import CHECKSUM, check_sealed, read_json, sealed, write_atomically
from peptrain.models.sites import decoder_layers, find_sites
from peptrain.ops.singular import singular_values

log = logging.getLogger("peptrain")
FILE = "observe.json"
ENOUGH = 20
"""Measurements of a run for which more layers are left out rather than more steps."""
COLUMNS = ("structural_rank", "effective_rank", "per", "stable_rank", "rank_1e-3", "condition",
           "frobenius", "sigma_max")  # fmt: skip


@dataclass(frozen=True)
class Choice:
    """Which layers are measured and when. It is stored in the run."""

    after: int
    """The step at which it was chosen. Until the next choice, measurements are at the later
    multiples of `every`."""
    every: int
    """Steps between measurements; 0 is never."""
    stride: int
    """Layers 0, stride, 2 stride, ... are measured."""


def choose(
    step: int,
    steps: int,
    layers: int,
    log_every: int,
    seconds: float,
    cost: float,
    budget: float,
    spent: float,
) -> Choice:
    """Return the choice after `step` of `steps` steps, each of which takes `seconds`.

    cost: seconds to measure one layer. spent: seconds that the trial took. What is left of the
    budget, budget x seconds x steps - spent, is for the steps that are left. The interval is the
    shortest multiple of `log_every` within it. Layers are left out until `ENOUGH` measurements fit
    into the rest of the run, or only one layer is left. `every` is 0 if none fits.
    """
    left, allowed = steps - step, budget * seconds * steps - spent
    if allowed <= 0:
        return Choice(step, 0, layers)
    every, stride = 0, 1
    for stride in [*range(1, layers), layers]:
        measured = math.ceil(layers / stride)
        every = interval(left, log_every, cost * measured, allowed)
        if left // max(every, 1) >= ENOUGH or measured == 1:
            break
    return Choice(step, every if every <= left else 0, stride)


def interval(left: int, log_every: int, cost: float, allowed: float) -> int:
    """Return the shortest multiple of `log_every` steps between measurements, each of which takes
    `cost` seconds, so that all in the `left` steps take at most `allowed`, which is above 0.
    """
    return max(1, math.ceil(cost * left / (allowed * log_every))) * log_every


class Dynamics:
    """Measures W and the last update of every matrix in the chosen layers.

    Until a choice is made it times a row of steps and one layer. When a measurement takes longer
    than that layer did, so that the ones to come would not fit into the budget, the interval grows.
    Choices are stored with their steps, and everything else depends on the step and the weights
    alone, so that a resumed run continues the series.
    """

    def __init__(
        self, run: Path, here: World, *, steps: int, log_every: int, budget: float
    ) -> None:
        self.file, self.here, self.budget = run / FILE, here, budget
        self.steps, self.log_every = steps, log_every
        self._choices: list[Choice] = self._agreed(lambda: _stored(self.file))
        self._mark: tuple[int, float] | None = None
        self._copying = 0.0
        """Seconds that this process took to keep weights, which are training time."""
        self._before: dict[str, Tensor] = {}
        """Weights of one step before the measurement that is due, for its update."""
        self._next: dict[str, Tensor] = {}
        """The same for the step to come: both are there where every step is measured."""

    def due(self, model: nn.Module, step: int) -> bool:
        """Return whether to measure at `step`. One step earlier, keep the weights for the update.

        Called after each step, and before the first step of a process or phase.
        """
        if not self._choices:
            return step > 0 and step % self.log_every == 0
        begin = time.perf_counter()
        self._before, self._next = self._next, {}
        self._keep_for(model, step + 1)
        self._copying += time.perf_counter() - begin
        return self._at(step) is not None

    def measure(
        self, model: nn.Module, step: int, seconds: float, spent: float
    ) -> Iterator[dict[str, Any]]:
        """Yield a row for each matrix and each of `weight` and `update`; none on other ranks.

        seconds: the training time up to this step. spent: what earlier measurements took.
        """
        if not self._choices:
            self._choose(model, step, seconds)
            self._keep_for(model, step + 1)
        elif choice := self._at(step):
            begin = time.perf_counter()
            if self.here.main:
                yield from self._rows(model, choice.stride)
            self._before = {}
            if choice == self._choices[-1]:
                took = time.perf_counter() - begin
                self._keep_the_budget(choice, step, seconds, spent + self._copying, took)
                if not self._next:  # another interval may begin with the next step
                    self._keep_for(model, step + 1)

    def _at(self, step: int) -> Choice | None:
        """Return the choice by which `step` is measured, None if it is not."""
        choice = next((c for c in reversed(self._choices) if c.after < step), None)
        return choice if choice and choice.every and step % choice.every == 0 else None

    def _chosen(self, model: nn.Module, stride: int) -> list[tuple[str, Linear]]:
        sites = find_sites(model)  # type: ignore[arg-type]
        return [(s.name, s.module) for s in sites if place_of(model, s.name)[0] % stride == 0]

    def _keep_for(self, model: nn.Module, step: int) -> None:
        """Keep the weights of one step before `step` if it will be measured."""
        if (choice := self._at(step)) and self.here.main:
            self._next = self._kept(model, choice.stride)

    def _kept(self, model: nn.Module, stride: int) -> dict[str, Tensor]:
        chosen = self._chosen(model, stride)
        # A copy: in float64 on a CPU the dense weight is the parameter itself.
        return {name: weight_of(layer, self.here.device).cpu().clone() for name, layer in chosen}

    def _rows(self, model: nn.Module, stride: int) -> Iterator[dict[str, Any]]:
        for name, layer in self._chosen(model, stride):
            W, ranks = weight_of(layer, self.here.device), ranks_of(layer)
            changes = [("weight", W, ranks.weight)]
            if name in self._before:
                changes.append(("update", W - self._before[name].to(W.device), ranks.update))
            for what, M, rank in changes:
                shape, sigma = (M.shape[0], M.shape[1]), singular_values(M).cpu()
                yield _flat(Row(*place_of(model, name), what, shape, rank, sigma))

    def _choose(self, model: nn.Module, step: int, seconds: float) -> None:
        """Choose at the second row of metrics, since the first contains compilation."""
        if self._mark is None:
            self._mark = step, seconds
            return
        per_step = (seconds - self._mark[1]) / (step - self._mark[0])
        self._mark = step, seconds
        layers = len(decoder_layers(model)[1])

        def chosen() -> list[Choice]:
            spent = cost = self._cost(model, layers)
            # On a GPU the first one loads a library and takes several times as long as the next.
            if 2 * cost <= self.budget * per_step * self.steps:
                cost = self._cost(model, layers)
                spent += cost
            found = choose(step, self.steps, layers, self.log_every, per_step, cost, self.budget,
                           spent)  # fmt: skip
            log.info("%s", described(found, layers, self.budget))
            return self._store([found])

        self._choices = self._agreed(chosen)

    def _cost(self, model: nn.Module, layers: int) -> float:
        """Return the seconds of a measurement of layer 0, with a kept weight to subtract."""
        begin = time.perf_counter()
        self._before = self._kept(model, layers)
        list(self._rows(model, layers))
        self._before = {}
        return time.perf_counter() - begin

    def _keep_the_budget(
        self, choice: Choice, step: int, seconds: float, spent: float, took: float
    ) -> None:
        """Measure less often if the measurements to come, like this one, exceed the budget."""
        if self._mark is None:  # the first measurement after a resume
            self._mark = step, seconds
            return
        per_step = (seconds - self._mark[1]) / (step - self._mark[0])
        left = self.steps - step
        allowed = self.budget * (seconds + per_step * left) - spent - took

        def rarer() -> list[Choice]:
            if took * (left // choice.every) <= allowed:
                return self._choices
            every = interval(left, self.log_every, took, allowed) if allowed > 0 else left + 1
            if every == choice.every:
                return self._choices
            every = every if every <= left else 0
            often = f"measures every {every} steps from now on" if every else "measures no more"
            log.info("train.observe: a measurement took %.2g s, more than the first one, so it %s",
                     took, often)  # fmt: skip
            return self._store([*self._choices, replace(choice, after=step, every=every)])

        self._choices = self._agreed(rarer)

    def _agreed(self, find: Callable[[], list[Choice]]) -> list[Choice]:
        """Return rank 0's result of `find` on every rank, or raise its error on every rank."""
        found: list[Choice] = []
        self.here.on_main(lambda: found.extend(find()))
        return self.here.agree(found)

    def _store(self, choices: list[Choice]) -> list[Choice]:
        try:
            write_atomically(self.file, json.dumps([sealed(asdict(c)) for c in choices]) + "\n")
        except OSError as error:
            raise CheckpointError(f"{self.file}: can't be written: {error.strerror}") from error
        return choices


def described(choice: Choice, layers: int, budget: float) -> str:
    """Return what was chosen, in one line."""
    if not choice.every:
        return (
            "train.observe: to try one layer and measure it again takes more than"
            f" train.observe_budget {budget:g} of the time of this run, so nothing is measured;"
            " `peptrain analyze` measures its checkpoints"
        )
    what = "every layer" if choice.stride == 1 else f"every {choice.stride}th layer"
    count = math.ceil(layers / choice.stride)
    return (
        f"train.observe: {what} ({count} of {layers}) is measured every {choice.every} steps, to"
        f" take at most {budget:.2g} of the training time"
    )


def _stored(file: Path) -> list[Choice]:
    """Return the choices of earlier processes of the run."""
    if not file.exists():
        return []
    try:
        entries = read_json(file, list)
        for entry in entries:
            if type(entry) is not dict:
                raise ValueError("entries must be objects")
            check_sealed(entry)
            entry.pop(CHECKSUM, None)
        found = [Choice(**entry) for entry in entries]
        numbers = [n for choice in found for n in asdict(choice).values()]
        if not found or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError("values must be whole numbers")
        if not all(choice.stride for choice in found):
            raise ValueError("a stride is 0")
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{file}: damaged ({error}); delete it to have layers and interval chosen again"
        ) from error
    return found


def _flat(row: Row) -> dict[str, Any]:
    """Return a row for metrics.jsonl, in which NaN and infinity are null."""
    values = row.values()
    kept = {key: values[key] for key in ("layer", "module", "what", *COLUMNS)}
    undefined = {k for k, v in kept.items() if isinstance(v, float) and not math.isfinite(v)}
    return kept | dict.fromkeys(undefined)
