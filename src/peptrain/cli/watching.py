"""Watch a run that another process trains: read its rows and its lock, and write nothing."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

from rich.live import Live

from peptrain.display.console import console, say
from peptrain.display.watching import TALLEST, RunView
from peptrain.errors import CheckpointError, Interrupted, PeptrainError
from peptrain.files import quoted
from peptrain.runs.directory import LOCK, RunDir
from peptrain.runs.lock import Holder, Sign
from peptrain.runs.tail import Tail
from peptrain.settings import toml
from peptrain.training.signals import BY_USER

EVERY = 1.0
"""Seconds between two looks at a run."""


class Watched:
    """A run and the process that trains it."""

    def __init__(self, path: Path) -> None:
        self._run = RunDir.open(path)
        self.view = RunView(str(path), toml.read(self._run.config_file, ""))
        self._tail, self._sign = Tail(self._run), Sign(path / LOCK)
        self._holder: Holder | None = None
        self._running = False

    def look(self) -> bool:
        """Read what is new. Return whether the run is in progress.

        Raises CheckpointError if it has vanished.
        """
        # The lock first: a process writes its last row before it releases the lock.
        held, holder = self._sign.held(), self._sign.holder()
        self._running = self._sign.alive()
        self._holder = holder or self._holder if held else None
        if not self._run.config_file.is_file():
            raise CheckpointError(f"{self.view.name}: the run has vanished: config.toml is missing")
        again, rows = self._tail.rows()
        if again:
            self.view.forget()
        self.view.add(rows)
        return self._running and self.view.last is None

    @property
    def doubtful(self) -> bool:
        """Whether the next looks show if a process of another machine is still there."""
        return self._sign.doubtful

    @property
    def standing(self) -> str:
        """What the run is doing, in words."""
        if self.view.last is not None:
            return "finished" if self.view.last["event"] == "end" else "diverged"
        if not self._running:
            return "crashed" if self._holder else "not running"
        what = "running" if self.view.step else "waiting for its first row"
        return f"{what}, {self._holder}" if self._holder else what

    @property
    def seconds_left(self) -> float | None:
        """Estimate of the time left, None when not running."""
        since = self._holder and datetime.fromisoformat(self._holder.since).timestamp()
        return self.view.seconds_left(since or 0.0) if self._running else None

    def check(self) -> None:
        """Raise PeptrainError, saying how to continue, if the run has ended without its end."""
        view, last = self.view, self.view.last
        if last is not None and last["event"] == "diverged":
            raise PeptrainError(f"{view.name}: diverged: {last['error']}")
        if last is None and not self._running:
            at = f"at step {view.step:,} of {view.steps:,}"
            how = f"; resume it with `peptrain resume {quoted(view.name)}`"
            if self._holder:
                raise PeptrainError(f"{view.name}: crashed {at}: {self._holder} is gone{how}")
            raise PeptrainError(f"{view.name}: not running, {at}{how}")


def watch(path: Path, every: float = EVERY) -> None:
    """Show a run until it ends. Where the output is no terminal, print its state once.

    Raises PeptrainError for a run that has crashed, diverged, vanished or is not running, and
    Interrupted after Ctrl-C.
    """
    run = Watched(path)
    while (running := run.look()) and run.doubtful:
        time.sleep(every)
    if running and console.is_terminal and not console.is_dumb_terminal:
        try:
            _follow(run, every)
        except KeyboardInterrupt:
            raise Interrupted(f"no longer watching {path}, which continues", BY_USER) from None
    else:
        for line in run.view.lines(run.standing, run.seconds_left):
            if line:
                say(line)
        for line in run.view.curve(console.width, TALLEST, console.encoding):
            say(line)
    run.check()


def _follow(run: Watched, every: float) -> None:
    def frame() -> object:
        return run.view.frame(console, run.standing, run.seconds_left)

    # Drawn here and not by a thread of rich, which would draw while rows are taken.
    with Live(console=console, auto_refresh=False, redirect_stdout=False) as live:
        while True:
            live.update(frame(), refresh=True)  # type: ignore[arg-type]
            if not run.look():
                break
            time.sleep(every)
        live.update(frame(), refresh=True)  # type: ignore[arg-type]
