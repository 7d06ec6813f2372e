"""Progress of commands other than a training: bars on a terminal, plain lines in a file."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from peptrain.data.prepare import ProgressReport
from peptrain.display.console import say
from peptrain.display.training import clock, count
from peptrain.eval.perplexity import Watch

if TYPE_CHECKING:
    from peptrain.comparison.workers import Status


class _BarAndState(Progress):
    """A progress bar with the state on a line of its own, so that both fit into 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        for task in self.tasks:
            yield Text(task.fields["state"])


@contextmanager
def preparing(console: Console) -> Iterator[Callable[[ProgressReport], None]]:
    """Show documents, tokens and tokens/s, and a bar if the amount of work is known."""
    columns = (TextColumn("preparing"), BarColumn(bar_width=20), TimeRemainingColumn())
    with _BarAndState(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, state="")
        since, before = time.monotonic(), -1

        def show(done: ProgressReport) -> None:
            nonlocal since, before
            now = time.monotonic()
            if before < 0:  # work done before an interruption does not count
                since, before = now, done.tokens
            total = None if done.share is None else 1.0
            state = preparation_state(done, now - since, before)
            bar.update(task, total=total, completed=done.share or 0.0, state=state)

        yield show


@contextmanager
def measuring(console: Console) -> Iterator[Watch]:
    """On a terminal, show the tokens evaluated and the time left."""
    columns = (
        TextColumn("evaluating"),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[state]}"),
    )
    left = TimeRemainingColumn()
    with Progress(*columns, TextColumn("left"), left, console=console, transient=True,
                  disable=not console.is_terminal) as bar:  # fmt: skip
        task = bar.add_task("", total=None, state="")

        def show(done: int, total: int) -> None:
            bar.update(task, total=total, completed=done, state=f"{done:,} of {total:,} tokens")

        yield show


def preparation_state(done: ProgressReport, seconds: float, before: int) -> str:
    """Documents, tokens, and tokens/s since there were `before` tokens, `seconds` ago."""
    pace = f"  {(done.tokens - before) / seconds:,.0f} tokens/s" if seconds > 0 else ""
    return f"{count(done.documents, 'document')}  {count(done.tokens, 'token')}{pace}"


@contextmanager
def counting(console: Console, verb: str) -> Iterator[Callable[[str, int, int], None]]:
    """On a terminal, show a bar with the count of what is done, and the time left."""
    columns = (TextColumn(verb), BarColumn(bar_width=20), MofNCompleteColumn())
    with _BarAndState(*columns, TimeRemainingColumn(), console=console,
                      disable=not console.is_terminal) as bar:  # fmt: skip
        task = bar.add_task("", total=None, state="")

        def show(name: str, done: int, total: int) -> None:
            bar.update(task, total=total, completed=done, state=name)

        yield show


@contextmanager
def fitting(console: Console) -> Iterator[Callable[[str], None]]:
    """On a terminal, show what the search for the largest micro-batch and rank is trying."""
    # Output is not redirected: stdout may be a file, and this console writes to stderr.
    with Live(console=console, transient=True, auto_refresh=False,
              redirect_stdout=False, redirect_stderr=False) as live:  # fmt: skip

        def show(trial: str) -> None:
            if console.is_terminal:
                live.update(Text(f"what fits: {trial}"), refresh=True)

        yield show


@contextmanager
def comparing(console: Console) -> Iterator[Callable[[Status], None]]:
    """Print a line when a run starts or ends. On a terminal, show the current runs below."""
    told: set[str] = set()

    def tell(key: str, line: str) -> None:
        if key not in told:
            told.add(key)
            say(line, to=console)

    with Live(console=console, transient=True, auto_refresh=False) as live:

        def show(status: Status) -> None:
            if status.before:
                tell("before", f"finished before: {status.before}")
            if status.interrupted:
                tell("stop", "stopping: the running ones save a checkpoint first")
            for name, result in status.finished.items():
                tell(name, f"finished  {name}  {result}  ({standing(status)})")
            for name, error in status.failed.items():
                tell(name, f"failed    {name}  {error}  ({standing(status)})")
            for working in [] if console.is_terminal else status.running.values():
                at = f"  from step {working.begun}" if working.begun else ""
                tell(f"begin {working.job.name}", f"started   {working.job.name}{at}")
            if console.is_terminal:
                live.update(Text("\n".join(_running(status))), refresh=True)

        yield show


def standing(status: Status) -> str:
    """Number of runs done, running and left, and the time left."""
    done = status.before + len(status.finished)
    parts = [f"{done} done", f"{len(status.running)} running", f"{len(status.waiting)} waiting"]
    parts += [f"{len(status.failed)} failed"] if status.failed else []
    seconds = status.seconds_left()
    parts += [f"left {clock(math.ceil(seconds))}"] if seconds else []
    return ", ".join(parts)


def _running(status: Status) -> Iterator[str]:
    for working in status.running.values():
        loss = "" if working.loss is None else f"  loss {working.loss:.3f}"
        yield f"running   {working.job.name}  {working.step}/{working.job.steps}{loss}"
    yield standing(status)
