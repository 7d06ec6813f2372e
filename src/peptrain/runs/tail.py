"""Follow metrics.jsonl of a run while another process writes it."""

from __future__ import annotations

import os
from typing import Any

from peptrain.runs.directory import RunDir, as_row


class Tail:
    """The rows of a run, each read once."""

    def __init__(self, run: RunDir) -> None:
        self._file = run.metrics_file
        self._inode, self._read = 0, 0

    def rows(self) -> tuple[bool, list[dict[str, Any]]]:
        """Return (whether the file begins again, its new rows).

        A resume replaces the file by one without the rows that it repeats. Then all rows are
        returned again. Damaged lines are skipped, and an unfinished one is left for the next call.
        """
        try:
            with self._file.open("rb") as file:
                found = os.fstat(file.fileno())
                again = found.st_ino != self._inode or found.st_size < self._read
                file.seek(0 if again else self._read)
                text = file.read()
        except FileNotFoundError:
            gone, self._inode, self._read = bool(self._inode), 0, 0
            return gone, []
        whole = text[: text.rfind(b"\n") + 1]
        self._inode, self._read = found.st_ino, len(whole) + (0 if again else self._read)
        rows = (as_row(line) for line in whole.split(b"\n") if line)
        return again, [row for row in rows if row is not None]
