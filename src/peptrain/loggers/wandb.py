"""Weights & Biases: offline in RUN/wandb, unless WANDB_MODE says otherwise."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from peptrain.loggers.base import Logger, scalars
from peptrain.loggers.series import Series, own_directory


class WandB(Logger):
    """Logs to the project peptrain or $WANDB_PROJECT. `wandb sync` uploads what is offline."""

    name: ClassVar[str] = "wandb"
    package: ClassVar[str] = "wandb"

    def open(self, run: Path, config: Mapping[str, Any], step: int) -> None:
        """Begin or continue the run whose id is in RUN/wandb.json."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when it is imported
        import wandb

        own_directory(run, "wandb")
        self._series = Series(run / "wandb.json", config, step)
        self._diverged = False
        self._run: Any = wandb.init(
            dir=str(run),
            project=os.environ.get("WANDB_PROJECT", "peptrain"),
            name=os.environ.get("WANDB_NAME", run.resolve().name),
            id=self._series.id,
            resume="allow",
            config=dict(config),
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=wandb.Settings(console="off", silent=True, disable_code=True),
        )

    def log(self, row: Mapping[str, Any]) -> None:
        """Log the numbers of the row that the service lacks."""
        self._diverged = row["event"] == "diverged"
        if (values := scalars(row)) and self._series.take(row):
            self._run.log(values, step=row["step"])

    def close(self) -> None:
        """Finish the run, as failed if it diverged."""
        self._run.finish(exit_code=int(self._diverged))
