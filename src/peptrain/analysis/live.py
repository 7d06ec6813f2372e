"""Measure ranks and condition numbers during training, within a budget of its time."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peptrain.analysis.measures import Row
from peptrain.analysis.source import Linear, place_of, ranks_of, weight_of
from peptrain.distributed.world import World
from peptrain.errors import CheckpointError
from peptrain.files import read_json_object, write_atomically
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
    """Which layers are measured and when, chosen once for a run and stored in it."""

    after: int
    """The step at which it was chosen. Measurements are at the later multiples of `every`."""
    every: int
    """Steps between measurements; 0 is never."""
    stride: int
    """Layers 0, stride, 2 stride, ... are measured."""


def choose(
    step: int, steps: int, layers: int, log_every: int, seconds: float, cost: float, budget: float
) -> Choice:
    """Return the choice after `step` of `steps` steps, each of which takes `seconds`.

    cost: seconds to measure one layer. The interval is the shortest multiple of `log_every` within
    the budget: cost x layers <= budget x seconds x every. Layers are left out until `ENOUGH`
    measurements fit into the rest of the run, or only one layer is left. `every` is 0 if none fits.
    """
    left = steps - step
    every, stride = 0, 1
    for stride in [*range(1, layers), layers]:
        measured = math.ceil(layers / stride)
        every = math.ceil(cost * measured / (budget * seconds * log_every)) * log_every
        if left // max(every, 1) >= ENOUGH or measured == 1:
            break
    return Choice(step, max(every, log_every) if every <= left else 0, stride)


class Dynamics:
    """Measures W and the last update of every matrix in the chosen layers.

    Until the choice is made it times a row of steps and one layer. After that everything depends on
    the step and the weights alone, so that a resumed run continues the series.
    """

    def __init__(
        self, run: Path, here: World, *, steps: int, log_every: int, budget: float
    ) -> None:
        self.file, self.here, self.budget = run / FILE, here, budget
        self.steps, self.log_every = steps, log_every
        self._choice: Choice | None = self._agreed(lambda: _stored(self.file))
        self._mark: tuple[int, float] | None = None
        self._before: dict[str, Tensor] = {}

    def due(self, model: nn.Module, step: int) -> bool:
        """Return whether to measure at `step`. One step earlier, keep the weights for the update.

        Called after each step, and before the first step of a process or phase.
        """
        if self._choice is None:
            return step > 0 and step % self.log_every == 0
        if self._measures(step + 1) and self.here.main:
            chosen = self._chosen(model, self._choice.stride)
            self._before = {name: weight_of(layer).cpu() for name, layer in chosen}
        return self._measures(step)

    def measure(self, model: nn.Module, step: int, seconds: float) -> Iterator[dict[str, Any]]:
        """Yield a row for each matrix and each of `weight` and `update`; none on other ranks.

        seconds: the training time up to this step, to choose by if nothing is chosen yet.
        """
        if self._choice is None:
            self._choose(model, step, seconds)
        elif self.here.main:
            for name, layer in self._chosen(model, self._choice.stride):
                for row in self._rows(model, name, layer):
                    yield _flat(row)
            self._before = {}

    def _measures(self, step: int) -> bool:
        choice = self._choice
        if choice is None or not choice.every:
            return False
        return step > choice.after and step % choice.every == 0

    def _chosen(self, model: nn.Module, stride: int) -> list[tuple[str, Linear]]:
        sites = find_sites(model)  # type: ignore[arg-type]
        return [(s.name, s.module) for s in sites if place_of(model, s.name)[0] % stride == 0]

    def _rows(self, model: nn.Module, name: str, layer: Linear) -> Iterator[Row]:
        W, ranks, place = weight_of(layer, self.here.device), ranks_of(layer), place_of(model, name)
        changes = [("weight", W, ranks.weight)]
        if name in self._before:
            changes.append(("update", W - self._before[name].to(W.device), ranks.update))
        for what, M, rank in changes:
            yield Row(*place, what, (M.shape[0], M.shape[1]), rank, singular_values(M).cpu())

    def _choose(self, model: nn.Module, step: int, seconds: float) -> None:
        """Choose at the second row of metrics, since the first contains compilation."""
        if self._mark is None:
            self._mark = step, seconds
            return
        per_step = (seconds - self._mark[1]) / (step - self._mark[0])
        layers = len(decoder_layers(model)[1])

        def chosen() -> Choice:
            found = choose(step, self.steps, layers, self.log_every, per_step,
                           self._cost(model, layers), self.budget)  # fmt: skip
            self._store(found)
            log.info("%s", described(found, layers, self.budget))
            return found

        self._choice = self._agreed(chosen)

    def _agreed(self, find: Callable[[], Choice | None]) -> Choice | None:
        """Return rank 0's result of `find` on every rank, or raise its error on every rank."""
        found: list[Choice | None] = []
        self.here.on_main(lambda: found.append(find()))
        return self.here.agree(found[0] if found else None)

    def _cost(self, model: nn.Module, layers: int) -> float:
        """Return the seconds of a measurement of layer 0, with a kept weight to subtract."""
        first = self._chosen(model, layers)
        begin = time.perf_counter()
        self._before = {name: weight_of(layer).cpu() for name, layer in first}
        for name, layer in first:
            for row in self._rows(model, name, layer):
                _flat(row)
        self._before = {}
        return time.perf_counter() - begin

    def _store(self, choice: Choice) -> None:
        try:
            write_atomically(self.file, json.dumps(asdict(choice)) + "\n")
        except OSError as error:
            raise CheckpointError(f"{self.file}: can't be written: {error.strerror}") from error


def described(choice: Choice, layers: int, budget: float) -> str:
    """Return what was chosen, in one line."""
    if not choice.every:
        return (
            f"train.observe: one layer takes more than train.observe_budget {budget:g} of the time"
            " of this run, so nothing is measured"
        )
    what = "every layer" if choice.stride == 1 else f"every {choice.stride}th layer"
    count = math.ceil(layers / choice.stride)
    return (
        f"train.observe: {what} ({count} of {layers}) is measured every {choice.every} steps, to"
        f" take at most {budget:.2g} of the training time"
    )


def _stored(file: Path) -> Choice | None:
    """Return the choice of an earlier process of the run, None if there is none."""
    if not file.exists():
        return None
    try:
        found = read_json_object(file)
        choice = Choice(**{key: found[key] for key in ("after", "every", "stride")})
        whole = all(type(v) is int and v >= 0 for v in asdict(choice).values())
        if not (whole and choice.stride):
            raise ValueError("values must be whole numbers")
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{file}: damaged ({error}); delete it to have layers and interval chosen again"
        ) from error
    return choice


def _flat(row: Row) -> dict[str, Any]:
    """Return a row for metrics.jsonl, in which NaN and infinity are null."""
    values = row.values()
    kept = {key: values[key] for key in ("layer", "module", "what", *COLUMNS)}
    undefined = {k for k, v in kept.items() if isinstance(v, float) and not math.isfinite(v)}
    return kept | dict.fromkeys(undefined)
