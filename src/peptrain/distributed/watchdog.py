"""End a process that waits too long for the others, with one line that says so."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from functools import cache

import torch

LONGEST = 86_400
"""Largest limit of a step in seconds."""
SLOW = 600.0
"""Seconds that processes wait for each other where one may compile, read or write for long."""
TICK = 0.5
"""Seconds between two looks."""
QUIET = 5.0
"""Seconds without a sign of the program after which the GPU is asked for one. A CUDA graph is
captured in less, and no other thread may ask anything during a capture."""


class Watchdog:
    """Ends the process if the program stays in one place for longer than it may.

    A collective waits for processes that may never answer. The limits of PyTorch's groups
    are fixed when a group is created, end a process of NCCL with a page of C++ frames, and do not
    cover collectives in a CUDA graph. So a thread watches instead, on gloo and NCCL alike. It works
    because collectives and waits for a GPU release Python's lock.

    Time in which this process itself was stopped does not count, since it is measured in looks.
    """

    def __init__(self) -> None:
        self._limit: float | None = None
        self._signs = 0
        self._events: tuple[torch.cuda.Event, ...] = ()

    def start(self) -> None:
        """Start the thread, which lives as long as the process."""
        threading.Thread(target=self._watch, name="peptrain-watchdog", daemon=True).start()

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Allow the body `seconds`, or what is shorter, those of a `within` around it.

        A program may run ahead of its GPU. Then what the GPU completes counts as a sign of it too.
        """
        before = self._limit
        self._limit = seconds if before is None else min(seconds, before)
        self._signs += 1
        try:
            yield
        finally:
            self._limit = before
            self._signs += 1
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._events = (*self._events[-15:], event)

    def _watch(self) -> None:
        waited, seen = 0.0, (self._signs, 0)
        while True:
            time.sleep(TICK)
            limit = self._limit
            asked = waited >= QUIET and limit is not None
            sign = (self._signs, self._completed() if asked else seen[1])
            if limit is None or sign != seen:
                waited, seen = 0.0, sign
                continue
            waited += TICK
            if waited >= limit:
                _end(limit)

    def _completed(self) -> int:
        """Return how many of the latest events the GPU has reached."""
        return sum(event.query() for event in self._events)  # type: ignore[no-untyped-call]


def _end(limit: float) -> None:
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.write(
            f"error: waited {limit:g} s for another process of this run, which stopped, hangs, or"
            " needs longer (train.timeout); see its own output; `peptrain resume RUN`, under the"
            " same launcher, continues from the latest checkpoint\n"
        )
        sys.stderr.flush()
    os._exit(1)  # the program is in a call that does not return


@cache
def watchdog() -> Watchdog:
    """Return the watchdog of this process, started at the first call."""
    made = Watchdog()
    made.start()
    return made
