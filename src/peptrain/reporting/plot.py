"""Write one figure of runs or of a comparison, and its numbers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from peptrain.figures.catalogue import FIGURES
from peptrain.figures.panel import COLUMNS
from peptrain.figures.read import is_line, read
from peptrain.figures.save import SUFFIXES, save
from peptrain.figures.source import LABELS, Axis, View
from peptrain.figures.style import imported
from peptrain.files import no_links
from peptrain.runs.directory import is_comparison
from peptrain.settings.fields import check

log = logging.getLogger("peptrain")
LONGEST = 1000
"""Bytes of the first line of a CSV that are read."""
OVER_TIME = ("loss", "speed")
"""Figures with an x axis to choose."""


def plot(
    paths: Sequence[Path],
    out: Path,
    *,
    figure: str | None = None,
    x: Axis = "tokens",
    what: str = "weight",
) -> Path:
    """Draw runs, or a directory of `compare`, to `out`; return it. Its numbers go to OUT.csv.

    The suffix of `out` is .svg, .png or .pdf. figure: a name in docs/report.md, by default the
    loss, of a comparison the loss over learning rates, of directories of `analyze --line` those
    lines. x: of loss and speed, over training. what: of dynamics. The runs may be in training.

    Raises ConfigError for a setting, and where OUT.csv is a file of something else;
    CheckpointError for what can't be read; PeptrainError where matplotlib is missing or the runs
    lack what the figure shows.
    """
    suffix = out.suffix.removeprefix(".")
    check(suffix in SUFFIXES, "--out", out, "a name that ends in .svg, .png or .pdf")
    name = figure or _usual(paths)
    check(name in FIGURES, "--figure", name, f"one of {', '.join(FIGURES)}")
    check(x in LABELS, "--x", x, f"one of {', '.join(LABELS)}")
    mine = f"left out with {name}, whose x axis is fixed, or given with --figure loss or speed"
    check(x == "tokens" or name in OVER_TIME, "--x", x, mine)
    imported("matplotlib")
    _check_numbers(out)
    source = read(paths)
    drawn = FIGURES[name](source, View(x=x, what=what))
    for note in (*source.warnings, *drawn.notes):
        log.warning("%s", note)
    save(drawn, out, name)
    return out


def _usual(paths: Sequence[Path]) -> str:
    """Return the figure that is drawn where none is chosen."""
    if not paths:
        return "loss"
    return "rates" if is_comparison(paths[0]) else "line" if is_line(paths[0]) else "loss"


def _check_numbers(out: Path) -> None:
    """Check that OUT.csv does not exist, or has the numbers of a figure, to be replaced."""
    file = out.with_suffix(".csv")
    if file.is_file():
        with open(file, "rb", opener=no_links) as other:
            columns = other.readline(LONGEST)
        what = f"another name, since {file.name} is not the numbers of a figure"
        check(columns == f"{','.join(COLUMNS)}\n".encode(), "--out", out, what)
