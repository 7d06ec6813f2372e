"""TensorBoard: event files in RUN/tensorboard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from peptrain.loggers.base import Logger, scalars
from peptrain.loggers.series import own_directory


class TensorBoard(Logger):
    """Writes event files for `tensorboard --logdir RUN`."""

    name: ClassVar[str] = "tensorboard"
    package: ClassVar[str] = "tensorboard"

    def open(self, run: Path, config: Mapping[str, Any], step: int) -> None:
        """Begin an event file, which takes back the points after `step` of earlier ones."""
        from torch.utils.tensorboard import SummaryWriter

        directory = own_directory(run, "tensorboard")
        first = not any(directory.iterdir())
        self._writer: Any = SummaryWriter(str(directory), purge_step=step + 1)
        if first:
            lines = (run / "config.toml").read_text(encoding="utf-8").splitlines()
            self._writer.add_text("config", "\n".join(f"    {line}" for line in lines))
        self._writer.flush()

    def log(self, row: Mapping[str, Any]) -> None:
        """Write the numbers of the row, at once, so that a kill leaves no gap."""
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row["step"], row["time"])
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
