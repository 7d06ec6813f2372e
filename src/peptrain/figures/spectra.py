"""Singular values of the matrices of runs: histograms, small ones, and all over training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peptrain.figures.panel import (
    Drawn,
    Sheet,
    label_lowest,
    panels,
    plain,
    sheet,
    short,
    some_ticks,
    steps_label,
)
from peptrain.figures.source import (
    NotMeasured,
    RunRows,
    Source,
    View,
    how_to_measure,
    left_out,
    listed,
)
from peptrain.figures.style import look, styled
from peptrain.text import one_line

BIN = 0.05
"""Width of the bins of a spectrum, that of ReLoRA's Figure 3."""
MOST_BINS = 400
THRESHOLD = 0.1
"""Of a small singular value, that of ReLoRA's Figures 4 and 12."""
IN_HISTOGRAM = ("q", "k", "v", "down")
IN_BARS = ("q", "k", "v", "up", "down")
"""The matrices that ReLoRA's Figures 3 and 4 show."""
NUMBER = "number of singular values"
LEARNED = ("from_warm", "from_start")
"""What a figure of the learned update shows where nothing is chosen."""
Spectrum = dict[str, list[float]]
"""Singular values of all layers by matrix."""


def last_step(run: RunRows) -> int | None:
    """Return the last step whose singular values are known."""
    return max((row["step"] for row in run.spectra if type(row.get("step")) is int), default=None)


def _sigma(row: Mapping[str, Any]) -> list[float]:
    given = [float(s) for s in str(row.get("sigma", "")).split()]
    return [sigma for sigma in given if math.isfinite(sigma) and sigma >= 0]


def _sigmas(run: RunRows, what: str) -> Spectrum:
    """Return the singular values of the last step by module."""
    found, step = Spectrum(), last_step(run)
    for row in run.spectra:
        if row.get("what") == what and row.get("module") != "ov" and row.get("step") == step:
            found.setdefault(one_line(str(row.get("module"))), []).extend(_sigma(row))
    return {module: values for module, values in found.items() if values}


def _nothing(figure: str, what: str, source: Source) -> NotMeasured:
    known = dict.fromkeys(str(row.get("what")) for run in source.runs for row in run.spectra)
    if " or " in what:  # of what was learned; weights are none of that, and the default of --what
        known.pop("weight", None)
    names = listed(run.name for run in source.runs)
    analyze = how_to_measure(source, in_training=False)
    repair = f"choose --what from {', '.join(known)}" if known else analyze
    return NotMeasured(f"{figure}: no singular values of {what} ({names}); {repair}")


def spectra(source: Source, view: View) -> Drawn:
    """Histogram of singular values of the last analyzed step, a line for each run."""
    found = {run.name: sigmas for run in source.runs if (sigmas := _sigmas(run, view.what))}
    if not found:
        raise _nothing("spectra", view.what, source)
    modules = list(dict.fromkeys(m for of_run in found.values() for m in of_run))
    with styled():
        one_each = {name: [of_run] for name, of_run in found.items()}
        made = _histograms(one_each, modules, view.what)
    steps = {run.name: last_step(run) for run in source.runs if run.name in found}
    said = ", ".join(f"{name} at step {step}" for name, step in steps.items())
    return Drawn(
        f"Singular values of {view.what}",
        f"Number of singular values in bins of {BIN} (wider for very large values), of all layers"
        f" together, one panel for each matrix: {said}.",
        made.figure, made.numbers, left_out(source, found, view.what),
    )  # fmt: skip


def _histograms(
    found: Mapping[str, Sequence[Spectrum]], modules: Sequence[str], what: str
) -> Sheet:
    """Draw a panel for each module with a line for each name, the mean over its spectra."""
    made: Sheet
    made, axes = panels(modules, 1.35, -(-len(found) // 2))
    for ax, module in zip(axes, modules, strict=True):
        panel = made.panel(ax, module, "singular value", f"{NUMBER} of {what}")
        most = max(s for several in found.values() for one in several for s in one.get(module, [0]))
        width = BIN * max(1, math.ceil(most / BIN / MOST_BINS))
        bins = math.floor(most / width) + 1
        edges = [round(width * n, 10) for n in range(bins + 1)]
        for n, (name, several) in enumerate(found.items()):
            each = [_counts(one[module], width, bins) for one in several if module in one]
            if each:
                counts = [statistics.fmean(of_bin) for of_bin in zip(*each, strict=True)]
                panel.stairs("count", name, edges, counts, look(n))
        ax.set_title(short(module))
        ax.set_yscale("symlog", linthresh=1)
        ax.set_ylim(bottom=0)
        plain(ax.yaxis)
    made.figure.supylabel(f"number ({what})", fontsize=9)
    label_lowest(axes, "singular value")
    made.legend([(name, {"color": look(n).colour, "ls": look(n).dash})
                 for n, name in enumerate(found)])  # fmt: skip
    return made


def _counts(values: Sequence[float], width: float, bins: int) -> list[int]:
    counts = [0] * bins
    for value in values:
        counts[min(math.floor(value / width), bins - 1)] += 1
    return counts


@dataclass(frozen=True)
class _Learned:
    """Spectra of what each group of runs has learned."""

    what: str
    spectra: Mapping[str, Sequence[Spectrum]]
    """Of each run of a group, with the names of IN_BARS and others instead of modules."""
    notes: Sequence[str]

    def said(self) -> str:
        return {"from_warm": "W_T - W_warm", "from_start": "W_T - W_0"}.get(self.what, self.what)


def _learned(figure: str, source: Source, view: View, matrices: Sequence[str]) -> _Learned:
    """Return spectra of one kind for all groups: the kind asked for, or the learned update.

    Where some runs have no warm start, that is the change since step 0 if all have it.
    """
    by_kind = {
        kind: {run.name: one for run in source.runs if (one := _sigmas(run, kind))}
        for kind in (LEARNED if view.what == "weight" else (view.what,))
    }
    whole = (kind for kind, found in by_kind.items() if len(found) == len(source.runs))
    part = (kind for kind, found in by_kind.items() if found)
    what = next(whole, None) or next(part, None)
    if not source.runs or what is None:
        raise _nothing(figure, " or ".join(by_kind), source)
    named = {
        name: {short(module): sigmas for module, sigmas in one.items()}
        for name, one in by_kind[what].items()
    }
    groups = {
        label: of_group
        for label, group in source.groups.items()
        if (of_group := [named[run.name] for run in group if run.name in named])
    }
    if not any(
        name in one for of_group in groups.values() for one in of_group for name in matrices
    ):
        others = ", ".join(dict.fromkeys(m for one in named.values() for m in one))
        raise NotMeasured(f"{figure}: shows {', '.join(matrices)}, and the runs have {others}; take"
                          " --figure spectra")  # fmt: skip
    lacking = [run.name for run in source.runs if run.name not in named]
    return _Learned(what, groups, [f"{name}: no singular values of {what}" for name in lacking])


def singular_histogram(source: Source, view: View) -> Drawn:
    """ReLoRA's Figure 3: histogram of the singular values of the learned update."""
    learned = _learned("singular-histogram", source, view, IN_HISTOGRAM)
    every = [one for of_group in learned.spectra.values() for one in of_group]
    shown = [name for name in IN_HISTOGRAM if any(name in one for one in every)]
    with styled():
        made = _histograms(learned.spectra, shown, learned.said())
    return Drawn(
        f"Singular values of {learned.said()}",
        f"Number of singular values in bins of {BIN} (wider for very large values), of all layers"
        " together, at the last analyzed step; the mean over seeds where there are several.",
        made.figure, made.numbers, learned.notes,
    )  # fmt: skip


def small_singular(source: Source, view: View) -> Drawn:
    """ReLoRA's Figure 4: how many singular values of the learned update are above and below 0.1."""
    learned = _learned("small-singular", source, view, IN_BARS)
    groups = learned.spectra
    shown = [m for m in IN_BARS if any(m in one for several in groups.values() for one in several)]
    width = 0.8 / len(groups)
    with styled():
        made, axes = sheet([1.7, 1.7], legend=-(-len(groups) // 2), sharex=True)
        for (ax,), side in zip(axes, ("above", "below"), strict=True):
            panel = made.panel(ax, f"{side} {THRESHOLD}", "matrix", f"{NUMBER} of {learned.said()}")
            for n, (name, several) in enumerate(groups.items()):
                for place, matrix in enumerate(shown):
                    counts = [
                        sum((sigma > THRESHOLD) == (side == "above") for sigma in one[matrix])
                        for one in several if matrix in one
                    ]  # fmt: skip
                    if counts:
                        at = place + (n - (len(groups) - 1) / 2) * width
                        height = statistics.fmean(counts)
                        panel.bars(matrix, name, [at], [height], look(n), width)
            ax.set(title=f"{side} {THRESHOLD}", ylabel=f"number ({learned.said()})")
            ax.set_xticks(range(len(shown)), shown)
            ax.grid(visible=False, axis="x")
        made.legend([(name, {"color": look(n).colour, "lw": 5}) for n, name in enumerate(groups)])
    return Drawn(
        f"Singular values of {learned.said()} above and below {THRESHOLD}",
        f"Number of singular values above {THRESHOLD} and not above it, of all layers together, at"
        " the last analyzed step; the mean over seeds where there are several. Both are shown, as"
        " the captions of ReLoRA's figures disagree which of the two they count.",
        made.figure, made.numbers, learned.notes,
    )  # fmt: skip


def spectrum_heatmap(source: Source, view: View) -> Drawn:
    """LORO's Figures 14 and 15: all singular values of one run over training."""
    if len(source.runs) > 1:
        raise NotMeasured(
            f"spectrum-heatmap: shows one run (got {len(source.runs)}); give one, such as"
            f" {source.runs[0].name}"
        )
    found = _over_steps(source.runs[0], view.what) if source.runs else {}
    known = [v for by_step in found.values() for logs in by_step.values() for v in logs]
    if not known:
        raise _nothing("spectrum-heatmap", view.what, source)
    (run,) = source.runs
    label = f"log10 sigma of {view.what}"
    steps = sorted({step for every in found.values() for step in every})
    with styled():
        made, axes = panels(list(found), 1.45, 0, sharex=True)
        for ax, (module, by_step) in zip(axes, found.items(), strict=True):
            panel = made.panel(ax, module, "steps", "index of the singular value")
            indices = range(1, max(map(len, by_step.values())) + 1)
            cells = [
                [logs[i - 1] if i <= len(logs := by_step.get(step, [])) else math.nan
                 for step in steps]
                for i in indices
            ]  # fmt: skip
            image = panel.cells(label, run.name, steps, indices, cells, (min(known), max(known)))
            some_ticks(ax, steps, indices)
            ax.set_title(short(module))
            ax.grid(False)
        made.figure.supylabel("index", fontsize=9)
        label_lowest(axes, steps_label(steps))
        made.figure.colorbar(image, ax=axes, label=label, aspect=40, location="bottom")
    return Drawn(
        f"Singular values of {view.what} over training: {run.name}",
        "log10 of the nth largest singular value (rows) at each analyzed step (columns, not to"
        " scale), one panel for each matrix: the mean over layers. Zeros are left out.",
        made.figure, made.numbers, [],
    )  # fmt: skip


def _over_steps(run: RunRows, what: str) -> dict[str, dict[int, list[float]]]:
    """Return by module and step the mean over layers of log10 of each singular value."""
    layers: dict[str, dict[int, list[list[float]]]] = {}
    for row in run.spectra:
        step, module = row.get("step"), one_line(str(row.get("module")))
        if row.get("what") != what or module == "ov" or type(step) is not int:
            continue
        logs = [math.log10(sigma) for sigma in _sigma(row) if sigma > 0]
        if logs:
            layers.setdefault(module, {}).setdefault(step, []).append(logs)
    return {
        module: {
            step: [
                statistics.fmean(logs[i] for logs in of_step if i < len(logs))
                for i in range(max(map(len, of_step)))
            ]
            for step, of_step in by_step.items()
        }
        for module, by_step in layers.items()
    }  # fmt: skip
