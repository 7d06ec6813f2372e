"""trackio: a local database, shown by `trackio show`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from peptrain.loggers.base import Logger, scalars
from peptrain.loggers.series import Series


class Trackio(Logger):
    """Writes to trackio's database, in the project peptrain or $TRACKIO_PROJECT."""

    name: ClassVar[str] = "trackio"
    package: ClassVar[str] = "trackio"

    def open(self, run: Path, config: Mapping[str, Any], step: int) -> None:
        """Begin or continue the run NAME-ID. The ID is in RUN/trackio.json."""
        import trackio

        self._series = Series(run / "trackio.json", config, step)
        self._run: Any = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "peptrain"),
            name=f"{run.resolve().name}-{self._series.id}",
            config=dict(config),
            resume="allow" if self._series.resumed else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, row: Mapping[str, Any]) -> None:
        """Log the numbers of the row that the database lacks."""
        if (values := scalars(row)) and self._series.take(row):
            self._run.log(values, step=row["step"])

    def close(self) -> None:
        """Write what is pending."""
        self._run.finish()
