"""Draw the figures of a comparison beside its table."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from peptrain.errors import PeptrainError
from peptrain.figures.catalogue import FIGURES
from peptrain.figures.read import from_comparison
from peptrain.figures.save import save
from peptrain.figures.source import NotMeasured, Row, View
from peptrain.figures.style import imported

log = logging.getLogger("peptrain")
NAMES = ("rates", "frontier", "grid", "scaling", "loss")


def draw(out: Path, trials: Sequence[Row], lines: Sequence[Row], about: Row) -> None:
    """Write OUT/figures/NAME.svg and NAME.csv of `runs.json`'s runs, configurations and the rest.

    What fails is logged in one line, as the table does not depend on it. A figure for which no run
    has the rows yet is left to a later call.
    """
    try:
        imported("matplotlib")
        source = from_comparison(out, trials, lines, about)
        for name in NAMES:
            try:
                drawn = FIGURES[name](source, View())
            except NotMeasured:
                continue
            save(drawn, out / "figures" / f"{name}.svg", name)
    except PeptrainError as error:
        log.warning("%s: not drawn: %s", out / "figures", error)
