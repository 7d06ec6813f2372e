"""Ctrl-C and SIGTERM as a wish to stop, so that training can save first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType


@dataclass
class Stop:
    """Whether the user, or the machine's owner, asked the training to end."""

    requested: bool = False


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """The first SIGINT or SIGTERM sets `requested`. After it SIGINT acts as usual, at once; SIGTERM
    does no more, because what ends a job may send it to each process and to their parent.

    Outside of the main thread, where Python allows no handlers, nothing is caught.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    for s in before:
        signal.signal(s, request)
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
