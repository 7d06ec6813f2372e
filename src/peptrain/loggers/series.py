"""What a service has of a run, kept in the run's directory, so that a resume continues it.

A resumed run repeats the steps after its checkpoint. A service that can't take back the rows it has
is sent each only once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from secrets import token_hex
from typing import Any

from peptrain.files import read_json_object, write_atomically


class Series:
    """The series of a run in a service: its identifier, and the last row of each event in it.

    A run that was made longer from an earlier step than the last one sent has another continuation.
    It begins a new series.
    """

    def __init__(self, file: Path, config: Mapping[str, Any], step: int) -> None:
        self._file, self._steps = file, config["train"]["steps"]
        kept = read_json_object(file) if file.exists() else {}
        self._sent: dict[str, int] = dict(kept.get("sent", {}))
        longer = kept.get("steps", self._steps) != self._steps
        self.resumed = bool(kept) and not (longer and step < max(self._sent.values(), default=0))
        self.id: str = kept["id"] if self.resumed else token_hex(4)
        if not self.resumed:
            self._sent = {}
        self._before = dict(self._sent)
        self._keep()

    def take(self, row: Mapping[str, Any]) -> bool:
        """Return whether the service lacks the row, and note that it has it.

        It is noted first: a kill in between leaves one row out rather than sending it twice.
        """
        event, step = row["event"], row["step"]
        if step <= self._before.get(event, -1):
            return False
        if self._sent.get(event) != step:
            self._sent[event] = step
            self._keep()
        return True

    def _keep(self) -> None:
        kept = {"id": self.id, "steps": self._steps, "sent": self._sent}
        write_atomically(self._file, json.dumps(kept) + "\n")


def own_directory(run: Path, name: str) -> Path:
    """Create a directory in the run. Raises OSError if a link is in its place."""
    directory = run / name
    if directory.is_symlink():
        raise OSError(f"{directory} is a link, which is never followed")
    directory.mkdir(exist_ok=True)
    return directory
