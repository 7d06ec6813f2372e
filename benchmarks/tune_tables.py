"""The tables of tune.py, and its choice of rates."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from common import table
from study_tables import by_seed, difference, with_interval

from peptrain.tuning.tasks import TASKS

Row = dict[str, Any]
FULL = "full:full"
SEED = 0
"""Of pre-training, and of the runs of fine-tuning that choose a rate."""


def runs_of(runs: Iterable[Row], case: str, task: str) -> list[Row]:
    """Return the runs of a case on a task."""
    return [row for row in runs if (row["case"], row["task"]) == (case, task)]


def rates_of(args: Any, case: str) -> Sequence[float]:
    """Return the rates of the method of a case."""
    found: Sequence[float] = args.rates[case.partition(":")[2]]
    return found


def best(rows: Iterable[Row], rates: Sequence[float]) -> float | None:
    """Return the rate with the largest value of `SEED`, of equal ones that of the lowest loss.

    None until all rates are there, and if all diverged. A single rate is not tried.
    """
    if len(rates) == 1:
        return rates[0]
    tried = {row["lr"]: row for row in rows if row["seed"] == SEED and row["lr"] in rates}
    known = {lr: (row["value"], -row["loss"]) for lr, row in tried.items()
             if row["value"] is not None}  # fmt: skip
    return max(known, key=known.__getitem__) if known and len(tried) == len(rates) else None


def print_tables(
    args: Any, starts: Sequence[Row], runs: Sequence[Row], majority: Mapping[str, float]
) -> list[Row]:
    """Print all tables; return the runs of the best rates. majority: its values by task."""
    of = {(case, task): runs_of(runs, case, task) for case in args.only for task in args.tasks}
    chosen = {key: _chosen(args, rows, key[0]) for key, rows in of.items()}
    names = [TASKS[task].best_by.replace("_", " ") for task in args.tasks]
    print_starts(starts, runs)
    rows = [["majority class", "", "", *(f"{majority[task]:.4f}" for task in args.tasks)]]
    rows += [[*case.split(":"), _trainable(of[case, task] for task in args.tasks),
              *(_cell(args, chosen[case, task]) for task in args.tasks)]
             for case in args.only]  # fmt: skip
    table(["start", "fine-tuned by", "trainable", *names], rows)
    if FULL in args.only and (others := [case for case in args.only if case != FULL]):
        rows = [[case, *(difference(chosen[case, t], chosen[FULL, t]) for t in args.tasks)]
                for case in others]  # fmt: skip
        table([f"minus {FULL}", *names], rows)
    rows = [[case, *(_by_rate(of[case, task], rates_of(args, case)) for task in args.tasks)]
            for case in args.only]  # fmt: skip
    table([f"by rate, seed {SEED}", *names], rows)
    rows = [[case, *(_seconds(of[case, task]) for task in args.tasks)] for case in args.only]
    table(["seconds of a run", *args.tasks], rows)
    return [row for rows in chosen.values() for row in rows]


def print_starts(starts: Iterable[Row], runs: Sequence[Row]) -> None:
    """Print the pre-trained models, and how many runs of fine-tuning each has."""
    rows = []
    for row in starts:
        name, own = row["start"], [run for run in runs if run["start_loss"] == row["loss"]]
        sizes = f"{row['trainable']:,} / {row['parameters']:,}"
        rows.append([name, f"{row['lr']:g}", f"{row['loss']:.4f}", sizes, f"{row['seconds']:.0f}",
                     len(own)])  # fmt: skip
    table(["start", "lr", "held-out loss", "trainable / total", "seconds", "fine-tunings"], rows)


def _chosen(args: Any, rows: Sequence[Row], case: str) -> list[Row]:
    """Return the runs of the best rate with --seeds."""
    lr = best(rows, rates_of(args, case))
    return [row for row in rows if row["lr"] == lr and row["seed"] in args.seeds]


def _trainable(runs: Iterable[Iterable[Row]]) -> str:
    counts = {row["trainable"] for rows in runs for row in rows if row["value"] is not None}
    return ", ".join(f"{count:,}" for count in sorted(counts))


def _cell(args: Any, rows: Sequence[Row]) -> str:
    """Return the mean over seeds with its interval, and of how many if some have no value."""
    values = list(by_seed(rows).values())
    few = f" ({len(values)} of {len(args.seeds)})" if len(values) < len(args.seeds) else ""
    return with_interval(values, "") + few


def _by_rate(rows: Sequence[Row], rates: Sequence[float]) -> str:
    """Return the value of each rate with `SEED`, that of the best rate in bold."""
    if len(rates) == 1:
        return f"{rates[0]:g}, not tuned"
    lr, said = best(rows, rates), []
    tried = {row["lr"]: row["value"] for row in rows if row["seed"] == SEED}
    for rate in rates:
        value = tried.get(rate, "–")
        text = f"{rate:g}: " + (f"{value:.4f}" if isinstance(value, float) else value or "diverged")
        said.append(f"**{text}**" if rate == lr else text)
    return ", ".join(said)


def _seconds(rows: Sequence[Row]) -> str:
    """Return the mean over all runs, also of other rates, as they take the same time."""
    return f"{statistics.fmean(row['seconds'] for row in rows):.1f}" if rows else "–"
