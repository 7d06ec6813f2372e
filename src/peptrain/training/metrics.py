"""Collect the metrics of a run as rows for metrics.jsonl and for an observer."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peptrain.distributed.world import World
from peptrain.errors import Diverged, Unsupported
from peptrain.eval.perplexity import Evaluation, Watch
from peptrain.loggers.sending import Loggers
from peptrain.runs.directory import RunDir

log = logging.getLogger("peptrain")

Observer = Callable[[Mapping[str, Any]], None]
"""Called on rank 0 with one row per event. Its "event" is start, step, eval, checkpoint, phase,
sample, end, diverged or the value of `train.observe`; start is not in metrics.jsonl. "evaluating"
is not either, and comes after each forward pass of an evaluation, with `tokens_done` and
`tokens_total`.
An observer cannot influence the training."""


MEASURED = (
    *("time", "seconds", "device_hours", "tokens_per_second", "peak_bytes"),
    *("observe_seconds", "tasks_seconds"),
)
"""Values of rows that depend on the machine and the moment. All others are those of an
uninterrupted run, bit for bit on a CPU, unless a signal or a lengthened run has put a row where
there was none."""

WARNING = "_warning"
"""How the name of a metric ends that is also logged if it is not zero."""


def silent(row: Mapping[str, Any]) -> None:
    """Ignore the row: the observer used by default."""


def _larger(a: Tensor | float, b: Tensor | float) -> Tensor | float:
    """Return the larger one, without waiting for the device of a tensor."""
    if isinstance(a, Tensor):
        return a.clamp(min=b)
    return b.clamp(min=a) if isinstance(b, Tensor) else max(a, b)


def throughput(tokens: int, seconds: float) -> float:
    """Return tokens per second, or 0 if no time has passed."""
    return tokens / seconds if seconds > 0 else 0.0


def _numbers(scalars: Iterable[Tensor]) -> list[float]:
    """Read scalars from the device in a single transfer."""
    given = list(scalars)
    return torch.stack(given).tolist() if given else []


@dataclass
class MetricsLog:
    """Collects the measurements of each step on the device and reads them only to write a row."""

    run: RunDir
    world: World
    observe: Observer
    tokens_per_step: int
    loggers: Loggers = field(default_factory=Loggers)
    _steps: list[tuple[int, Mapping[str, float], Tensor]] = field(default_factory=list)
    _norms: dict[int, Tensor] = field(default_factory=dict)
    _metrics: dict[str, Tensor | float] = field(default_factory=dict)
    _since: float = field(default_factory=lambda: time.perf_counter())
    _seconds: float = 0.0
    _device_hours: float = 0.0
    _observe_seconds: float = 0.0
    _peak_bytes: int = 0

    def continue_clocks(self) -> None:
        """Continue the sums from the last row that the run has, and the peak from its rows."""
        for row in self.run.metrics():
            self._seconds = row.get("seconds", self._seconds)
            self._device_hours = row.get("device_hours", self._device_hours)
            self._observe_seconds = row.get("observe_seconds", self._observe_seconds)
            self._peak_bytes = max(self._peak_bytes, row.get("peak_bytes", 0))

    def add(
        self,
        step: int,
        rates: Mapping[str, float],
        loss: Tensor,
        norm: Tensor | None,
        metrics: Mapping[str, Tensor | float],
    ) -> None:
        """Record step number `step` (the first is 1) without waiting for the device.

        rates: `learning_rates` of the optimizer. norm: the gradient norm, if it was computed.
        """
        self._steps.append((step, rates, loss))
        if norm is not None:
            self._norms[step] = norm
        if metrics is None:
            raise Unsupported("after_step: returned None; return the method's metrics, or {}")
        for name, value in metrics.items():
            known = name.endswith(WARNING) and name in self._metrics
            self._metrics[name] = _larger(self._metrics[name], value) if known else value

    def flush(self) -> None:
        """Write a row for the steps since the last one.

        It contains the mean loss, the throughput, the largest value of each metric that is a
        warning and the latest of everything else. Raises Diverged when a loss or gradient norm is
        not finite, and Unsupported when a metric of the method has the name of a built-in one.
        """
        if not self._steps:
            return
        steps, metrics = self._steps, {k: float(v) for k, v in self._metrics.items()}
        norms = dict(zip(self._norms, _numbers(self._norms.values()), strict=True))
        self._steps, self._metrics, self._norms = [], {}, {}
        losses = self.world.mean(torch.stack([loss for *_, loss in steps]).double()).tolist()
        seconds, tokens = self._clock(), len(steps) * self.tokens_per_step
        self._seconds += seconds
        self._device_hours += seconds * self.world.size / 3600
        for (step, rates, _), loss in zip(steps, losses, strict=True):
            norm = norms.get(step, 0.0)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                gradient = f" and the gradient norm {norm}" if step in norms else ""
                lr = rates["lr"]
                raise Diverged(
                    f"step {step}: the loss is {loss}{gradient} at a learning rate of {lr:.3g}"
                )
        step, rates, _ = steps[-1]
        newest = {"grad_norm": norms[max(norms)]} if norms else {}
        row = {
            "step": step,
            "loss": sum(losses) / len(losses),
            **rates,
            **newest,
            "tokens": step * self.tokens_per_step,
            "tokens_per_second": throughput(tokens, seconds),
        }
        if taken := sorted({"event", *MEASURED, *row} & metrics.keys()):
            raise Unsupported(
                f"after_step: {taken[0]!r} is the name of a built-in metric; use another name"
            )
        # JSON has no infinity, but a metric such as a condition number may be infinite.
        self.write(
            "step", **row, **{k: v if math.isfinite(v) else None for k, v in metrics.items()}
        )
        for name, value in metrics.items():
            if name.endswith(WARNING) and value:
                said = name.removesuffix(WARNING).replace("_", " ")
                log.warning("step %d: %g %s", step, value, said)

    def observation(
        self,
        event: str,
        step: int,
        measure: Callable[[float, float], Iterable[Mapping[str, Any]]],
    ) -> None:
        """Write the rows of `measure`, which gets the seconds of training and of observations."""
        begin = time.perf_counter()
        found = list(measure(self._seconds, self._observe_seconds))
        self._observe_seconds += time.perf_counter() - begin
        for row in found:
            self.write(event, step=step, **row)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Leave the time of the body out of the training time, between two rows too."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize(self.world.device)  # what is queued belongs to the training
        begin = time.perf_counter()
        yield
        self._since += time.perf_counter() - begin

    def evaluating(self, step: int) -> Watch:
        """Return a callback that tells the observer how far the evaluation at `step` is."""

        def watch(done: int, total: int) -> None:
            row = {"event": "evaluating", "step": step, "tokens_done": done, "tokens_total": total}
            if self.world.main:
                self.observe(row)

        return watch

    def evaluation(
        self, step: int, held_out: Evaluation, tasks: Mapping[str, float | None]
    ) -> None:
        """Write a row for an evaluation during training. tasks: the results of `eval.tasks`."""
        self.write("eval", step=step, **held_out.row(), **tasks)

    def end(self, step: int, held_out: Evaluation, **counts: float | None) -> None:
        """Write the last row: the evaluation on the full held-out set and `counts` of the run."""
        rate = self.median_throughput()
        self.write("end", step=step, **held_out.row(), tokens_per_second=rate, **counts)

    def median_throughput(self) -> float:
        """Return the median tokens per second of all rows, which a slow first one cannot shift."""
        steps = (row for row in self.run.metrics() if row["event"] == "step")
        rates = [row["tokens_per_second"] for row in steps if "tokens_per_second" in row]
        return statistics.median(rates) if rates else 0.0

    def write(self, event: str, **row: Any) -> None:
        """On rank 0, write one row to the file and pass it to the observer.

        Adds `time` (Unix, in seconds), `seconds` (of training up to this step, without evaluations,
        samples and checkpoints), `device_hours` (seconds times ranks / 3600), on a GPU `peak_bytes`
        (the most that PyTorch has reserved), and `observe_seconds`, which `train.observe` took
        besides. Seconds and hours are summed over resumes, and the peak is of all processes so far.
        They leave out what a kill took back.
        """
        if self.world.main:
            self.observe(self.record(event, **row))

    def record(self, event: str, **row: Any) -> dict[str, Any]:
        """Write one row to the file, and after that to the loggers. Return it."""
        row = {"event": event, **row, **self._measured()}
        self.run.record(row)
        self.loggers(row)
        return row

    def _measured(self) -> dict[str, float]:
        now = {"time": time.time(), "seconds": self._seconds, "device_hours": self._device_hours}
        if self.world.device.type == "cuda":
            now["peak_bytes"] = self.peak_bytes()
        if self._observe_seconds:
            now["observe_seconds"] = self._observe_seconds
        return now

    def peak_bytes(self) -> int:
        """Return the most memory that PyTorch has reserved on the GPU, 0 on a CPU."""
        if self.world.device.type == "cuda":
            here = torch.cuda.max_memory_reserved(self.world.device)
            self._peak_bytes = max(self._peak_bytes, here)
        return self._peak_bytes

    def pause(self) -> None:
        """Restart the clock after evaluation or saving, which do not count as training time."""
        self._clock()

    def _clock(self) -> float:
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        return seconds
