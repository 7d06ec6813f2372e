"""Turn signals such as Ctrl-C and SIGTERM into a request to stop, so that training saves first."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

from peptrain.distributed.world import World
from peptrain.errors import Interrupted

BY_USER, BY_SYSTEM = 128 + signal.SIGINT, os.EX_TEMPFAIL
"""Exit codes after Ctrl-C and after the other signals, on which a job scheduler can requeue."""


@dataclass
class Stop:
    """Whether the user or the system asked the training to stop."""

    code: int = 0
    """BY_USER or BY_SYSTEM once it was asked to stop."""
    at_once: str | None = None
    """If set, a signal raises Interrupted with this message: there is nothing to save first."""
    answer: str = ""
    """What the first Ctrl-C is answered with, since a step may take long, and a second one does not
    save."""


@contextlib.contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Yield a `Stop` whose `code` is set by the first SIGINT, SIGTERM, SIGHUP or SIGUSR1.

    After that SIGINT has its usual effect again, so a second Ctrl-C interrupts at once. Further
    signals of the other kinds are ignored, because a job scheduler may send one to each process and
    to their parent.

    SIGHUP and SIGUSR1 are caught only where they would end the process: not under nohup, and not in
    a program that has its own use for them. Outside the main thread, where Python allows no signal
    handlers, nothing is caught.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    for s in (signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(s) is signal.SIG_DFL:
            before[s] = signal.SIG_DFL
    before = {s: handler for s, handler in before.items() if handler is not None}  # C code's own

    def request(number: int, frame: FrameType | None) -> None:
        first = not stop.code
        stop.code = stop.code or (BY_USER if number == signal.SIGINT else BY_SYSTEM)
        if signal.SIGINT in before:
            signal.signal(signal.SIGINT, before[signal.SIGINT])
        if first and stop.at_once is not None:
            raise Interrupted(stop.at_once, stop.code)
        if first and stop.answer and number == signal.SIGINT:
            with contextlib.suppress(OSError):  # and no print, which this may have interrupted
                os.write(2, f"\n{stop.answer}\n".encode())

    for s in before:
        signal.signal(s, request)
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


class Agreement:
    """Lets several processes stop after the same step, whichever of them was asked to.

    The wishes after a step are exchanged while the next one runs, and are read at its end. So
    nobody waits for a GPU, and a wish is fulfilled after the step that follows it.
    """

    def __init__(self, stop: Stop, here: World) -> None:
        self._stop, self._here = stop, here
        self._wishes: Callable[[], int] | None = None

    def code(self) -> int:
        """Return the exit code to stop with, or 0 to continue. Called by all after each step.

        A single process stops at once.
        """
        if self._here.size == 1:
            return self._stop.code
        before, self._wishes = self._wishes, self._here.largest(self._stop.code)
        return before() if before else 0
