"""What a logger is: a class that gets the rows of metrics.jsonl while a run writes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

SILENT = ("phase", "checkpoint", "diverged")
"""Events without a curve. A resume may write their rows a second time."""
LABELS = ("layer", "module", "what")
"""Values of a row of `train.observe` that say what it measures."""
CLOCKS = ("seconds", "device_hours", "observe_seconds", "peak_bytes")
"""Values that every row has. One curve of each is enough."""
HELD_OUT = ("held_out_loss", "perplexity", "held_out_tokens")


class Logger:
    """Sends the rows of a run to a tool that shows them.

    Only rank 0 has loggers, and each is called by a thread of its own, so a slow one does not slow
    down the training. An exception in any of the three methods switches the logger off, with a
    warning, and the run continues.
    """

    name: ClassVar[str]
    """Its name in `train.log_to`."""
    package: ClassVar[str] = ""
    """The module that it needs, if it may be missing. Imported in `open`."""

    def open(self, run: Path, config: Mapping[str, Any], step: int) -> None:
        """Begin, before the first row.

        run: the run directory. config: its config.toml. step: number of steps of the run so far, 0
        for a new one. Rows after `step` that an earlier process logged will come again.
        """
        raise NotImplementedError

    def log(self, row: Mapping[str, Any]) -> None:
        """Log a row of metrics.jsonl, which has been written. Its "event" says what it is."""
        raise NotImplementedError

    def close(self) -> None:
        """End, after the last row. Not called after an error, nor when the process is killed."""


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a row by the name of their curve.

    Curves of the steps are train/NAME, of evaluations eval/NAME, of the last row end/NAME, of
    `train.observe` EVENT/WHAT/LAYER.MODULE/NAME.
    """
    event = row["event"]
    if event in SILENT:
        return {}
    place = ".".join(str(row[key]) for key in LABELS[:2] if key in row)
    group = "/".join(filter(None, ["train" if event == "step" else event, row.get("what"), place]))
    skipped = {"step", "time", *LABELS, *(() if event == "step" else CLOCKS)}
    return {
        f"{'eval' if key in HELD_OUT else group}/{key}": float(value)
        for key, value in row.items()
        if key not in skipped and type(value) in (int, float) and math.isfinite(value)
    }
