"""The tables of a report: settings that differ, states of runs, evaluations, the comparison."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from peptrain.comparison.summary import Line
from peptrain.comparison.table import COSTS, Comparison
from peptrain.display.training import RESULT
from peptrain.errors import CheckpointError
from peptrain.figures.panel import shortened
from peptrain.figures.source import Row, RunRows, Source, number
from peptrain.text import escaped, one_line

UNKNOWN = "–"
WIDEST = 25
"""Characters of a value among settings that differ, where it stays distinct."""
MOST_SAMPLES = 100
METRICS = ("acc", "acc_norm", "perplexity", "byte_perplexity", "word_perplexity", "bits_per_byte")
"""Of tasks, as in eval.json."""


@dataclass(frozen=True)
class Table:
    """Cells as text. The first column names the rows."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    prose: bool = False
    """Whether cells are texts, with lines of their own."""


def shown(value: Any) -> str:
    """Return a value as text, a number with at most six digits."""
    if value is None:
        return UNKNOWN
    if type(value) is float:
        return f"{value:.6g}"
    if type(value) is int:
        return f"{value:,}"
    return one_line(str(value).lower() if type(value) is bool else str(value))


def differing(source: Source, *, whole: bool = False) -> Table:
    """Return the settings that are not the same in all runs.

    What there is more of, runs or settings, has the rows, as a page has more height than width.
    whole: otherwise the middle of long values is left out.
    """
    keys = dict.fromkeys(key for run in source.runs for key in run.settings)
    values = {key: [run.settings.get(key) for run in source.runs] for key in keys}
    differ = {key: found for key, found in values.items() if any(v != found[0] for v in found)}
    names = [run.name for run in source.runs]
    told = list if whole else _shortened
    lines = [[one_line(key), *told(map(shown, found))] for key, found in differ.items()]
    if len(differ) > len(names):
        return Table(["setting", *names], lines)
    columns = zip(["run", *names], *lines, strict=True)
    heads, *rows = ([*column] for column in columns)
    return Table(heads, rows)


def _shortened(values: Iterable[str]) -> list[str]:
    """Return values without the middle of the long ones, unless two of them would look the same."""
    given = list(values)
    short = [shortened(value, WIDEST) for value in given]
    return short if len(set(short)) == len(set(given)) else given


def common(source: Source) -> Table:
    """Return the settings that all runs share."""
    first, *others = (run.settings for run in source.runs)
    same = [
        [one_line(key), shown(value)]
        for key, value in first.items()
        if all(key in other and other[key] == value for other in others)
    ]
    return Table(["setting", "value"], same)


def states(source: Source) -> Table:
    """Return how far each run is, and what its last rows say."""
    heads = ["run", "state", "held-out loss", "ppl", "trainable", "tokens", "tokens/s",
             "training s", "peak GiB"]  # fmt: skip
    return Table(heads, [_state(run) for run in source.runs])


def _state(run: RunRows) -> list[str]:
    held = _last(run, "held_out_loss", "eval", "end")
    peak = _last(run, "peak_bytes", "step", "eval", "end")
    trainable = _last(run, "trainable", "phase", "end")
    speed = _last(run, "tokens_per_second", "step", "end")
    seconds = _last(run, "seconds", "step", "eval", "end")
    ppl = None if held is None or held >= 700 or run.fine_tuned else math.exp(held)
    return [
        run.name,
        run.state,
        _known(held, ".4f"),
        _known(ppl, ".2f"),
        _known(trainable, ",.0f"),
        _known(_last(run, "tokens", "step"), ",.0f"),
        _known(speed, ",.0f"),
        _known(seconds, ",.1f"),
        _known(None if peak is None else peak / 2**30, ".2f"),
    ]


def _last(run: RunRows, key: str, *events: str) -> float | None:
    values = [value for row in run.of(*events) if (value := number(row, key)) is not None]
    return values[-1] if values else None


def _known(value: float | None, form: str) -> str:
    return UNKNOWN if value is None else format(value, form)


def evaluations(source: Source) -> Table:
    """Return the held-out losses in every eval.json."""
    rows = [
        [run.name, *(shown(entry.get(key)) for key in ("step", "loss", "perplexity", "tokens")),
         shown(entry.get("data"))[:12], "yes" if entry.get("legacy") is True else "no"]
        for run in source.runs for entry in run.evaluations if "loss" in entry
    ]  # fmt: skip
    return Table(["run", "step", "loss", "ppl", "tokens", "corpus", "legacy"], rows)


def judged(source: Source) -> Table:
    """Return the results of tasks in every eval.json: a row for each metric."""
    rows = []
    for run, entry in _entries(source, "task"):
        for key in METRICS:
            if (value := number(entry, key)) is not None:
                error = number(entry, f"{key}_stderr")
                named = [run.name, shown(entry.get("step")), shown(entry["task"]), key]
                items = shown(entry.get("items"))
                rows.append([*named, shown(value), _known(error, ".2g"), items])
    return Table(["run", "step", "task", "metric", "value", "± s.e.", "items"], rows)


def fine_tuned(source: Source) -> Table:
    """Return the latest results of fine-tunings, with what the last row says of the best one."""
    rows = []
    for run in filter(lambda run: run.fine_tuned, source.runs):
        for row in run.of("eval", "end")[-1:]:
            best = shown(row.get("best_step"))
            for key in filter(RESULT.fullmatch, row):
                name, _, metric = key.rpartition("_")
                others = (row.get(f"{name}_{what}_{metric}") for what in ("best", "majority"))
                error = _known(number(row, f"{key}_stderr"), ".2g")
                rows.append([run.name, shown(row.get("step")), key, shown(row[key]), error,
                             *map(shown, others), best])  # fmt: skip
    return Table(
        ["run", "step", "result", "value", "± s.e.", "best", "majority", "best step"], rows
    )


def samples(source: Source) -> Table:
    """Return what the models wrote during training, the latest `MOST_SAMPLES` of each run."""
    rows = [
        [run.name, shown(row["step"]), *(escaped(str(row.get(key))) for key in ("prompt", "text"))]
        for run in source.runs for row in run.of("sample")[-MOST_SAMPLES:]
    ]  # fmt: skip
    return Table(["run", "step", "prompt", "continued"], rows, prose=True)


def by_domain(source: Source) -> Table:
    """Return the losses by domain in every eval.json, and their unweighted means."""
    rows = []
    for run, entry in _entries(source, "domains"):
        named, found = [run.name, shown(entry.get("step"))], entry["domains"]
        for domain, one in found.items() if type(found) is dict else ():
            values = one if type(one) is dict else {}
            told = (shown(values.get(key)) for key in ("loss", "tokens"))
            rows.append([*named, shown(domain), *told])
        rows.append([*named, "mean", shown(entry.get("macro_loss")), UNKNOWN])
    return Table(["run", "step", "domain", "loss", "tokens"], rows)


def in_pairs(source: Source) -> Table:
    """Return the paired tests in every eval.json: a row for each task."""
    keys = ("difference", "difference_stderr", "mcnemar_p", "items")
    rows = []
    for run, entry in _entries(source, "tests"):
        named = [run.name, shown(entry.get("step")), shown(entry.get("against"))]
        found = entry["tests"]
        for task, one in found.items() if type(found) is dict else ():
            values = one if type(one) is dict else {}
            rows.append([*named, shown(task), *(shown(values.get(key)) for key in keys)])
    return Table(
        ["run", "step", "against", "task", "difference", "± s.e.", "McNemar's p", "items"], rows
    )


def _entries(source: Source, key: str) -> Iterator[tuple[RunRows, Row]]:
    return ((run, entry) for run in source.runs for entry in run.evaluations if key in entry)


def compared(source: Source) -> Table:
    """Return the comparison's table, as `compare` prints it. Raises CheckpointError if damaged."""
    equal = source.about.get("equal")
    known = {field.name for field in fields(Line)}
    try:
        lines = [Line(**{k: v for k, v in line.items() if k in known}) for line in source.lines]
        made = Comparison(lines, equal if equal in COSTS else "tokens", 0)
        columns = made.columns
        rows = [[one_line(str(show(line))) for show in columns.values()] for line in lines]
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"runs.json: a configuration is damaged ({error}); repeat `peptrain compare` to write"
            " it again"
        ) from error
    return Table(list(columns), rows)
