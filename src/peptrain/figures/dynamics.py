"""Learning dynamics: ranks, condition numbers and norms of the matrices of runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from peptrain.figures.panel import (
    Drawn,
    Panel,
    engineering,
    label_lowest,
    panels,
    short,
    some_ticks,
    steps_label,
)
from peptrain.figures.source import (
    NotMeasured,
    Row,
    RunRows,
    Source,
    View,
    how_to_measure,
    left_out,
    listed,
    number,
)
from peptrain.figures.style import Look, imported, look, styled
from peptrain.ops.student import half_width
from peptrain.text import one_line

LEAST = {"layers": 1, "seeds": 2}
"""Runs of a group that has been measured."""
Points = dict[int, dict[int, float | None]]
"""By step and layer; None where a value is not finite."""
OV = "ov"
"""The module of W_O W_V. Only `analyze` measures it. Its rank is below min(n, m) with kv heads."""


def _log10(value: float) -> float:
    return math.log10(value) if value > 0 else math.nan


MEASURES: dict[str, tuple[str, str, Callable[[float], float]]] = {
    "per": ("PER", "effective rank / min(n, m)", float),
    "condition": ("log10 condition", "condition number over the structural rank", _log10),
    "frobenius": ("Frobenius norm", "Frobenius norm", float),
}
"""Axis, explanation and scale of the columns that are drawn."""


def rows_of(run: RunRows, what: str) -> list[Row]:
    """Return the rows of one `what`: those written in training, or else those of `analyze`.

    They are never mixed, because the former may measure fewer layers. OV circuits, of which the
    sums over heads are taken, are measured by `analyze` alone.
    """
    live = [row for row in run.of("dynamics") if row.get("what") == what]
    offline = [row for row in run.analysis if row.get("what") == what]
    circuits = [row for row in offline if row.get("module") == OV and row.get("head") == "sum"]
    return [*(live or [row for row in offline if row.get("module") != OV]), *circuits]


def measured(run: RunRows, what: str, column: str) -> dict[str, Points]:
    """Return the values of a column by module, step and layer; of OV circuits PER over the rank."""
    scale, found = MEASURES[column][2], dict[str, Points]()
    for row in rows_of(run, what):
        step, layer, module = row.get("step"), row.get("layer"), row.get("module")
        key = "per_rank" if (module, column) == (OV, "per") else column
        if type(step) is not int or type(layer) is not int or key not in row:
            continue
        value = number(row, key)
        scaled = None if value is None else scale(value)
        finite = scaled if scaled is not None and math.isfinite(scaled) else None
        found.setdefault(one_line(str(module)), {}).setdefault(step, {})[layer] = finite
    return found


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and half width of the 95 % interval, 0 for one value."""
    return statistics.fmean(values), half_width(values) or 0.0


def _nothing(column: str, what: str, source: Source) -> NotMeasured:
    names = listed(run.name for run in source.runs)
    known = dict.fromkeys(
        str(row.get("what")) for run in source.runs for row in (*run.of("dynamics"), *run.analysis)
    )
    repair = f"choose --what from {', '.join(known)}" if known else how_to_measure(source)
    return NotMeasured(f"{column}: not measured of {what} ({names}); {repair}")


def _each(column: str, over: str) -> Callable[[Source, View], Drawn]:
    def draw(source: Source, view: View) -> Drawn:
        every = {run.name: measured(run, view.what, column) for run in source.runs}
        found = {name: values for name, values in every.items() if values}
        if not found:
            raise _nothing(column, view.what, source)
        groups = {
            label: names
            for label, group in source.groups.items()
            if len(names := [run.name for run in group if run.name in found]) >= LEAST[over]
        }
        if not groups:
            raise NotMeasured(
                f"{column} of {view.what} over seeds: needs two runs that differ in their seed"
                f" alone ({listed(found)})"
            )
        modules = list(dict.fromkeys(m for of_run in found.values() for m in of_run))
        name, explained, _ = MEASURES[column]
        label = f"{name} of {view.what}"
        with styled():
            made, axes = panels(modules, 1.35, -(-len(groups) // 2), sharex=True, sharey=True)
            for ax, module in zip(axes, modules, strict=True):
                over_rank = (module, column) == (OV, "per")
                axis = f"{label} over the structural rank" if over_rank else label
                panel = made.panel(ax, module, "steps", axis)
                ax.set_title(short(module))
                for n, (group, names) in enumerate(groups.items()):
                    series = [(name, found[name].get(module, {})) for name in names]
                    _SERIES[over](panel, series, look(n), group)
            _ends(made, axes, label, groups, over)
        title = f"{label}, over {over}"
        caption = _caption(explained, over) + (OV_SHOWN if OV in modules else "")
        notes = left_out(source, found, view.what)
        return Drawn(title, caption, made.figure, made.numbers, notes)

    draw.__doc__ = f"{MEASURES[column][0]} over steps, with bands over {over}."
    return draw


def _layers(panel: Panel, series: Sequence[tuple[str, Points]], look: Look, group: str) -> None:
    """Draw the mean over layers of each run, with its interval as a filled band."""
    for name, points in series:
        whole = {s: [v for v in by.values() if v is not None] for s, by in sorted(points.items())}
        steps = [step for step, values in whole.items() if values]
        if not steps:
            continue
        ends = [_interval(whole[step]) for step in steps]
        means = [mean for mean, _ in ends]
        if any(half for _, half in ends):
            low, high = [m - h for m, h in ends], [m + h for m, h in ends]
            panel.band("95 % over layers", name, steps, low, high, look)
        panel.line("mean over layers", name, steps, means, look, marker=look.marker, ms=3)
        _hollow(panel, name, dict(zip(steps, means, strict=True)), [points], look)


def _hollow(
    panel: Panel, line: str, means: Mapping[int, float], runs: Sequence[Points], look: Look
) -> None:
    """Mark the means at whose step a run has a layer with a value that is not finite."""
    steps = [s for s in means if any(v is None for points in runs for v in points[s].values())]
    if steps:
        at = [means[step] for step in steps]
        panel.line("not finite in some layers", line, steps, at, look, ls="none", mfc="none",
                   marker="o", ms=6)  # fmt: skip


def _seeds(panel: Panel, series: Sequence[tuple[str, Points]], look: Look, group: str) -> None:
    """Draw the mean over seeds of the mean over layers, with its interval as dotted lines."""
    of_seed: list[dict[int, float]] = []
    for _, points in series:
        values = {s: [v for v in by.values() if v is not None] for s, by in points.items()}
        of_seed.append({s: statistics.fmean(v) for s, v in values.items() if v})
    steps = sorted(set.intersection(*map(set, of_seed)))
    if not steps:
        return
    ends = [_interval([seed[step] for seed in of_seed]) for step in steps]
    low, high = [m - h for m, h in ends], [m + h for m, h in ends]
    panel.outline("95 % over seeds", group, steps, low, high, look)
    means = [mean for mean, _ in ends]
    panel.line("mean over seeds", group, steps, means, look, ls=DASHED, marker=look.marker, ms=3)
    runs = [points for _, points in series]
    _hollow(panel, group, dict(zip(steps, means, strict=True)), runs, look)


_SERIES = {"layers": _layers, "seeds": _seeds}
DASHED = (0, (5, 2))
HOLLOW = " Hollow: in some layers the value is not finite, and the mean is that of the others."
OV_SHOWN = (
    " Panel ov: the sum over heads of W_O W_V as `peptrain analyze` measured it, PER and condition"
    " number over its structural rank."
)


def _caption(explained: str, over: str) -> str:
    first = explained[0].upper() + explained[1:]
    if over == "layers":
        return (
            f"{first}, one panel for each matrix. Solid lines and filled bands: mean and 95 %"
            " interval (Student's t) over the measured layers of one run, cut off where it is very"
            f" wide.{HOLLOW}"
        )
    return (
        f"{first}, one panel for each matrix. Dashed and dotted lines: mean and 95 % interval"
        " (Student's t) over seeds of the mean over layers, at the steps that every seed has."
        f"{HOLLOW}"
    )


def _ends(made: Any, axes: Sequence[Any], label: str, groups: Mapping[str, Any], over: str) -> None:
    made.figure.supylabel(label, fontsize=9)
    label_lowest(axes, "steps")
    axes[0].xaxis.set_major_locator(imported("matplotlib.ticker").MaxNLocator(4, integer=True))
    engineering(axes[0].xaxis)
    _fit(axes[0], made.numbers)
    styles = [look(n) for n in range(len(groups))]
    made.legend([(name, {"color": s.colour, "ls": DASHED if over == "seeds" else s.dash,
                         "marker": s.marker})
                 for name, s in zip(groups, styles, strict=True)])  # fmt: skip


def _fit(ax: Any, numbers: Sequence[Mapping[str, Any]]) -> None:
    """Cut off wide bands, as those of two layers are, where they would flatten the lines."""
    means = [row["y"] for row in numbers if "y" in row]
    ends = [row[end] for row in numbers for end in ("low", "high") if end in row]
    if not means:
        return
    low, high = min(means), max(means)
    span = (high - low) or abs(high) / 10 or 1.0
    bottom = max(min([low, *ends]), low - span)
    top = min(max([high, *ends]), high + span)
    ax.set_ylim(bottom - span / 20, top + span / 20)


per, condition, frobenius = (_each(column, "layers") for column in MEASURES)
per_seeds, condition_seeds, frobenius_seeds = (_each(column, "seeds") for column in MEASURES)


def layers(source: Source, view: View) -> Drawn:
    """PER of each layer over steps, of one run."""
    if len(source.runs) > 1:
        raise NotMeasured(
            f"layers: shows one run (got {len(source.runs)}); give one, such as"
            f" {source.runs[0].name}"
        )
    (run,) = source.runs
    found = measured(run, view.what, "per")
    values = [v for points in found.values() for by in points.values() for v in by.values()]
    known = [value for value in values if value is not None]
    if not known:
        raise _nothing("per", view.what, source)
    limits, label = (min(known), max(known)), f"PER of {view.what}"
    # The panels share their axes, and OV circuits are of other steps and layers.
    steps = sorted({step for points in found.values() for step in points})
    numbers = _numbers(by for points in found.values() for by in points.values())
    with styled():
        made, axes = panels(list(found), 1.45, 0, sharex=True, sharey=True)
        for ax, (module, points) in zip(axes, found.items(), strict=True):
            panel = made.panel(ax, module, "steps", "layer")
            cells = [[_or_nan(points.get(s, {}).get(layer)) for s in steps] for layer in numbers]
            image = panel.cells(label, run.name, steps, numbers, cells, limits)
            some_ticks(ax, steps, numbers)
            ax.set_title(short(module))
            ax.grid(False)
        made.figure.supylabel("layer", fontsize=9)
        label_lowest(axes, steps_label(steps))
        made.figure.colorbar(image, ax=axes, label=label, aspect=40, location="bottom")
    return Drawn(
        f"{label} in each layer: {run.name}",
        "Effective rank / min(n, m) of each layer (rows) at each measured step (columns, not to"
        " scale), one panel for each matrix. Empty: not measured or not finite."
        + (OV_SHOWN if OV in found else ""),
        made.figure, made.numbers, [],
    )  # fmt: skip


def _numbers(points: Iterable[Mapping[int, Any]]) -> list[int]:
    return sorted({layer for by_layer in points for layer in by_layer})


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
