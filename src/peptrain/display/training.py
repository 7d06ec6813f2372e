"""The progress of a training: a live display on a terminal, elsewhere a line for each row."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from peptrain.display.console import console, say, wrapped
from peptrain.display.curve import has_blocks, sparkline
from peptrain.text import one_line, quoted

EVENTS = {"merges": "merge", "exact_steps": "exact step"}
"""Counts reported by methods that are shown with the loss, and one of them in words."""
LONGEST_CURVE = 16
"""Characters of the loss and of the perplexity at the end of a run, so that both fit into a line of
80."""
RESULT = re.compile("(?!.*_(best|majority)_).*_(acc|f1|matthews|pearson|spearman)")
"""The names of the results of a fine-tuning."""
ITEM = r"\S+( \S+)*"
"""Words with one space between them."""
Row = Mapping[str, Any]


@contextmanager
def observing(observe: Callable[[Row], None]) -> Iterator[Callable[[Row], None]]:
    """Yield an observer of a training: the display, closed at the end, and `observe`."""
    progress = TrainingProgress(console)

    def both(row: Row) -> None:
        progress(row)
        observe(row)

    try:
        yield both
    finally:
        progress.close()


def count(number: float, one: str) -> str:
    """Return a number of things in words: 1 merge, 2 merges."""
    return f"{number:,.0f} {one}" + ("" if number == 1 else "s")


def clock(seconds: float) -> str:
    """Return a time as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class TimeLeft:
    """Time left of work in known units, at its average speed since it began."""

    def __init__(self, done: int) -> None:
        self._since, self._from = time.monotonic(), done
        self._at, self._left = self._since, 0.0

    def update(self, done: int, total: int) -> None:
        """Estimate from the units `done` of `total`."""
        self._at = time.monotonic()
        pace = (self._at - self._since) / max(1, done - self._from)
        self._left = pace * (total - done) if done > self._from else 0.0

    @property
    def elapsed(self) -> str:
        """The time since the beginning, in words."""
        return f"elapsed {clock(time.monotonic() - self._since)}"

    @property
    def words(self) -> list[str]:
        """The time left in words, rounded up, or nothing if there is none or it is unknown."""
        left = math.ceil(self._left - (time.monotonic() - self._at))
        return [f"left {clock(left)}"] if left > 0 else []


class TrainingProgress:
    """Observer of a training that shows steps, losses, rates, tokens/s, time elapsed and left."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._seen: dict[str, Any] = {}
        self._state = ""
        self._live: Live | None = None
        self._time = self._evaluation = TimeLeft(0)
        self._evaluated = ""
        self._losses: list[float] = []
        self._held_out: list[float] = []

    def __call__(self, row: Row) -> None:
        """Show a row."""
        event, was_evaluating = row["event"], bool(self._evaluated)
        self._seen |= row
        self._evaluated = ""
        for values, key in ((self._losses, "loss"), (self._held_out, "held_out_loss")):
            if key in row:
                values.append(row[key])
        if event == "start":
            self._start()
        elif event == "step":
            self._time.update(row["step"], self._seen["steps"])
            self._state = "  ".join(self._measured())
            if self._live is None:
                self._say("  ".join([self._step(), self._state, *self._times()]))
        elif event == "evaluating":
            self._evaluating(row, begins=not was_evaluating)
        elif event == "end":
            self.close()
            self._say_curves()
            seen = self._seen
            said = finished(row, quoted(seen["run"]), seen.get("form", "dense"))
            self._say(f"finished: {said}")
        elif event in NOTES:
            self._state = "  ".join(self._measured())
            self._say(f"step {row['step']:,}: {NOTES[event](self._seen)}")

    def close(self) -> None:
        """Remove the live display. Also called when training ends early."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _start(self) -> None:
        seen = self._seen
        run, step, steps = seen["run"], seen["step"], seen["steps"]
        self._time = TimeLeft(step)
        if step == steps:
            longer = f"; to train longer, `peptrain resume {quoted(run)} --train.steps N`"
            longer = "" if seen.get("task") else longer
            self._say(f"{run} is finished at step {step:,} of {steps:,} and only evaluated{longer}")
        else:
            at = f" from step {step}" if step else ""
            self._say(
                f"{run}: {trainable(seen)}, {count(steps, 'step')} of"
                f" {count(seen['tokens_per_step'], 'token')} in {seen['precision']}{at}"
            )
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(console=self._console, get_renderable=self._frame, transient=True)
            self._live.start()

    def _evaluating(self, row: Row, *, begins: bool) -> None:
        done, total = row["tokens_done"], row["tokens_total"]
        if begins:  # after its first forward pass
            self._evaluation = TimeLeft(done)
            if self._live is None and row["step"] == self._seen["steps"]:
                self._say(f"evaluating on all {count(total, self._unit)}")
        self._evaluation.update(done, total)
        self._evaluated = f"evaluating: {done:,} of {count(total, self._unit)}"

    @property
    def _unit(self) -> str:
        return "validation row" if self._seen.get("task") else "held-out token"

    def _say_curves(self) -> None:
        """Say how the losses of this process went, if there are at least two."""
        blocks, parts = has_blocks(self._console.encoding), []
        if len(self._losses) > 1:
            line = sparkline(self._losses, LONGEST_CURVE, blocks=blocks)
            parts.append(f"loss {self._losses[0]:.3f} {line} {self._losses[-1]:.3f}")
        if len(self._held_out) > 1:
            line = sparkline(self._held_out, LONGEST_CURVE, blocks=blocks)
            first, last = self._held_out[0], self._held_out[-1]
            if self._seen.get("task"):
                parts.append(f"validation loss {first:.3f} {line} {last:.3f}")
            else:
                parts.append(f"held-out perplexity {perplexity(first)} {line} {perplexity(last)}")
        if parts:
            self._say("  ".join(parts))

    def _frame(self) -> RenderableType:
        """Return the live display. It is drawn by another thread, whose clock goes on."""
        seen, line = self._seen, Table.grid(padding=(0, 2, 0, 0))
        begin, end = f"{seen['method']}  {self._step()}", "  ".join(self._times())
        room = self._console.width - len(begin) - len(end) - 6
        bar = ProgressBar(total=seen["steps"], completed=seen["step"], width=max(1, min(20, room)))
        line.add_row(*([begin, bar, end] if room > 0 else [f"{begin}  {end}"]))
        rest = [wrapped(self._state, self._console.width, whole=ITEM)]
        if evaluated := self._evaluated:
            rest.append("  ".join([evaluated, *self._evaluation.words]))
        return Group(line, *(Text(text) for text in rest if text))

    def _step(self) -> str:
        return f"step {self._seen['step']:,} of {self._seen['steps']:,}"

    def _times(self) -> list[str]:
        return [self._time.elapsed, *self._time.words]

    def _measured(self) -> Iterable[str]:
        seen = self._seen
        if "loss" not in seen:
            return
        yield f"loss {seen['loss']:.3f}"
        if "held_out_loss" in seen:
            yield held_out(seen)
        elif not seen.get("task"):
            yield f"perplexity {perplexity(seen['loss'])}"
        yield rates(seen)
        yield f"{seen['tokens_per_second']:,.0f} tokens/s"
        yield from events(seen)

    def _say(self, text: str) -> None:
        say(text, to=self._console, lead=f"{self._seen['method']}  ", style="bold")


def rates(row: Row) -> str:
    """Return the learning rate in words, followed by those of named parameter groups."""
    named = {k.removeprefix("lr_"): v for k, v in row.items() if k.startswith("lr_")}
    listed = ", ".join(f"{name} {rate:.1e}" for name, rate in named.items())
    return f"lr {row['lr']:.1e}" + (f" ({listed})" if listed else "")


def events(row: Row) -> list[str]:
    """Return the counts of a method's events in words, such as its merges."""
    return [count(row[name], one) for name, one in EVENTS.items() if name in row]


def trainable(row: Row) -> str:
    """Return the numbers of parameters in words."""
    trainable, total = (row[key] / 1e6 for key in ("trainable", "parameters"))
    return f"{trainable:.2f}M of {total:.2f}M parameters trainable"


def perplexity(loss: float) -> str:
    """Return the perplexity of a loss, written out."""
    value = math.exp(loss) if loss < 700 else math.inf
    return f"{value:,.2f}" if value < 1e6 else f"{value:.1e}"


def held_out(row: Row) -> str:
    """Return the held-out perplexity of an evaluation, or the results of a task, in words."""
    if "validation_rows" not in row:
        return f"held-out perplexity {perplexity(row['held_out_loss'])}"
    results = [f"{name} {row[name]:.4g}" for name in row if RESULT.fullmatch(name)
               and row[name] is not None]  # fmt: skip
    return ", ".join([f"validation loss {row['held_out_loss']:.4f}", *results])


def finished(row: Row, run: str, form: str = "dense") -> str:
    """Return the last row of a run in words, with what can be done next.

    form: that of an export of the run, dense where none need be named.
    """
    flag = "" if form == "dense" else f" --form {form}"
    if "validation_rows" not in row:
        return (
            f"{held_out(row)} (loss {row['held_out_loss']:.4f}); evaluate with"
            f" `peptrain eval {run}`, export with `peptrain export {run} --out DIR{flag}`"
        )
    best = f"; best at step {row['best_step']:,}" if "best_step" in row else ""
    step = f"@{row['best_step']}" if best and row["best_step"] != row["step"] else ""
    return f"{held_out(row)}{best}; export with `peptrain export {run}{step} --out DIR{flag}`"


NOTES: dict[str, Callable[[Row], str]] = {
    "phase": lambda row: f"{trainable(row)} from now on",
    "eval": lambda row: (
        held_out(row)
        if "validation_rows" in row
        else f"{held_out(row)} (loss {row['held_out_loss']:.3f})"
        f" over {count(row['held_out_tokens'], 'token')}"
    ),
    "checkpoint": lambda row: "checkpoint saved",
    "sample": lambda row: f"sample: {one_line(row['prompt'])}|{one_line(row['text'])}",
}
"""What is said of rows other than steps."""
