"""Print the tables of study.py from its two CSV files: tune.csv and measures.csv in a directory.

    python benchmarks/study_tables.py OUT

Rows of rates that are not the best ones, of an earlier call with fewer rates, are left out.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common import table

from peptrain.analysis.table import read_table
from peptrain.comparison.summary import half_width

Row = dict[str, Any]
METHODS = ("full", "relora", "relora-warm", "lora-warm", "pico-compat", "pico-arithmetic", "bpt",
           "loro")  # fmt: skip
LOSS = "held-out loss"


def rows_of(file: Path) -> list[Row]:
    """Return the rows of a CSV of this script; none if it isn't there yet."""
    return read_table(file) if file.exists() else []


def best(tuned: Iterable[Row], name: str) -> tuple[float | None, str]:
    """Return the rate with the lowest held-out loss, None if no run finished, and its place."""
    losses = {row["lr"]: row["held_out_loss"] for row in tuned if row["method"] == name}
    finished = {lr: loss for lr, loss in losses.items() if loss is not None}
    if not finished:
        return None, ""
    lr = min(finished, key=finished.__getitem__)
    edges = {min(losses): "lowest", max(losses): "highest"}
    return lr, edges.get(lr, "") if len(losses) > 1 else "only"


def print_tables(out: Path) -> list[Row]:
    """Print all tables; return the rows of measures.csv that are of the best rates."""
    tuned = rows_of(out / "tune.csv")
    measured = [row for row in rows_of(out / "measures.csv")
                if row["lr"] == best(tuned, row["method"])[0]]  # fmt: skip
    print_rates(tuned)
    print_measures(measured)
    return measured


def print_rates(tuned: Sequence[Row]) -> None:
    """Print the held-out losses at all rates. A best rate at the edge of those tried is marked."""
    cells = {(row["method"], row["lr"]): row["state"] if row["held_out_loss"] is None
             else f"{row['held_out_loss']:.4f}" for row in tuned}  # fmt: skip
    rates, rows = sorted({lr for _, lr in cells}), []
    for name in (name for name in METHODS if any(name == known for known, _ in cells)):
        lr, place = best(tuned, name)
        shown = "none" if lr is None else f"{lr:g} ({place})" if place else f"{lr:g}"
        rows.append([name, *(cells.get((name, lr), "") for lr in rates), shown])
    table(["held-out loss, seed 0", *(f"{lr:g}" for lr in rates), "best rate"], rows)


def print_measures(measured: Iterable[Row]) -> None:
    """Print a table of means over seeds for each group, and one of differences to full."""
    groups: dict[str, dict[str, dict[str, list[Row]]]] = {}
    for row in measured:
        of = groups.setdefault(row["group"], {}).setdefault(str(row["measure"]), {})
        of.setdefault(row["method"], []).append(row)
    for group, measures in groups.items():
        names = [name for name in METHODS if any(name in of for of in measures.values())]
        table([group, *names], [[measure, *(mean_cell(of.get(name, [])) for name in names)]
                                for measure, of in measures.items()])  # fmt: skip
        if "full" in names and (others := names[1:]):
            rows = [[measure, *(difference(of.get(name, []), of["full"]) for name in others)]
                    for measure, of in measures.items() if "full" in of]  # fmt: skip
            table([f"{group}, minus full", *others], rows)
    for row in (row for of in groups.get(LOSS, {}).get("all", {}).values() for row in of):
        if row["value"] is None:
            print(f"{row['method']}-{row['seed']} diverged and is left out")


def by_seed(rows: Iterable[Row]) -> dict[int, float]:
    """Return the known values of one measure and method by seed."""
    return {row["seed"]: row["value"] for row in rows if row["value"] is not None}


def mean_cell(rows: Sequence[Row]) -> str:
    """Return the mean over seeds with its interval, and * if values of layers were left out."""
    star = "*" if any(row["left_out"] for row in rows) else ""
    return with_interval(list(by_seed(rows).values()), "") + star


def difference(rows: Sequence[Row], full: Sequence[Row]) -> str:
    """Return the mean difference to full over the seeds that both have, with its interval."""
    ours, theirs = by_seed(rows), by_seed(full)
    return with_interval([ours[seed] - theirs[seed] for seed in ours if seed in theirs], "+")


def with_interval(values: Sequence[float], sign: str) -> str:
    """Return the mean and the half width of its 95 % interval, or a dash without values."""
    if not values:
        return "–"
    width = half_width(values)
    return f"{statistics.fmean(values):{sign}.4f}" + ("" if width is None else f" ± {width:.4f}")


if __name__ == "__main__":
    print_tables(Path(sys.argv[1]))
