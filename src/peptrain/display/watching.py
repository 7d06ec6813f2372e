"""What `peptrain watch` shows of a run: its settings, its last rows and the curve of its loss."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from peptrain.display.console import wrapped
from peptrain.display.curve import curve, has_blocks
from peptrain.display.terminal import Console
from peptrain.display.training import ITEM, clock, events, held_out, perplexity, rates

SIZES = ("hidden_size", "layers", "intermediate_size", "heads", "kv_heads")
TALLEST = 8
"""Lines of the curve."""
OTHERS = 4
"""Lines around it: the bar, an empty one, the title, and the cursor's."""
Row = Mapping[str, Any]


class RunView:
    """The state of a run, from its configuration and the rows that it has written so far."""

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self.name, self._config = name, config
        self.steps: int = config["train"]["steps"]
        self.forget()

    def forget(self) -> None:
        """Begin again, before all rows of a run that was resumed."""
        self._seen: dict[str, Any] = {}
        self._losses: list[float] = []
        self._times: list[tuple[int, float]] = []
        self._phases: list[tuple[int, int]] = []
        self._marks: dict[str, int] = {}
        self.last: Row | None = None
        """The row that ended the run."""

    def add(self, rows: Iterable[Row]) -> None:
        """Take new rows of metrics.jsonl."""
        for row in rows:
            event = row["event"]
            self.last = row if event in ("end", "diverged") else None
            if event == "step":
                self._losses.append(row["loss"])
                self._times.append((row["step"], row.get("time", 0.0)))
            elif event == "phase":
                self._phases.append((row["step"], row["phase"]))
            if event in ("step", "eval", "end"):
                self._seen |= row
            # The end is an evaluation too, the one whose loss is shown.
            self._marks["eval" if event == "end" else event] = row["step"]

    @property
    def step(self) -> int:
        """Steps done, as of the last row."""
        return int(self._times[-1][0]) if self._times else 0

    def seconds_left(self, since: float) -> float | None:
        """Estimate from the pace of the process that began at the Unix time `since`.

        The pace is that of its rows, so evaluations count. None if there is nothing to go by.
        """
        if not self._times or self.last is not None or self.step >= self.steps:
            return None
        step, now = self._times[-1]
        own = [(s, t) for s, t in self._times if t >= since]
        if len(own) > 1 and now > own[0][1]:
            pace = (now - own[0][1]) / (step - own[0][0])
        elif rate := self._seen.get("tokens_per_second"):
            pace = self._tokens_per_step / rate
        else:
            return None
        return max(0.0, pace * (self.steps - step) - (time.time() - now))

    def lines(self, standing: str, left: float | None) -> Iterator[str]:
        """Yield the state in lines. standing: whether the run is in progress. left: in seconds."""
        yield f"{self.name}: {standing}"
        yield "  ".join(self._settings())
        times = [] if left is None else [f"left {clock(math.ceil(left))}"]
        yield "  ".join([f"step {self.step:,} of {self.steps:,}", *times])
        yield "  ".join(self._numbers())
        yield "  ".join(self._events())

    def frame(self, console: Console, standing: str, left: float | None) -> RenderableType:
        """Return the state for a terminal, no wider and no taller than it."""
        width = console.width
        lines = [line for line in self.lines(standing, left) if line]
        texts = [Text(wrapped(line, width, whole=ITEM)) for line in lines]
        used = len(console.render_lines(Group(*texts)))
        height = min(TALLEST, console.height - used - OTHERS)
        bar = Table.grid()
        bar.add_row(ProgressBar(total=self.steps, completed=self.step, width=min(60, width - 2)))
        return Group(
            *texts[:3], bar, *texts[3:], *map(Text, self.curve(width, height, console.encoding))
        )

    def curve(self, width: int, height: int, encoding: str) -> list[str]:
        """Return the loss over the steps as lines, or nothing before the second row."""
        if len(self._losses) < 2 or height < 2:
            return []
        title = f"loss, steps {self._times[0][0]:,} to {self.step:,}"
        chart = curve(self._losses, min(width, 100), height, blocks=has_blocks(encoding))
        return ["", title, *chart]

    @property
    def _tokens_per_step(self) -> int:
        """Those of a fine-tuning are counted without padding, in its rows."""
        if self._fine_tuned:
            return int(self._seen.get("tokens", 0) / max(1, self.step))
        return int(self._config["train"]["batch_size"] * self._config["train"]["seq_len"])

    @property
    def _fine_tuned(self) -> bool:
        return bool(self._config.get("tune", {}).get("task"))

    def _settings(self) -> Iterator[str]:
        model, train = self._config["model"], self._config["train"]
        sizes = ", ".join(f"{k.replace('_', ' ')} {model[k]}" for k in SIZES if k in model)
        name = str(model.get("config") or model.get("preset") or "model")
        yield self._config["method"]["name"]
        yield f"{name} ({sizes})" if sizes else name
        if each := self._tokens_per_step:
            yield f"{self.steps * each:,} tokens"
            yield f"{each:,} a step"
        yield str(train.get("precision", ""))

    def _numbers(self) -> Iterator[str]:
        seen = self._seen
        if not self._losses:
            return
        yield f"loss {seen['loss']:.3f}"
        if "held_out_loss" in seen:
            if not self._fine_tuned:
                yield f"held-out loss {seen['held_out_loss']:.3f}"
            yield held_out(seen)
        elif not self._fine_tuned:
            yield f"perplexity {perplexity(seen['loss'])}"
        yield rates(seen)
        if "grad_norm" in seen:
            yield f"grad norm {seen['grad_norm']:.2f}"
        if "tokens_per_second" in seen:
            yield f"{seen['tokens_per_second']:,.0f} tokens/s"
        if "peak_bytes" in seen:
            yield f"peak memory {seen['peak_bytes'] / 2**30:.2f} GiB"

    def _events(self) -> Iterator[str]:
        yield from events(self._seen)
        yield from (f"phase {phase} since step {step:,}" for step, phase in self._phases[-1:])
        for event, words in (("eval", "evaluated"), ("checkpoint", "saved")):
            if (step := self._marks.get(event)) is not None:
                yield f"{words} at step {step:,}"
