"""Figures of a comparison: loss over learning rates, and what a loss costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from peptrain.figures.panel import Drawn, engineering, plain, sheet
from peptrain.figures.source import NotMeasured, Row, Source, View, loss_label, number
from peptrain.figures.style import look, styled
from peptrain.text import one_line

PLACES = {
    "": "inside the rates tried",
    "lowest": "at the lowest rate tried: a better one may lie below",
    "highest": "at the highest rate tried: a better one may lie above",
    "only": "one rate tried: not tuned",
}
LOSS = "held-out loss"


def _trials(source: Source) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in source.trials:
        found.setdefault(_label(row, "configuration"), []).append(row)
    return found


def _label(row: Row, key: str) -> str:
    return one_line(str(row.get(key)))


def _nothing(source: Source) -> NotMeasured:
    if not source.trials:
        return NotMeasured("this figure is of a comparison; give a directory of `peptrain compare`")
    return NotMeasured("no run of the comparison has finished yet")


def rates(source: Source, view: View) -> Drawn:
    """Held-out loss over the learning rate, a line for each configuration."""
    lines = {_label(line, "label"): line for line in source.lines}
    made_of = {
        name: by_rate for name, rows in _trials(source).items() if (by_rate := _by_rate(rows))
    }
    if not made_of:
        raise _nothing(source)
    diverged = [f"{row.get('run')}: diverged" for row in source.trials
                if row.get("state") == "diverged"]  # fmt: skip
    with styled():
        made, rows = sheet([2.8], legend=len(made_of))
        loss = loss_label(source, LOSS)
        panel = made.panel(rows[0][0], "loss over learning rate", "learning rate", loss)
        handles, notes = [], diverged
        for n, (name, by_rate) in enumerate(made_of.items()):
            style, place = look(n), str(lines.get(name, {}).get("place", ""))
            xs = [lr for lr, losses in by_rate.items() for _ in losses]
            ys = [loss for losses in by_rate.values() for loss in losses]
            panel.line("one seed", name, xs, ys, style, ls="none", marker=".", alpha=0.6, ms=5)
            means = [statistics.fmean(losses) for losses in by_rate.values()]
            panel.line("mean over seeds", name, list(by_rate), means, style, marker=style.marker)
            best = number(lines.get(name, {}), "lr")
            if best in by_rate:
                at = statistics.fmean(by_rate[best])
                panel.line("best", name, [best], [at], style, ls="none", marker="o", ms=9,
                           mfc="none")  # fmt: skip
                notes.append(f"{name}: best at {best:g}, {PLACES.get(place, place)}")
            handles.append((name, {"color": style.colour, "ls": style.dash,
                                   "marker": style.marker}))  # fmt: skip
        panel.axes.set(xscale="log", xlabel="learning rate", ylabel=loss)
        _rates_as_ticks(panel.axes, sorted({lr for by_rate in made_of.values() for lr in by_rate}))
        made.legend(handles)
    return Drawn(
        "Held-out loss over the learning rate",
        "Lines: mean over seeds. Dots: each seed. Circle: the best rate of those whose seeds all"
        " finished. At the edge of the rates tried a better one may lie beyond.",
        made.figure, made.numbers, notes,
    )  # fmt: skip


def _rates_as_ticks(axes: Any, tried: Sequence[float]) -> None:
    """Put the ticks at the rates that were tried, where they are not too many. One that is near
    the last with a text has none, which would overlap."""
    plain(axes.xaxis)
    if len(tried) > 8:
        return
    near = math.log(tried[-1] / tried[0]) / 8
    texts, last = [f"{tried[0]:g}"], tried[0]
    for lr in tried[1:]:
        apart = math.log(lr / last) >= near
        texts.append(f"{lr:g}" if apart else "")
        last = lr if apart else last
    axes.set_xticks(tried, texts)


def _by_rate(rows: Sequence[Row]) -> dict[float, list[float]]:
    """Return the held-out losses of finished runs by learning rate, ascending."""
    found: dict[float, list[float]] = {}
    for row in rows:
        lr, loss = number(row, "lr"), number(row, "held_out_loss")
        if lr is not None and lr > 0 and loss is not None and row.get("state") == "finished":
            found.setdefault(lr, []).append(loss)
    return dict(sorted(found.items()))


COSTS = (
    ("trainable", "trainable parameters"),
    ("state_bytes", "bytes of optimizer state"),
    ("peak_bytes", "peak bytes on the GPU"),
    ("seconds", "seconds of training"),
)


def frontier(source: Source, view: View) -> Drawn:
    """Held-out loss over trainable parameters, bytes and seconds, each at its best rate."""
    points = {
        _label(line, "label"): [
            row
            for row in _trials(source).get(_label(line, "label"), [])
            if row.get("state") == "finished" and row.get("lr") == line.get("lr")
        ]
        for line in source.lines
    }
    points = {name: rows for name, rows in points.items() if _values(rows, "held_out_loss")}
    if not points:
        raise _nothing(source)
    # At equal time the seconds say only which runs shared a device.
    told = COSTS[:-1] if source.about.get("equal") == "time" else COSTS
    shown = [cost for cost in told if all(_values(rows, cost[0]) for rows in points.values())]
    if not shown:
        raise NotMeasured("frontier: the rows of the runs have neither parameters nor bytes")
    notes = [
        f"{label}: not known of every configuration"
        for key, label in told
        # On a CPU none has a peak.
        if (key, label) not in shown
        and (key != "peak_bytes" or any(_values(rows, key) for rows in points.values()))
    ]
    with styled():
        made, rows = sheet([1.9] * len(shown), legend=len(points))
        for (axes,), (key, label) in zip(rows, shown, strict=True):
            panel = made.panel(axes, label, label, loss_label(source, LOSS))
            ends = []
            for n, (name, of_line) in enumerate(points.items()):
                losses = _values(of_line, "held_out_loss")
                x = statistics.fmean(_values(of_line, key))
                panel.over_seeds(name, [(x, losses)], look(n), ls="none", ms=6)
                ends.append((x, statistics.fmean(losses)))
            best = _frontier(ends)
            panel.line("frontier", "", [x for x, _ in best], [y for _, y in best], look(5),
                       drawstyle="steps-post", lw=0.8, marker="", zorder=1)  # fmt: skip
            axes.set(xlabel=label, ylabel="held-out loss")
            engineering(axes.xaxis)
        made.legend(
            [(name, {"color": look(n).colour, "ls": "none", "marker": look(n).marker})
             for n, name in enumerate(points)]
        )  # fmt: skip
    return Drawn(
        "Held-out loss over what it costs",
        "Each configuration at its best learning rate: mean over seeds. Dots: each of two seeds."
        " Bars: its 95 % interval (Student's t) where there are more. The thin line joins the"
        " configurations that no other beats in both directions.",
        made.figure, made.numbers, notes,
    )  # fmt: skip


def _values(rows: Sequence[Row], key: str) -> list[float]:
    return [value for row in rows if (value := number(row, key)) is not None]


def _frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other one beats in both cost and loss, ascending in cost."""
    best, found = math.inf, []
    for x, y in sorted(points):
        if y < best:
            best = y
            found.append((x, y))
    return found
