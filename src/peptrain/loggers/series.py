"""What a service has of a run, kept in the run's directory, so that a resume continues it.

A resumed run repeats the steps after its checkpoint. A service that can't take back the rows it has
is sent each only once.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from secrets import token_hex
from typing import Any

from peptrain.errors import CheckpointError
from peptrain.files import check_sealed, read_json_object, sealed, write_atomically


class Series:
    """The series of a run in a service: its identifier, and the last row of each event in it.

    A run that was made longer from an earlier step than the last one sent has another continuation.
    It begins a new series.
    """

    def __init__(self, file: Path, config: Mapping[str, Any], step: int) -> None:
        self._file, self._steps = file, config["train"]["steps"]
        kept = _stored(file)
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
        write_atomically(self._file, json.dumps(sealed(kept)) + "\n")


def _stored(file: Path) -> dict[str, Any]:
    """Return what `_keep` wrote, {} without a file. Raises CheckpointError if it is damaged."""
    if not os.path.lexists(file):
        return {}
    try:
        kept = read_json_object(file)
        sent = kept.get("sent")
        if type(kept.get("id")) is not str or not re.fullmatch(r"[0-9a-f]{8}", kept["id"]):
            raise ValueError("id: must be 8 hexadecimal digits")
        if type(kept.get("steps")) is not int:
            raise ValueError("steps: must be a whole number")
        if not isinstance(sent, dict) or any(type(step) is not int for step in sent.values()):
            raise ValueError("sent: must be a table of whole numbers")
        check_sealed(kept)
    except ValueError as error:
        why = str(error).removeprefix(f"{file.name}: ")
        raise CheckpointError(
            f"{file}: damaged ({why}); delete it to begin a new series"
        ) from error
    return kept


def own_directory(run: Path, name: str) -> Path:
    """Create a directory in the run. Raises OSError if a link is in its place."""
    directory = run / name
    if directory.is_symlink():
        raise OSError(f"{directory} is a link, which is never followed")
    directory.mkdir(exist_ok=True)
    return directory
