"""Send rows to loggers without waiting for them, and without an error of theirs in the training."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Full, Queue
from typing import Any

from peptrain.errors import PeptrainError
from peptrain.loggers.base import Logger

log = logging.getLogger("peptrain")
OPENING = 60.0
CLOSING = 60.0
"""Seconds to wait for a logger that hangs. All close at the same time."""
WAITING = 10_000
"""Rows that may wait for a logger: more than any delay of a service, less than a GB of memory."""
Row = Mapping[str, Any]


class Sender:
    """One logger and its thread. After the first error, or when it hangs, the logger is off."""

    def __init__(self, logger: Logger, run: Path, config: Mapping[str, Any], step: int) -> None:
        self._logger, self._begin = logger, (run, config, step)
        self._rows: Queue[Row | None] = Queue(WAITING)
        self._opened, self._off = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        # A daemon, so that one that hangs does not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=logger.name, daemon=True)

    def open(self) -> None:
        """Open the logger and wait for it. The training doesn't import meanwhile."""
        self._thread.start()
        if not self._opened.wait(OPENING):
            self._switch_off(f"did not open within {OPENING:.0f} s")

    def send(self, row: Row) -> None:
        """Queue a row."""
        self._put(dict(row))

    def finish(self) -> None:
        """Queue the end."""
        self._put(None)

    def join(self, deadline: float) -> None:
        """Wait until the logger is closed, at most to the `deadline` of time.monotonic."""
        if not self._off.is_set():
            self._thread.join(max(0.0, deadline - time.monotonic()))
            if self._thread.is_alive():
                self._switch_off(f"did not close within {CLOSING:.0f} s")

    def _put(self, row: Row | None) -> None:
        if not self._off.is_set():
            try:
                self._rows.put_nowait(row)
            except Full:
                self._switch_off(f"has not taken the last {WAITING:,} rows")

    def _work(self) -> None:
        try:
            self._logger.open(*self._begin)
            self._opened.set()
            while not self._off.is_set() and (row := self._rows.get()) is not None:
                self._logger.log(row)
            if not self._off.is_set():
                self._logger.close()
        except BaseException as error:  # a library's sys.exit too
            named = "" if isinstance(error, PeptrainError) else f"{type(error).__name__}: "
            self._switch_off(f"{named}{error}".removesuffix(": "))
        finally:
            self._opened.set()

    def _switch_off(self, why: str) -> None:
        with self._lock:
            first = not self._off.is_set()
            self._off.set()
        if first:
            log.warning("train.log_to: %s is off and the run continues without it: %s",
                        self._logger.name, why)  # fmt: skip


class Loggers:
    """The loggers of a run."""

    def __init__(self, senders: Sequence[Sender] = ()) -> None:
        self._senders = senders

    def __call__(self, row: Row) -> None:
        """Send a row of metrics.jsonl to each."""
        for sender in self._senders:
            sender.send(row)


@contextmanager
def sending(
    classes: Sequence[type[Logger]], run: Path, config: Mapping[str, Any], step: int
) -> Iterator[Loggers]:
    """Open loggers for a run at `step`, yield what sends them rows, and close them.

    No error of theirs is raised.
    """
    senders = [Sender(cls(), run, config, step) for cls in classes]
    for sender in senders:
        sender.open()
    try:
        yield Loggers(senders)
    finally:
        for sender in senders:
            sender.finish()
        deadline = time.monotonic() + CLOSING
        for sender in senders:
            sender.join(deadline)
