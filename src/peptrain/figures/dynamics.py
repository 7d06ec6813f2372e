"""Learning dynamics: ranks, condition numbers, norms and spectra of the matrices of runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from peptrain.display.terminal import one_line
from peptrain.figures.panel import Drawn, Panel, engineering, plain, sheet
from peptrain.figures.source import NotMeasured, Row, RunRows, Source, View, number
from peptrain.figures.style import Look, imported, look, styled
from peptrain.ops.student import half_width

BIN = 0.05
"""Width of the bins of a spectrum, that of ReLoRA's Figure 3."""
MOST_BINS = 400
LEAST = {"layers": 1, "seeds": 2}
"""Runs of a group that has been measured."""
Points = dict[int, dict[int, float | None]]
"""By step and layer; None where a value is not finite."""


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

    They are never mixed, because the former may measure fewer layers. OV circuits are left out.
    """
    live = [row for row in run.of("dynamics") if row.get("what") == what]
    offline = [r for r in run.analysis if r.get("what") == what and r.get("module") != "ov"]
    return live or offline


def measured(run: RunRows, what: str, column: str) -> dict[str, Points]:
    """Return the values of a column by module, step and layer."""
    scale, found = MEASURES[column][2], dict[str, Points]()
    for row in rows_of(run, what):
        step, layer, module = row.get("step"), row.get("layer"), row.get("module")
        if type(step) is not int or type(layer) is not int or column not in row:
            continue
        value = number(row, column)
        scaled = None if value is None else scale(value)
        finite = scaled if scaled is not None and math.isfinite(scaled) else None
        found.setdefault(one_line(str(module)), {}).setdefault(step, {})[layer] = finite
    return found


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Return mean and half width of the 95 % interval, 0 for one value."""
    return statistics.fmean(values), half_width(values) or 0.0


def _short(module: str) -> str:
    """self_attn.q_proj -> q, mlp.down_proj -> down."""
    return module.rpartition(".")[2].removesuffix("_proj")


def _grid(
    modules: Sequence[str], height: float, legend: int, **given: Any
) -> tuple[Any, list[Any]]:
    """Return a Sheet with two columns of axes, one for each module, as many as there are."""
    columns = min(2, len(modules))
    rows = -(-len(modules) // columns)
    made, axes = sheet([height] * rows, columns=columns, legend=legend, **given)
    flat = [ax for row in axes for ax in row]
    for spare in flat[len(modules) :]:
        spare.set_visible(False)
    return made, flat[: len(modules)]


def _lowest(axes: Sequence[Any], label: str) -> None:
    """Label the x axis of the lowest panel of each column, where the others share it."""
    for ax in axes[-2:]:
        ax.set_xlabel(label)
        ax.tick_params(labelbottom=True)


def _nothing(column: str, what: str, source: Source) -> NotMeasured:
    names = ", ".join(run.name for run in source.runs) or "no run"
    known = dict.fromkeys(
        str(row.get("what")) for run in source.runs for row in (*run.of("dynamics"), *run.analysis)
    )
    repair = f"choose --what from {', '.join(known)}" if known else (
        "train with --train.observe dynamics, or run `peptrain analyze RUN`"
    )  # fmt: skip
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
                f" alone ({', '.join(found)})"
            )
        modules = list(dict.fromkeys(m for of_run in found.values() for m in of_run))
        label, explained, _ = MEASURES[column]
        with styled():
            made, axes = _grid(modules, 1.35, -(-len(groups) // 2), sharex=True, sharey=True)
            for ax, module in zip(axes, modules, strict=True):
                panel = made.panel(ax, module, "steps", label)
                ax.set_title(_short(module))
                for n, (group, names) in enumerate(groups.items()):
                    series = [(name, found[name].get(module, {})) for name in names]
                    _SERIES[over](panel, series, look(n), group)
            _ends(made, axes, label, groups)
        title = f"{label} of {view.what}, over {over}"
        return Drawn(title, _caption(explained, over), made.figure, made.numbers)

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
        hollow = [s for s in steps if any(v is None for v in points[s].values())]
        if hollow:
            at = [statistics.fmean(whole[s]) for s in hollow]
            panel.line("not finite in some layers", name, hollow, at, look, ls="none", mfc="none",
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
    panel.line("mean over seeds", group, steps, [m for m, _ in ends], look, ls=(0, (5, 2)))


_SERIES = {"layers": _layers, "seeds": _seeds}


def _caption(explained: str, over: str) -> str:
    first = explained[0].upper() + explained[1:]
    if over == "layers":
        return (
            f"{first}, one panel for each matrix. Solid lines and filled bands: mean and 95 %"
            " interval (Student's t) over the measured layers of one run, cut off where it is very"
            " wide. Hollow: in some layers the value is not finite, and the mean is that of the"
            " others."
        )
    return (
        f"{first}, one panel for each matrix. Dashed and dotted lines: mean and 95 % interval"
        " (Student's t) over seeds of the mean over layers, at the steps that every seed has."
    )


def _ends(made: Any, axes: Sequence[Any], label: str, groups: Mapping[str, Any]) -> None:
    made.figure.supylabel(label, fontsize=9)
    _lowest(axes, "steps")
    axes[0].xaxis.set_major_locator(imported("matplotlib.ticker").MaxNLocator(4, integer=True))
    engineering(axes[0].xaxis)
    _fit(axes[0], made.numbers)
    styles = [look(n) for n in range(len(groups))]
    made.legend([(name, {"color": s.colour, "ls": s.dash, "marker": s.marker})
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
    limits = min(known), max(known)
    with styled():
        made, axes = _grid(list(found), 1.45, 0, sharex=True, sharey=True)
        for ax, (module, points) in zip(axes, found.items(), strict=True):
            panel = made.panel(ax, module, "steps", "layer")
            steps, numbers = sorted(points), _numbers(points.values())
            cells = [[_or_nan(points[s].get(layer)) for s in steps] for layer in numbers]
            image = panel.cells("PER", run.name, steps, numbers, cells, limits)
            _ticks(ax, steps, numbers)
            ax.set_title(_short(module))
            ax.grid(False)
        made.figure.supylabel("layer", fontsize=9)
        _lowest(axes, "steps")
        made.figure.colorbar(image, ax=axes, label="PER", aspect=40, location="bottom")
    return Drawn(
        f"PER of {view.what} in each layer: {run.name}",
        "Effective rank / min(n, m) of each layer (rows) at each measured step (columns, not to"
        " scale), one panel for each matrix. Empty: not measured or not finite.",
        made.figure, made.numbers, [],
    )  # fmt: skip


def _numbers(points: Iterable[Mapping[int, Any]]) -> list[int]:
    return sorted({layer for by_layer in points for layer in by_layer})


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _ticks(ax: Any, steps: Sequence[int], numbers: Sequence[int]) -> None:
    """Name a few columns and rows."""
    places = range(0, len(steps), max(1, -(-len(steps) // 4)))
    ax.set_xticks(list(places), [f"{steps[place]:,}" for place in places])
    rows = range(0, len(numbers), max(1, -(-len(numbers) // 6)))
    ax.set_yticks(list(rows), [str(numbers[row]) for row in rows])


def spectra(source: Source, view: View) -> Drawn:
    """Histogram of singular values of the last analyzed step."""
    found = {run.name: sigmas for run in source.runs if (sigmas := _sigmas(run, view.what))}
    modules = list(dict.fromkeys(m for of_run in found.values() for m in of_run))
    if not modules:
        known = dict.fromkeys(str(row.get("what")) for run in source.runs for row in run.spectra)
        names = ", ".join(run.name for run in source.runs) or "no run"
        repair = f"choose --what from {', '.join(known)}" if known else "run `peptrain analyze RUN`"
        raise NotMeasured(f"spectra: no singular values of {view.what} ({names}); {repair}")
    with styled():
        made, axes = _grid(modules, 1.35, -(-len(found) // 2))
        for ax, module in zip(axes, modules, strict=True):
            panel = made.panel(ax, module, "singular value", "number of singular values")
            every = [s for of_run in found.values() for s in of_run.get(module, ())]
            width = BIN * max(1, math.ceil(max(every) / BIN / MOST_BINS))
            bins = math.floor(max(every) / width) + 1
            edges = [round(width * n, 10) for n in range(bins + 1)]
            for n, (name, of_run) in enumerate(found.items()):
                if module in of_run:
                    panel.stairs(
                        "count", name, edges, _counts(of_run[module], width, bins), look(n)
                    )
            ax.set_title(_short(module))
            ax.set_yscale("symlog", linthresh=1)
            ax.set_ylim(bottom=0)
            plain(ax.yaxis)
        made.figure.supylabel("number", fontsize=9)
        _lowest(axes, "singular value")
        made.legend([(name, {"color": look(n).colour, "ls": look(n).dash})
                     for n, name in enumerate(found)])  # fmt: skip
    steps = {run.name: _step(run) for run in source.runs if run.name in found}
    said = ", ".join(f"{name} at step {step}" for name, step in steps.items())
    return Drawn(
        f"Singular values of {view.what}",
        f"Number of singular values in bins of {BIN} (wider for very large values), of all layers"
        f" together, one panel for each matrix: {said}.",
        made.figure, made.numbers, [],
    )  # fmt: skip


def _step(run: RunRows) -> int | None:
    return max((row["step"] for row in run.spectra if type(row.get("step")) is int), default=None)


def _sigmas(run: RunRows, what: str) -> dict[str, list[float]]:
    """Return the singular values of the last step by module."""
    found: dict[str, list[float]] = {}
    for row in run.spectra:
        if row.get("what") == what and row.get("module") != "ov":
            given = [float(s) for s in str(row.get("sigma", "")).split()]
            finite = [sigma for sigma in given if math.isfinite(sigma) and sigma >= 0]
            found.setdefault(one_line(str(row.get("module"))), []).extend(finite)
    return {module: values for module, values in found.items() if values}


def _counts(values: Sequence[float], width: float, bins: int) -> list[int]:
    counts = [0] * bins
    for value in values:
        counts[min(math.floor(value / width), bins - 1)] += 1
    return counts
