"""Figures that keep every number that is drawn on them."""

from __future__ import annotations

import csv
import io
import math
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from peptrain.figures.style import INK, WIDTH, Look, imported
from peptrain.ops.student import half_width

COLUMNS = ("panel", "x_axis", "y_axis", "mark", "line", "x", "y", "low", "high", "value")
LONGEST, LINE = 44, 58
"""Characters of a name beside others, and of a line in a legend. The numbers have all of it."""


@dataclass(frozen=True)
class Drawn:
    """A figure, and the numbers in it."""

    title: str
    caption: str
    """What it shows, and how to read it."""
    figure: Any
    """A matplotlib Figure."""
    numbers: Sequence[dict[str, Any]]
    """A row for each point that is drawn, with COLUMNS."""
    notes: Sequence[str] = ()
    """What is missing, and why."""

    def csv(self) -> str:
        """Return the numbers as CSV. Names that a spreadsheet would take for a formula get a '."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: _cell(v) for k, v in row.items()} for row in self.numbers)
        return text.getvalue()


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@") else value


@dataclass
class Panel:
    """Axes, and the numbers drawn on them. Each artist is labelled "mark|line"."""

    axes: Any
    name: str
    x_axis: str
    y_axis: str
    numbers: list[dict[str, Any]]

    def _keep(self, mark: str, line: str, **columns: Iterable[float]) -> str:
        about = {"panel": self.name, "x_axis": self.x_axis, "y_axis": self.y_axis,
                 "mark": mark, "line": line}  # fmt: skip
        for values in zip(*columns.values(), strict=True):
            self.numbers.append({**about, **dict(zip(columns, values, strict=True))})
        return f"{mark}|{line}"

    def line(
        self, mark: str, line: str, x: Sequence[float], y: Sequence[float], look: Look,
        **style: Any,
    ) -> None:  # fmt: skip
        """Draw y over x. A single point gets a marker, which a line would not show."""
        label = self._keep(mark, line, x=x, y=y)
        given = {"color": look.colour, "ls": look.dash} | style
        if len(x) == 1:
            given["marker"] = given.get("marker") or look.marker
        self.axes.plot(x, y, label=label, **given)

    def band(
        self, mark: str, line: str, x: Sequence[float], low: Sequence[float],
        high: Sequence[float], look: Look,
    ) -> None:  # fmt: skip
        """Fill between low and high."""
        label = self._keep(mark, line, x=x, low=low, high=high)
        self.axes.fill_between(x, low, high, color=look.colour, alpha=0.22, lw=0, label=label)

    def outline(
        self, mark: str, line: str, x: Sequence[float], low: Sequence[float],
        high: Sequence[float], look: Look,
    ) -> None:  # fmt: skip
        """Draw low and high as dotted lines without a filling."""
        label = self._keep(mark, line, x=x, low=low, high=high)
        for ends in (low, high):
            self.axes.plot(x, ends, color=look.colour, ls=(0, (1, 1.4)), lw=0.9, label=label)

    def intervals(
        self, mark: str, line: str, x: Sequence[float], low: Sequence[float],
        high: Sequence[float], look: Look,
    ) -> None:  # fmt: skip
        """Draw a vertical bar from low to high at each x."""
        label = self._keep(mark, line, x=x, low=low, high=high)
        self.axes.vlines(x, low, high, color=look.colour, lw=1.2, label=label)

    def over_seeds(
        self, line: str, points: Sequence[tuple[float, Sequence[float]]], look: Look, **style: Any
    ) -> None:
        """Draw the mean of the values at each x, each value where there are two, and the interval
        of the mean where there are more: that of two, ± 12.7 standard errors, would hide the rest.
        """
        two = [(x, y) for x, values in points if len(values) == 2 for y in values]
        if two:
            xs, ys = zip(*two, strict=True)
            self.line("one seed", line, xs, ys, look, ls="none", marker=".", alpha=0.6, ms=5)
        means = [(x, statistics.fmean(values)) for x, values in points]
        wide = [(x, mean, half) for (x, mean), (_, values) in zip(means, points, strict=True)
                if len(values) > 2 and (half := half_width(values))]  # fmt: skip
        if wide:
            x, low, high = zip(*((x, m - h, m + h) for x, m, h in wide), strict=True)
            self.intervals("95 % over seeds", line, x, low, high, look)
        x, y = zip(*means, strict=True)
        self.line("mean over seeds", line, x, y, look, **{"marker": look.marker} | style)

    def stairs(
        self, mark: str, line: str, edges: Sequence[float], counts: Sequence[float], look: Look
    ) -> None:
        """Draw counts of bins, whose left edges are x."""
        label = self._keep(mark, line, x=edges[:-1], y=counts)
        self.axes.stairs(counts, edges, color=look.colour, ls=look.dash, lw=1.2, label=label)

    def bars(
        self, mark: str, line: str, x: Sequence[float], heights: Sequence[float], look: Look,
        width: float,
    ) -> None:  # fmt: skip
        """Draw bars from 0 to `heights`, centred at x."""
        label = self._keep(mark, line, x=x, y=heights)
        for bar in self.axes.bar(x, heights, width, color=look.colour):
            bar.set_label(label)

    def cells(
        self, mark: str, line: str, xs: Sequence[float], ys: Sequence[float],
        values: Sequence[Sequence[float]], limits: tuple[float, float],
    ) -> Any:  # fmt: skip
        """Colour a cell for each of `ys` (rows) and `xs`, in places 0, 1, ...; NaN stays empty."""
        flat = [(x, y, values[i][j]) for i, y in enumerate(ys) for j, x in enumerate(xs)]
        known = [entry for entry in flat if not math.isnan(entry[2])]
        columns = zip(*known, strict=True) if known else ((), (), ())
        keys = ("x", "y", "value")
        label = self._keep(mark, line, **dict(zip(keys, columns, strict=True)))
        return self.axes.imshow(
            values, aspect="auto", origin="lower", cmap="viridis", vmin=limits[0], vmax=limits[1],
            interpolation="nearest", label=label,
        )  # fmt: skip


@dataclass
class Sheet:
    """A figure of panels."""

    figure: Any
    numbers: list[dict[str, Any]] = field(default_factory=list)

    def panel(self, axes: Any, name: str, x_axis: str, y_axis: str) -> Panel:
        """Return the panel of `axes`, whose label becomes its name."""
        axes.set_label(name)
        return Panel(axes, name, x_axis, y_axis, self.numbers)

    def legend(self, handles: Sequence[tuple[str, dict[str, Any]]]) -> None:
        """Put a legend under the panels, of (name, style of a line)."""
        line = imported("matplotlib.lines").Line2D
        made = [line([], [], **{"color": INK, **style}) for _, style in handles]
        names = [wrapped(name) for name in told_apart([name for name, _ in handles], 2 * LINE)]
        longest = max(map(len, names), default=0)
        columns = 3 if longest <= 14 else 2 if longest <= 26 else 1
        more = sum(name.count("\n") for name in names)
        self.figure.set_figheight(self.figure.get_figheight() + 0.18 * more)
        self.figure.legend(
            made, names, loc="outside lower left", ncols=min(columns, len(made) or 1)
        )


def sheet(rows: Sequence[float], *, columns: int = 1, legend: int = 0, **given: Any) -> Any:
    """Return a Sheet with its axes: a list of rows, each `rows` inches high. legend: its lines."""
    figure_class = imported("matplotlib.figure").Figure
    size = (WIDTH, sum(rows) + 0.45 + 0.18 * legend)
    figure = figure_class(figsize=size, layout="constrained")
    made = figure.subplots(len(rows), columns, squeeze=False, height_ratios=rows, **given)
    return Sheet(figure), made


def told_apart(names: Sequence[str], longest: int = LONGEST) -> list[str]:
    """Return names of at most `longest` characters unless two would look the same.

    A name is a method and its settings. If one is long, only those settings of its method stay that
    tell its names apart, the first ones. Then the middle is left out.
    """
    methods: dict[str, list[str]] = {}
    for name in names:
        methods.setdefault(name.split(" ")[0], []).append(name)
    found = {name: short for alike in methods.values() for name, short in _fewest(alike).items()}
    short = {name: shortened(one, longest) for name, one in found.items()}
    unique = list(short.values())
    return [short[name] if unique.count(short[name]) == 1 else found[name] for name in names]


def wrapped(name: str) -> str:
    """Return a name in lines of LINE characters, broken between its settings where it can be."""
    return "\n".join(textwrap.wrap(name, LINE, break_on_hyphens=False))


def _fewest(alike: Sequence[str]) -> dict[str, str]:
    """Return each name of a method with the settings that tell it from the others."""
    if len(alike) == 1 or max(map(len, alike)) <= LONGEST:
        return dict(zip(alike, alike, strict=True))
    words = [name.split(" ") for name in alike]
    keys = list(dict.fromkeys(word.split("=")[0] for own in words for word in own[1:]))
    for key in reversed(keys):
        fewer = [[own[0], *(w for w in own[1:] if w.split("=")[0] != key)] for own in words]
        if len({tuple(own) for own in fewer}) == len({tuple(own) for own in words}):
            words = fewer
    return {name: " ".join(own) for name, own in zip(alike, words, strict=True)}


def shortened(name: str, longest: int = LONGEST) -> str:
    """Return a name whose middle is left out if it has more than `longest` characters."""
    half = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[-half:]}"


def plain(axis: Any) -> None:
    """Label a logarithmic axis with 0.001, 0.01, since formulas are switched off."""
    ticker = imported("matplotlib.ticker")
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def engineering(axis: Any) -> None:
    """Label an axis with 1 k, 20 M, 3 G."""
    formatter = imported("matplotlib.ticker").EngFormatter
    axis.set_major_formatter(formatter(sep=""))


def short(module: str) -> str:
    """self_attn.q_proj -> q, mlp.down_proj -> down."""
    return module.rpartition(".")[2].removesuffix("_proj")


def panels(
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


def label_lowest(axes: Sequence[Any], label: str) -> None:
    """Label the x axis of the lowest panel of each column, where the others share it."""
    for ax in axes[-2:]:
        ax.set_xlabel(label)
        ax.tick_params(labelbottom=True)


def steps_label(steps: Sequence[int]) -> str:
    """Return the label of columns that are equally wide, whatever lies between their steps."""
    gaps = {after - step for step, after in pairwise(steps)}
    return "steps (not to scale)" if len(gaps) > 1 else "steps"


def some_ticks(ax: Any, steps: Sequence[int], numbers: Sequence[int]) -> None:
    """Name a few columns and rows."""
    places = range(0, len(steps), max(1, -(-len(steps) // 4)))
    ax.set_xticks(list(places), [f"{steps[place]:,}" for place in places])
    rows = range(0, len(numbers), max(1, -(-len(numbers) // 6)))
    ax.set_yticks(list(rows), [str(numbers[row]) for row in rows])
