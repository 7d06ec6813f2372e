"""Turn Ctrl-C and SIGTERM into a request to stop, so that training can save first."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType


@dataclass
class Stop:
    """Whether the user or the system asked the training to stop."""

    requested: bool = False


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Yield a `Stop` whose `requested` is set by the first SIGINT or SIGTERM.

    After that SIGINT has its usual effect again, so a second Ctrl-C interrupts at once. Further
    SIGTERMs are ignored, because a job scheduler may send one to each process and to their parent.

    Outside the main thread, where Python allows no signal handlers, nothing is caught.
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
