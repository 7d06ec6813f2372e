"""Measure a task: scores of its items, and the accuracies and perplexities that follow."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peptrain.distributed.world import World
from peptrain.models.hf import Precision
from peptrain.tasks.score import Score, Watch, scores
from peptrain.tasks.spans import Encoder, page_spans, spans
from peptrain.tasks.table import Item, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Values = dict[str, float]
"""acc, acc_norm, perplexity and so on; NAME_stderr is the standard error of NAME."""


@dataclass(frozen=True)
class Measured:
    """The result of a task."""

    task: str
    items: int
    data: str
    """A checksum of the items, so that two results are of the same ones."""
    values: Values
    groups: Mapping[str, Values] = field(default_factory=dict)
    """Results of parts: of BLiMP's categories and paradigms."""
    rows: Sequence[Mapping[str, Any]] = ()
    """What was measured of each item."""

    def entry(self) -> dict[str, Any]:
        """Return the result without its rows, for JSON, in which an infinite value is null."""
        made: dict[str, Any] = {"task": self.task, "items": self.items, "task_data": self.data}
        parts = {"groups": {k: finite(v) for k, v in self.groups.items()}} if self.groups else {}
        return {**made, **finite(self.values), **parts}


def finite(values: Mapping[str, float]) -> dict[str, float | None]:
    """Return the values with None for those that are not finite."""
    return {k: v if math.isfinite(v) else None for k, v in values.items()}


@dataclass(frozen=True)
class Judge:
    """A model with its tokenizer, ready to measure tasks."""

    model: PreTrainedModel
    encoder: Encoder
    positions: int
    """Most tokens that the model reads at once."""
    precision: Precision = "fp32"
    world: World | None = None

    def scores(self, requests: Sequence[tuple[str, str]], names: Sequence[str],
               watch: Watch) -> list[Score]:  # fmt: skip
        """Return the score of each (context, continuation). names: of the requests, for errors."""
        made = spans(requests, self.encoder, self.positions, names)
        return scores(self.model, made, precision=self.precision, world=self.world, watch=watch)

    def page_scores(self, texts: Sequence[str], watch: Watch) -> list[float]:
        """Return the log-likelihood of each text."""
        windows = [page_spans(text, self.encoder, self.positions) for text in texts]
        every = [window for text in windows for window in text]
        made = iter(scores(self.model, every, precision=self.precision, world=self.world,
                           watch=watch))  # fmt: skip
        return [math.fsum(next(made).log_likelihood for _ in text) for text in windows]


def measure(
    judge: Judge,
    task: Task,
    chosen: Sequence[tuple[int, Item]],
    watch: Watch = lambda done, total: None,
) -> Measured:
    """Measure a task on items with their numbers in the data set.

    Raises DataError for an item whose continuation does not fit into the model.
    """
    items = [item for _, item in chosen]
    if task.kind == "page":
        found = judge.page_scores([item.requests[0][1] for item in items], watch)
        rows = [_page_row(item, value) for item, value in zip(items, found, strict=True)]
    else:
        names = [f"{task.name}: item {n}" for n, item in chosen for _ in item.requests]
        requests = [request for item in items for request in item.requests]
        made = iter(judge.scores(requests, names, watch))
        row = _word_row if task.kind == "word" else _choice_row
        rows = [row(item, [next(made) for _ in item.requests]) for item in items]
    numbered = [
        {"id": number, **({"groups": list(item.groups)} if item.groups else {}), **one}
        for (number, item), one in zip(chosen, rows, strict=True)
    ]
    values, groups = summary(task, numbered)
    return Measured(task.name, len(items), checksum(chosen), values, groups, numbered)


def checksum(chosen: Iterable[tuple[int, Item]]) -> str:
    """Return a checksum of items and their numbers."""
    digest = hashlib.sha256()
    for number, item in chosen:
        digest.update(json.dumps([number, item.requests, item.gold]).encode())
    return digest.hexdigest()[:16]


def _choice_row(item: Item, found: Sequence[Score]) -> dict[str, Any]:
    likely = [score.log_likelihood for score in found]
    row = {"log_likelihoods": likely, "gold": item.gold, "correct": _best(likely) == item.gold}
    if item.lengths:
        by_length = [x / (n or math.nan) for x, n in zip(likely, item.lengths, strict=True)]
        row["correct_norm"] = _best(by_length) == item.gold
    return row


def _best(values: Sequence[float]) -> int:
    """Return the index of the largest value, the first of equal ones."""
    return max(range(len(values)), key=values.__getitem__)


def _word_row(item: Item, found: Sequence[Score]) -> dict[str, Any]:
    return {"log_likelihoods": [found[0].log_likelihood], "correct": found[0].greedy}


def _page_row(item: Item, value: float) -> dict[str, Any]:
    return {"log_likelihoods": [value], "words": item.lengths[0], "bytes": item.lengths[1]}


def summary(task: Task, rows: Sequence[Mapping[str, Any]]) -> tuple[Values, dict[str, Values]]:
    """Return the values of a task, and of its groups, from the rows of its items.

    With groups a value is the mean over paradigms, each of which counts the same.
    """
    if task.kind == "page":
        return _of_pages(rows), {}
    if not rows[0].get("groups"):
        return _of_items(task, rows), {}
    parts: dict[str, list[Mapping[str, Any]]] = {}
    inside: dict[str, set[str]] = {}
    for row in rows:
        paradigm, category = row["groups"]
        parts.setdefault(paradigm, []).append(row)
        inside.setdefault(category, set()).add(paradigm)
    paradigms = {name: _of_items(task, part) for name, part in sorted(parts.items())}
    categories = {
        name: mean([paradigms[p] for p in sorted(members)])
        for name, members in sorted(inside.items())
    }
    return mean(list(paradigms.values())), {**categories, **paradigms}


def _of_items(task: Task, rows: Sequence[Mapping[str, Any]]) -> Values:
    values = _proportion("acc", [row["correct"] for row in rows])
    if task.normalized:
        values |= _proportion("acc_norm", [row["correct_norm"] for row in rows])
    if task.kind == "word":
        likely = [row["log_likelihoods"][0] for row in rows]
        perplexity = exp(-statistics.fmean(likely))
        values["perplexity"] = perplexity
        if len(likely) > 1:  # by the delta method: d exp(x) = exp(x) dx
            values["perplexity_stderr"] = perplexity * _stderr(likely)
    return values


def _proportion(name: str, correct: Sequence[bool]) -> Values:
    values = {name: sum(correct) / len(correct)}
    if len(correct) > 1:
        values[f"{name}_stderr"] = _stderr([float(c) for c in correct])
    return values


def _stderr(values: Sequence[float]) -> float:
    """Return s / sqrt(n), with n - 1 in the variance as in the harness."""
    return statistics.stdev(values) / math.sqrt(len(values))


def mean(parts: Sequence[Mapping[str, float]], name: str = "acc") -> Values:
    """Return the unweighted mean of a value, with the standard error for independent parts."""
    values = {name: statistics.fmean(part[name] for part in parts)}
    errors = [part[f"{name}_stderr"] for part in parts if f"{name}_stderr" in part]
    if len(errors) == len(parts):
        values[f"{name}_stderr"] = math.sqrt(math.fsum(e * e for e in errors)) / len(parts)
    return values


def _of_pages(rows: Sequence[Mapping[str, Any]]) -> Values:
    """Return exp(total loss / words) and exp(total loss / bytes): totals, not means of pages."""
    loss = -math.fsum(row["log_likelihoods"][0] for row in rows)
    words, size = sum(row["words"] for row in rows), sum(row["bytes"] for row in rows)
    return {
        "byte_perplexity": exp(loss / size),
        "word_perplexity": exp(loss / words),
        "bits_per_byte": loss / size / math.log(2),
    }


def exp(x: float) -> float:
    """Return e^x, infinite where it is too large for a float."""
    return math.exp(x) if x < 700 else math.inf


Started = Callable[[str], Watch]
"""Called with the name of a task before it; returns what is called with its progress."""
