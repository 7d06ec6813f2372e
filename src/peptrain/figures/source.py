"""What figures are drawn from: the rows of runs and of a comparison, as plain lists of dicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peptrain.errors import PeptrainError
from peptrain.text import quoted

Row = Mapping[str, Any]
Axis = Literal["tokens", "steps", "time", "flops"]
LARGEST = 1e300
SEED = "train.seed"
MOST_NAMES = 3
"""Runs that a message names."""


class NotMeasured(PeptrainError):
    """The rows lack what a figure shows."""


@dataclass(frozen=True)
class RunRows:
    """What the directory of one run contains."""

    name: str
    rows: Sequence[Row] = ()
    """Of metrics.jsonl."""
    settings: Row = field(default_factory=dict)
    """Of config.toml, by dotted key."""
    analysis: Sequence[Row] = ()
    """Of RUN/analysis/STEP.csv."""
    spectra: Sequence[Row] = ()
    """Of RUN/analysis/STEP.spectra.csv."""
    evaluations: Sequence[Row] = ()
    """Of eval.json."""
    data: str = ""
    """The fingerprint of the corpus, empty where it is not known."""
    configuration: str = ""
    """The label of its configuration in a comparison."""
    left_out: Sequence[str] = ()
    """What of it was not read, and why."""

    def of(self, *events: str) -> list[Row]:
        """Return the rows of these events."""
        return [row for row in self.rows if row.get("event") in events]

    @property
    def end(self) -> Row | None:
        """The row of the end; None for a run that has not finished."""
        return next(iter(reversed(self.of("end"))), None)

    @property
    def state(self) -> str:
        """Finished, diverged or unfinished, with the last step."""
        steps = self.settings.get("train.steps")
        last = max((row.get("step", 0) for row in self.rows), default=0)
        if self.end is not None:
            return f"finished at step {last:,}"
        if diverged := self.of("diverged"):
            return f"diverged at step {diverged[-1].get('step', last):,}"
        return f"unfinished: step {last:,}" + (f" of {steps:,}" if type(steps) is int else "")

    @property
    def fine_tuned(self) -> bool:
        """Whether its losses are those of labelled rows."""
        return bool(self.settings.get("tune.task"))

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens of a step, from the settings or else from a row, as of a fine-tuning, whose
        sequences are shorter than train.seq_len."""
        sizes = [number(self.settings, f"train.{key}") for key in ("batch_size", "seq_len")]
        if sizes[0] and sizes[1] and not self.fine_tuned:
            return sizes[0] * sizes[1]
        for row in self.of("step"):
            step, tokens = number(row, "step"), number(row, "tokens")
            if step and tokens:
                return tokens / step
        return None


@dataclass(frozen=True)
class Source:
    """Runs, and the comparison that they belong to, if any."""

    runs: Sequence[RunRows] = ()
    trials: Sequence[Row] = ()
    """"runs" of the runs.json of `compare`: an entry for each run of the grid."""
    lines: Sequence[Row] = ()
    """"configurations" of it: an entry for each configuration, at its best learning rate."""
    about: Row = field(default_factory=dict)
    """The rest of runs.json: what is equal, caption and notes."""
    left_out: Sequence[str] = ()
    """What was not read, and why."""
    along: Sequence[Row] = ()
    """Of the tables of `analyze --line`, each with the name of its "pair"."""
    path: Path | None = None
    """The directory of the comparison."""

    @property
    def groups(self) -> dict[str, list[RunRows]]:
        """The runs by label. Runs that differ in nothing but their seed have the same one."""
        if any(run.configuration for run in self.runs):
            made: dict[str, list[RunRows]] = {}
            for run in self.runs:
                made.setdefault(run.configuration or run.name, []).append(run)
            return made
        same: list[list[RunRows]] = []
        for run in self.runs:
            fits = (group for group in same if _but_seed(group[0]) == _but_seed(run) != {})
            found = next(fits, None)
            found.append(run) if found else same.append([run])
        return {f"{g[0].name} ({len(g)} seeds)" if g[1:] else g[0].name: g for g in same}

    @property
    def warnings(self) -> list[str]:
        """Why the losses of the runs can't be compared, and what was not read."""
        found = [*self.left_out, *(note for run in self.runs for note in run.left_out)]
        if len({run.data for run in self.runs if run.data}) > 1:
            found.append("the runs were trained on different text: their losses can't be compared")
        return found


@dataclass(frozen=True)
class View:
    """How to look at the rows."""

    x: Axis = "tokens"
    """Of curves over training."""
    what: str = "weight"
    """Of dynamics: weight, update, from_start and so on (docs/dynamics.md)."""


def loss_label(source: Source, which: str = "loss") -> str:
    """Return the label of an axis of losses, with their unit."""
    fine_tuned = any(run.fine_tuned for run in source.runs)
    return f"{which} ({'per row' if fine_tuned else 'nats per token'})"


def _but_seed(run: RunRows) -> dict[str, Any]:
    return {key: value for key, value in run.settings.items() if key != SEED}


def number(row: Row, key: str) -> float | None:
    """Return a finite number of a row, None if it has none there."""
    value: Any = row.get(key)
    if type(value) not in (int, float) or not abs(value) < LARGEST:
        return None
    return value  # type: ignore[no-any-return]


def left_out(source: Source, found: Mapping[str, object], what: str) -> list[str]:
    """Return a note for each run that a figure does not show, since it was not measured."""
    return [f"{run.name}: not measured of {what}" for run in source.runs if run.name not in found]


def listed(names: Iterable[str]) -> str:
    """Return names for a message: of many the first ones, and how many others there are."""
    known = list(names)
    if len(known) <= MOST_NAMES:
        return ", ".join(known) or "no run"
    return f"{', '.join(known[: MOST_NAMES - 1])} and {len(known) - MOST_NAMES + 1} others"


def how_to_measure(source: Source, *, in_training: bool = True) -> str:
    """Return how to get rows that no run has. in_training: whether `train.observe` writes them."""
    runs = "RUN" if source.path is None else f"{quoted(source.path / 'runs')}/*"
    analyze = f"run `peptrain analyze {runs}`"
    if not in_training:
        return analyze
    observed = [run for run in source.runs if run.settings.get("train.observe") == "dynamics"]
    if not observed:
        return f"train with --train.observe dynamics, or {analyze}"
    budgets = dict.fromkeys(f"{run.settings.get('train.observe_budget')}" for run in observed)
    yet = "" if all(run.end for run in observed) else " yet"
    return (
        f"train.observe_budget {', '.join(budgets)} allowed no measurement{yet}; train with a"
        f" larger one, or {analyze}"
    )


LABELS: dict[Axis, str] = {
    "tokens": "training tokens",
    "steps": "steps",
    "time": "training time (s)",
    "flops": "training FLOPs",
}


def place(run: RunRows, row: Row, x: Axis) -> float | None:
    """Return where on the x axis a row is, None if that is not known."""
    step = number(row, "step")
    if x == "steps":
        return step
    if x == "time":
        return number(row, "seconds")
    each = run.tokens_per_step
    if step is None or each is None:
        return None
    flops = number(run.end or {}, "flops_per_token")
    if x == "flops":
        return None if flops is None else step * each * flops
    return step * each


def curve(
    run: RunRows, events: Sequence[str], key: str, x: Axis
) -> tuple[list[float], list[float]]:
    """Return x and y of the rows that have both."""
    points = []
    for row in run.of(*events):
        at, value = place(run, row, x), number(row, key)
        if at is not None and value is not None:
            points.append((at, value))
    return [at for at, _ in points], [value for _, value in points]


EVENTS = {"merges": "merge", "exact_steps": "exact step", "resets": "reset"}
"""Counters in rows of metrics, with the name of what they count."""


def marks(run: RunRows, x: Axis) -> list[tuple[str, float]]:
    """Return (event, x) of merges, exact steps, resets and phases.

    A row has a counter if the event occurred since the row before, so that an event is at the first
    row after it.
    """
    found = []
    for row in run.of("step", "phase"):
        if (at := place(run, row, x)) is None:
            continue
        if row.get("event") == "phase":
            found.append(("phase", at))
        else:
            found += [(name, at) for key, name in EVENTS.items() if number(row, key)]
    return found
