"""Curves over training: loss, learning rate, gradient norm, throughput and memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peptrain.figures.panel import Drawn, Panel, engineering, sheet, told_apart
from peptrain.figures.source import (
    EVENTS,
    LABELS,
    Axis,
    NotMeasured,
    RunRows,
    Source,
    View,
    curve,
    listed,
    loss_label,
    marks,
)
from peptrain.figures.style import Look, look, styled

TRAINING, HELD_OUT = ("step",), ("eval", "end")
SYMBOLS = {"merge": ("|", 5), "exact step": ("+", 5), "reset": ("x", 5), "phase": ("D", 3.5)}
MOST_ROWS = 12
"""Of the strip of events, and its groups with names."""
BEGINNING = 0.2
"""Share of a training that the range of the loss leaves out if it has enough rows."""
ENOUGH = 20


@dataclass(frozen=True)
class _Labelled:
    run: RunRows
    line: str
    """Name of its lines in the numbers."""
    look: Look


def _labelled(source: Source) -> list[_Labelled]:
    """Return each run with the look of its group."""
    groups = enumerate(source.groups.items())
    return [_Labelled(run, run.name, look(n)) for n, (_, group) in groups for run in group]


def _missing(x: Axis, source: Source) -> NotMeasured:
    names = listed(run.name for run in source.runs)
    if x == "flops" and not any(run.end for run in source.runs):
        return NotMeasured(
            f"--x flops: FLOPs are written at the end of a run, and none has ended ({names});"
            " take --x tokens"
        )
    if x != "steps" and any(run.of(*TRAINING, *HELD_OUT) for run in source.runs):
        return NotMeasured(f"--x {x}: no row tells it ({names}); take --x steps")
    return NotMeasured(f"loss: metrics.jsonl has no row with a loss yet ({names})")


def loss(source: Source, view: View) -> Drawn:
    """Training and held-out loss, learning rate and gradient norm over training."""
    runs, notes = _labelled(source), []
    held = [(r, *curve(r.run, HELD_OUT, "held_out_loss", view.x)) for r in runs]
    trained = [(r, *curve(r.run, TRAINING, "loss", view.x)) for r in runs]
    if not any(x for _, x, _ in (*held, *trained)):
        raise _missing(view.x, source)
    for (r, x, _), (_, other, _) in zip(held, trained, strict=True):
        if not x and not other:
            notes.append(f"{r.run.name}: no row with a loss over {LABELS[view.x]}")
    events = [(r, found) for r in runs if (found := marks(r.run, view.x))]
    rates = [(r, *curve(r.run, TRAINING, "lr", view.x)) for r in runs]
    norms = [(r, *curve(r.run, TRAINING, "grad_norm", view.x)) for r in runs]
    under = [("learning rate", rates), ("gradient norm", norms)]
    shown = [(name, lines) for name, lines in under if any(x for _, x, _ in lines)]
    strip = [0.2 + 0.1 * min(len(events), MOST_ROWS)] if events else []
    with styled():
        made, rows = sheet([2.5, *strip, *[0.95] * len(shown)], legend=_lines(source), sharex=True)
        axes = iter(row[0] for row in rows)
        panel = made.panel(next(axes), "loss", LABELS[view.x], loss_label(source))
        crowded = len(runs) > 4
        for r, x, y in trained:
            if x:
                panel.line("training", r.line, x, y, r.look, alpha=0.3 if crowded else 0.5, lw=0.8)
        for r, x, y in held:
            if x:
                marker = "" if len(x) > 40 else r.look.marker
                panel.line("held-out", r.line, x, y, r.look, marker=marker)
        panel.axes.set_ylabel(panel.y_axis)
        _fit(panel.axes, [*trained, *held])
        if events:
            _strip(made.panel(next(axes), "events", LABELS[view.x], "run"), events)
        for name, lines in shown:
            part = made.panel(next(axes), name, LABELS[view.x], name)
            for r, x, y in lines:
                if x:
                    part.line(name, r.line, x, y, r.look, lw=0.9)
            part.axes.set_ylabel(name.replace(" ", "\n"))
        happened = {event for _, found in events for event, _ in found}
        _finish(made, rows, source, view.x, [name for name in SYMBOLS if name in happened])
    return Drawn(_over("Loss", view.x), _loss_caption(events, view.x), made.figure, made.numbers,
                 notes)  # fmt: skip


def _over(what: str, x: Axis) -> str:
    return f"{what} over {LABELS[x].partition(' (')[0]}"


def _loss_caption(events: Sequence[Any], x: Axis) -> str:
    said = "Thin: training loss, mean of the steps of a row. With markers: held-out loss."
    if events:
        said += (
            " The strip shows merges, exact steps (of LORO), resets of moments and new phases, each"
            " at the first row after it."
        )
    if x == "flops":
        said += " FLOPs: tokens times the mean FLOPs per token of the whole run."
    if x == "time":
        said += " Time: of training steps, without evaluations and checkpoints."
    return said


def _fit(axes: Any, curves: Sequence[tuple[_Labelled, list[float], list[float]]]) -> None:
    """Leave the first fifth of a longer training out of the range of y, but not of the numbers."""
    end = max(max(x) for _, x, _ in curves if x)
    later = [v for _, xs, ys in curves for x, v in zip(xs, ys, strict=True) if x >= BEGINNING * end]
    if max(len(x) for _, x, _ in curves) < ENOUGH or not later:
        return
    low, high = min(later), max(later)
    if high > low:
        axes.set_ylim(low - 0.04 * (high - low), high + 0.06 * (high - low))


def _strip(panel: Panel, events: Sequence[tuple[_Labelled, list[tuple[str, float]]]]) -> None:
    for n, (r, found) in enumerate(events):
        for name in (*EVENTS.values(), "phase"):
            at = [x for event, x in found if event == name]
            if at:
                marker, size = SYMBOLS[name]
                panel.line(
                    name, r.line, at, [n] * len(at), r.look, ls="none", marker=marker, ms=size
                )
    panel.axes.set(ylim=(len(events) - 0.4, -0.6), yticks=[])
    panel.axes.set_ylabel("events", rotation=0, ha="right", va="center")
    panel.axes.grid(False)
    panel.axes.spines["left"].set_visible(False)


def _lines(source: Source, symbols: int = 0) -> int:
    """Return the lines of the legend."""
    names = told_apart(list(source.groups))
    columns = 1 if max(map(len, names)) > 26 else 2
    return -(-(len(names) + symbols) // columns)


def _finish(made: Any, rows: Any, source: Source, x: Axis, symbols: Sequence[str] = ()) -> None:
    """Label the shared x axis and put the legend."""
    last = rows[-1][0]
    last.set_xlabel(LABELS[x])
    engineering(last.xaxis)
    styles = [look(n) for n in range(len(source.groups))]
    lines = [(name, {"color": s.colour, "ls": s.dash, "marker": s.marker})
             for name, s in zip(source.groups, styles, strict=True)]  # fmt: skip
    signs = [(name, {"ls": "none", "marker": SYMBOLS[name][0]}) for name in symbols]
    made.legend([*lines, *signs])


def speed(source: Source, view: View) -> Drawn:
    """Tokens per second and the memory reserved by PyTorch, over training."""
    runs = _labelled(source)
    speeds = [(r, *curve(r.run, TRAINING, "tokens_per_second", view.x)) for r in runs]
    held = [(r, *curve(r.run, TRAINING, "peak_bytes", view.x)) for r in runs]
    held = [(r, x, [value / 2**30 for value in y]) for r, x, y in held]
    parts = [("tokens/s", "tokens per second", speeds), ("peak memory", "peak memory (GiB)", held)]
    shown = [part for part in parts if any(x for _, x, _ in part[2])]
    if not shown:
        raise _missing(view.x, source)
    lacking = [r.run.name for r, x, _ in held if not x]
    on_gpu = len(lacking) < len(runs)  # on a CPU there is nothing to miss
    notes = [f"{name}: no peak memory, which is known on a GPU only" for name in lacking if on_gpu]
    with styled():
        made, rows = sheet([1.7] * len(shown), legend=_lines(source), sharex=True)
        for (axes,), (name, label, found) in zip(rows, shown, strict=True):
            panel = made.panel(axes, name, LABELS[view.x], label)
            for r, x, y in found:
                if x:
                    panel.line(name, r.line, x, y, r.look, lw=1.0)
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            if name == "tokens/s":
                engineering(axes.yaxis)
        _finish(made, rows, source, view.x)
    return Drawn(
        _over("Throughput and memory" if on_gpu else "Throughput", view.x),
        "Tokens per second between two rows, without evaluations and checkpoints."
        + (" Peak memory: the most that PyTorch had reserved since the process started."
           if on_gpu else ""),
        made.figure, made.numbers, notes,
    )  # fmt: skip
