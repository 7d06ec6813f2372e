"""Write a figure, and beside it its numbers."""

from __future__ import annotations

from pathlib import Path

from peptrain.errors import ConfigError
from peptrain.figures.panel import Drawn
from peptrain.figures.style import rendered
from peptrain.files import write_atomically

SUFFIXES = ("svg", "png", "pdf")


def save(drawn: Drawn, out: Path, name: str) -> None:
    """Write a figure to `out` and its numbers to OUT.csv. name: that of the figure.

    Raises ConfigError if they can't be written.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out.with_suffix(".csv"), drawn.csv())
        write_atomically(out, [rendered(drawn.figure, out.suffix.removeprefix("."), name)])
    except OSError as error:
        raise ConfigError(
            f"--out {out}: can't be written: {error.strerror}; choose another place"
        ) from error
