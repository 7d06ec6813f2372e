"""Figures of a comparison over its settings: a grid of them, and the sizes of the model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from peptrain.figures.panel import Drawn, sheet
from peptrain.figures.source import NotMeasured, Row, RunRows, Source, View, loss_label, number
from peptrain.figures.style import INK, Look, look, styled
from peptrain.text import one_line

LOSS = "held-out loss"
LOSS_KEY, MEMORY_KEY, SIZE_KEY = "held_out_loss", "peak_bytes", "non_embedding_trainable"
GIB = 2**30


@dataclass(frozen=True)
class _Configuration:
    """A configuration of a comparison with the last rows of its seeds, at its best rate."""

    label: str
    method: str
    settings: dict[str, Any]
    """Those that the grid sets for it."""
    all_settings: dict[str, Any]
    ends: Sequence[Row]

    @property
    def size(self) -> str:
        """The model, but for its vocabulary, whose embeddings are not counted."""
        stated = {k: v for k, v in (self.all_settings | self.settings).items()
                  if k.startswith("model.") and k != "model.vocab_size"}  # fmt: skip
        return str(sorted((key, _text(value)) for key, value in stated.items()))

    def values(self, key: str, scale: float = 1.0) -> list[float]:
        """Return a number of the last rows of all seeds, none if one lacks it."""
        found = [number(end, key) for end in self.ends]
        known = [value / scale for value in found if value is not None]
        return known if len(known) == len(found) else []


def _configurations(source: Source) -> list[_Configuration]:
    """Return the configurations with finished runs. Raises NotMeasured if there are none."""
    if not source.trials:
        raise NotMeasured("this figure is of a comparison; give a directory of `peptrain compare`")
    by_name = {one_line(Path(str(trial.get("run"))).name): trial for trial in source.trials}
    runs: dict[str, list[tuple[RunRows, Row]]] = {}
    for run in source.runs:
        if run.name in by_name and run.end is not None:
            runs.setdefault(run.configuration, []).append((run, run.end))
    found = []
    for label, several in runs.items():
        first, trial = several[0][0], by_name[several[0][0].name]
        given = trial.get("settings")
        ends = [end for _, end in several if number(end, LOSS_KEY) is not None]
        if ends:
            stated = given if isinstance(given, dict) else {}
            method = one_line(str(first.settings.get("method.name")))
            found.append(_Configuration(label, method, stated, dict(first.settings), ends))
    if not found:
        raise NotMeasured("no run of the comparison has finished yet")
    return found


def _shown(key: str) -> str:
    return one_line(key.removeprefix("method."))


def _settings_of(group: Sequence[_Configuration]) -> list[dict[str, Any]]:
    """Return what each configuration of a method has for every setting that one of them states.

    What a configuration does not state has its default. One that follows another setting, so that
    it differs between configurations that don't state it, is None.
    """
    keys = dict.fromkeys(key for one in group for key in one.settings)
    unstated = {
        key: {_text(one.all_settings.get(key)) for one in group if key not in one.settings}
        for key in keys
    }
    return [
        {
            key: one.settings[key] if key in one.settings
            else one.all_settings.get(key) if len(unstated[key]) == 1 else None
            for key in keys
        }
        for one in group
    ]  # fmt: skip


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


Member = tuple[dict[str, Any], _Configuration]
"""A configuration with `_settings_of` it."""


@dataclass(frozen=True)
class _Line:
    """Configurations of a method that differ in one setting, `key`."""

    key: str
    members: Sequence[Member]

    @property
    def method(self) -> str:
        return self.members[0][1].method

    @property
    def points(self) -> list[tuple[Any, _Configuration]]:
        return [(settings[self.key], one) for settings, one in self.members]

    def name(self, others: Sequence[_Line]) -> str:
        """Return the method, and the stated settings that tell it from the other lines."""
        stated = {key for _, one in self.members for key in one.settings} - {self.key}
        alike = [line.members[0][0] for line in others if line.method == self.method]
        own = self.members[0][0]
        differ = [
            k for k in own if k in stated and any(_text(o[k]) != _text(own[k]) for o in alike)
        ]
        return " ".join((self.method, *(f"{_shown(k)}={one_line(_text(own[k]))}" for k in differ)))


def _lines(configurations: Sequence[_Configuration]) -> dict[str, list[_Line]]:
    """Return the lines over each setting that varies while all others stay the same."""
    methods: dict[str, list[_Configuration]] = {}
    for one in configurations:
        methods.setdefault(one.method, []).append(one)
    found: dict[str, list[_Line]] = {}
    for group in methods.values():
        settings = _settings_of(group)
        for key in settings[0]:
            same: dict[str, list[Member]] = {}
            for of_one, one in zip(settings, group, strict=True):
                others = str(sorted((k, _text(v)) for k, v in of_one.items() if k != key))
                if of_one[key] is not None:
                    same.setdefault(others, []).append((of_one, one))
            several = [of for of in same.values() if len({_text(s[key]) for s, _ in of}) > 1]
            if several:
                found.setdefault(key, []).extend(_Line(key, members) for members in several)
    return found


def grid(source: Source, view: View) -> Drawn:
    """BPT's Figure 6: held-out loss and peak memory over each setting that varies."""
    configurations = _configurations(source)
    lines = _lines(configurations)
    if not lines:
        raise NotMeasured(
            "grid: no two configurations of the comparison differ in one setting; write a list of"
            " values in a [[grid]] block"
        )
    drawn = [one for of_key in lines.values() for line in of_key for _, one in line.points]
    full = [one for one in configurations if one.method == "full" and one not in drawn]
    known = [bool(one.values(MEMORY_KEY)) for one in (*drawn, *full)]
    memory, notes = all(known), list[str]()
    if any(known) and not memory:  # on a CPU none has it
        notes.append("peak memory: not known of every configuration; a GPU's rows have it")
    columns: list[tuple[str, str, float]] = [(loss_label(source, LOSS), LOSS_KEY, 1.0)]
    if memory:
        columns.append(("peak memory (GiB)", MEMORY_KEY, GIB))
    named = {key: [(line.name(of_key), line) for line in of_key] for key, of_key in lines.items()}
    names = dict.fromkeys(
        [name for of_key in named.values() for name, _ in of_key] + [one.label for one in full]
    )
    looks = {name: look(n) for n, name in enumerate(names)}
    looks |= {one.label: Look(INK, (0, (5, 2)), "") for one in full}
    with styled():
        made, axes = sheet([1.7] * len(lines), columns=len(columns), legend=len(names))
        for of_row, (key, of_key) in zip(axes, named.items(), strict=True):
            values = [value for _, line in of_key for value, _ in line.points]
            place, label = _axis(_shown(key), values)
            for ax, (what, row, scale) in zip(of_row, columns, strict=True):
                panel = made.panel(ax, f"{what} over {_shown(key)}", label, what)
                for name, line in of_key:
                    points = [(value, one.values(row, scale)) for value, one in line.points]
                    for joined in _joined(points, place):
                        panel.over_seeds(name, joined, looks[name])
                ends = [min(map(place, values)), max(map(place, values))]
                for one in full:
                    level = [statistics.fmean(one.values(row, scale))] * 2
                    panel.line("full training", one.label, ends, level, looks[one.label])
                ax.set(xlabel=_shown(key), ylabel=what.replace(" (", "\n("))
                _ticks(ax, key, values, place)
        made.legend([(name, {"color": style.colour, "ls": style.dash, "marker": style.marker})
                     for name, style in looks.items()])  # fmt: skip
    return Drawn(
        "Held-out loss over each setting",
        "A panel for each setting that varies while the others are the same: mean over seeds at the"
        " best learning rate. Dots: each of two seeds. Bars: its 95 % interval (Student's t) where"
        " there are more."
        " Horizontal: full training. A setting that is not a number, or is 0 somewhere, has its"
        " values at equal distances. An interval of 0 is never, and comes after the longest. No"
        " line joins a number with a name, which has no place among numbers.",
        made.figure, made.numbers,
        notes,
    )  # fmt: skip


def _axis(key: str, values: Sequence[Any]) -> tuple[Callable[[Any], float], str]:
    """Return where a value is on the x axis, and the label: numbers > 0 are their own places."""
    if all(type(value) in (int, float) and value > 0 for value in values):
        return float, key
    order = list(dict.fromkeys(_tick(key, one) for one in sorted(values, key=partial(_order, key))))
    label = ", ".join(f"{place}: {text}" for place, text in enumerate(order))
    return lambda value: float(order.index(_tick(key, value))), f"{key} ({label})"


def _order(key: str, value: Any) -> tuple[bool, float, str]:
    """Sort numbers, also those in texts, before names, and an interval of 0 after all others."""
    place = _number(value)
    if place is None:
        return True, 0.0, _text(value)
    return False, math.inf if _never(key, place) else place, ""


def _number(value: Any) -> float | None:
    """Return a number, also of a text; None for a name."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def _never(key: str, value: float | None) -> bool:
    return value == 0 and key.endswith("_every")


def _tick(key: str, value: Any) -> str:
    return "never" if _never(key, _number(value)) else one_line(_text(value))


def _joined(
    points: Sequence[tuple[Any, list[float]]], place: Callable[[Any], float]
) -> list[list[tuple[float, list[float]]]]:
    """Return the points that a line may join, in order: numbers, and apart from them names."""
    kinds: dict[bool, list[tuple[float, list[float]]]] = {}
    for value, ys in points:
        kinds.setdefault(_number(value) is None, []).append((place(value), ys))
    return [sorted(kinds[named]) for named in sorted(kinds)]


def _ticks(ax: Any, key: str, values: Sequence[Any], place: Callable[[Any], float]) -> None:
    texts = {place(value): _tick(key, value) for value in values}
    if place is float:
        ax.set_xscale("log")
        ax.minorticks_off()
    ax.set_xticks(sorted(texts), [texts[at] for at in sorted(texts)])


def scaling(source: Source, view: View) -> Drawn:
    """BPT's Figure 1: held-out loss over log10 of the trainable parameters without embeddings."""
    found, lacking = dict[str, list[tuple[float, list[float]]]](), []
    sizes_of: dict[str, set[str]] = {}
    for one in _configurations(source):
        sizes = one.values(SIZE_KEY)
        if not sizes or min(sizes) <= 0:
            lacking.append(f"{one.label}: non_embedding_trainable is not known")
            continue
        own = {k: v for k, v in one.settings.items()
               if not k.startswith("model.") and k != "method.rank"}  # fmt: skip
        name = " ".join(
            (one.method, *(f"{_shown(k)}={one_line(_text(v))}" for k, v in own.items()))
        )
        point = math.log10(statistics.fmean(sizes)), one.values(LOSS_KEY)
        found.setdefault(name, []).append(point)
        sizes_of.setdefault(name, set()).add(one.size)
    if not any(len(models) > 1 for models in sizes_of.values()):  # ranks alone are no sizes
        raise NotMeasured(
            "scaling: needs a method with models of two sizes or more; write a [[grid]] block for"
            " each, with its model table"
        )
    with styled():
        made, rows = sheet([2.8], legend=len(found))
        loss = loss_label(source, LOSS)
        label = "log10 of the trainable parameters without embeddings"
        panel = made.panel(rows[0][0], "loss over size", label, loss)
        for n, (name, points) in enumerate(found.items()):
            panel.over_seeds(name, sorted(points), look(n))
        panel.axes.set(xlabel=label, ylabel=loss)
        made.legend([(name, {"color": look(n).colour, "ls": look(n).dash, "marker": look(n).marker})
                     for n, name in enumerate(found)])  # fmt: skip
    return Drawn(
        "Held-out loss over the size",
        "Each configuration at its best learning rate: mean over seeds. Dots: each of two seeds."
        " Bars: its 95 % interval (Student's t) where there are more. A line joins the sizes of one"
        " method. Embeddings and the output head are not counted.",
        made.figure, made.numbers, lacking,
    )  # fmt: skip
