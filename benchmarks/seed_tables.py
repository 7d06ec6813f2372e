"""Print means over seeds, and differences to one line over pairs of a seed, from a CSV of runs.

    python benchmarks/seed_tables.py FILE --by COLUMN [COLUMN ...] --minus VALUE [VALUE ...]

FILE has a row for each run, with a column `seed`. A line is the runs with the same values in the
columns of --by; --minus has its values in the line that differences are to, - where a cell is
empty. Intervals are of 95 % (Student's t). A line with one seed has none.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import table
from study_tables import Row, difference, mean_cell, rows_of

Line = tuple[str, ...]
"""The values of a line in the columns of --by."""


def lines_of(rows: Sequence[Row], by: Sequence[str], value: str) -> dict[Line, list[Row]]:
    """Return seeds and values of the runs of each line. Two runs of a seed are an error."""
    columns = rows[0].keys() if rows else ()
    if missing := [name for name in (*by, "seed", value) if name not in columns]:
        raise SystemExit(f"no column {missing[0]}; there are {', '.join(columns)}")
    found: dict[Line, list[Row]] = {}
    for row in rows:
        line = found.setdefault(tuple(cell(row[name]) for name in by), [])
        if any(one["seed"] == row["seed"] for one in line):
            raise SystemExit(f"two runs of seed {row['seed']} with the same values of --by")
        line.append({"seed": row["seed"], "value": row[value], "left_out": 0})
    return found


def cell(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def main(argv: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("file", type=Path)
    made.add_argument("--by", nargs="+", required=True, metavar="COLUMN")
    made.add_argument("--minus", nargs="+", required=True, metavar="VALUE")
    made.add_argument("--value", default="held_out_loss", metavar="COLUMN")
    args = made.parse_args(argv)
    lines = lines_of(rows_of(args.file), args.by, args.value)
    if (to := tuple(args.minus)) not in lines:
        raise SystemExit(f"no line {' '.join(to)}; there are {', '.join(map(' '.join, lines))}")
    header = [" ".join(args.by), "seeds", args.value, f"minus {' '.join(to)}"]
    apart = {name: difference(line, lines[to]) for name, line in lines.items() if name != to}
    table(header, [[" ".join(name), len(line), mean_cell(line), apart.get(name, "")]
                   for name, line in lines.items()])  # fmt: skip


if __name__ == "__main__":
    main()
