"""Progress displays: a bar on a terminal, plain lines in a file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from peptrain.data.prepare import ProgressReport

if TYPE_CHECKING:
    from peptrain.comparison.workers import Status

EVENTS = ("merges", "exact_steps")
"""Counts reported by methods that are shown with the loss."""


class TrainingProgress:
    """Observer of a training that shows loss, held-out loss, rates, tokens/s and time left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._seen: dict[str, Any] = {}
        self._bar: Progress | None = None
        self._since, self._from = time.monotonic(), 0
        self._said = ""

    def __call__(self, row: Mapping[str, Any]) -> None:
        self._seen |= row
        if row["event"] == "start":
            self._start()
        elif row["event"] == "end":
            self.close()
            self._say(f"held-out loss {row['held_out_loss']:.4f}, run saved in {self._seen['run']}")
        elif row["event"] == "phase":
            self._say(f"step {row['step']}: {self._trainable()} from now on")
        elif self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=row["step"], state=self._state())
        elif row["event"] in ("eval", "checkpoint"):
            self._say(f"step {row['step']}/{self._seen['steps']}  {self._state()}")

    def close(self) -> None:
        """Remove the bar from the terminal. Also called when training ends early."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _start(self) -> None:
        seen = self._seen
        self._since, self._from = time.monotonic(), seen["step"]
        at = f" from step {seen['step']}" if seen["step"] else ""
        self._say(
            f"{self._trainable()}, {seen['steps']} steps of {seen['tokens_per_step']} tokens"
            f" in {seen['precision']}{at}"
        )
        if self._console.is_terminal:
            self._bar = _BarAndState(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self._console,
                speed_estimate_period=3600,  # rows may be minutes apart
            )
            self._bar.add_task(
                seen["method"], total=seen["steps"], completed=seen["step"], state=""
            )
            self._bar.start()

    def _trainable(self) -> str:
        trainable, total = (self._seen[key] / 1e6 for key in ("trainable", "parameters"))
        return f"{trainable:.2f}M of {total:.2f}M parameters trainable"

    def _state(self) -> str:
        seen, parts = self._seen, []
        if "loss" in seen:
            parts = [f"loss {seen['loss']:.3f}"]
            if "held_out_loss" in seen:
                parts.append(f"held-out {seen['held_out_loss']:.3f}")
            parts += [self._rates(), f"{seen['tokens_per_second']:,.0f} tok/s"]
        parts += [f"{seen[name]:.0f} {name.replace('_', ' ')}" for name in EVENTS if name in seen]
        if self._bar is None and "loss" in seen:
            parts.append(f"{self._minutes_left():.1f} min left")
        return "  ".join(parts)

    def _rates(self) -> str:
        """The learning rate, followed by those of named parameter groups in brackets."""
        named = {k.removeprefix("lr_"): v for k, v in self._seen.items() if k.startswith("lr_")}
        listed = ", ".join(f"{name} {rate:.1e}" for name, rate in named.items())
        return f"lr {self._seen['lr']:.1e}" + (f" ({listed})" if listed else "")

    def _minutes_left(self) -> float:
        """Time left at the average speed so far, evaluations and checkpoints included."""
        done = self._seen["step"] - self._from
        left = self._seen["steps"] - self._seen["step"]
        return float((time.monotonic() - self._since) / max(done, 1) * left / 60)

    def _say(self, text: str) -> None:
        if text != self._said:  # an evaluation and a checkpoint of one step give the same line
            self._said = text
            line = f"[bold]{self._seen['method']}[/]  {escape(text)}"
            self._console.print(line, highlight=False, soft_wrap=True)


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


def preparation_state(done: ProgressReport, seconds: float, before: int) -> str:
    """Documents, tokens, and tokens/s since there were `before` tokens, `seconds` ago."""
    pace = f"  {(done.tokens - before) / seconds:,.0f} tok/s" if seconds > 0 else ""
    return f"{done.documents:,} documents  {done.tokens:,} tokens{pace}"


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
            console.print(line, markup=False, highlight=False, soft_wrap=True)

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
    parts = [f"{done} done", f"{len(status.running)} running", f"{len(status.waiting)} left"]
    parts += [f"{len(status.failed)} failed"] if status.failed else []
    seconds = status.seconds_left()
    parts += [f"{seconds / 60:.1f} min left"] if seconds else []
    return ", ".join(parts)


def _running(status: Status) -> Iterator[str]:
    for working in status.running.values():
        loss = "" if working.loss is None else f"  loss {working.loss:.3f}"
        yield f"running   {working.job.name}  {working.step}/{working.job.steps}{loss}"
    yield standing(status)
