"""Evaluate a run or a Hugging Face directory on tasks, alone or against another model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peptrain.errors import ConfigError
from peptrain.settings.fields import check_whole
from peptrain.tasks.files import first, items_of, read_rows
from peptrain.tasks.harness import measure_by_harness
from peptrain.tasks.measure import Measured, checksum, measure
from peptrain.tasks.paired import Paired, paired
from peptrain.tasks.record import find, record
from peptrain.tasks.score import Watch
from peptrain.tasks.subject import Subject
from peptrain.tasks.table import GROUPS, Item, Row, Task

log = logging.getLogger("peptrain")
Show = Callable[[str, int, int], None]
"""Called with the name of a task, and the sequences scored and in all."""


@dataclass(frozen=True)
class Questions:
    """A task with its data."""

    task: Task
    rows: Sequence[Row]
    items: Sequence[tuple[int, Item]]
    """The items to measure, with the numbers of their rows."""


def read_tasks(
    tasks: Sequence[Task], data: Path | None, limit: int | None = None
) -> list[Questions]:
    """Read the items of tasks, before any model is opened.

    limit: the first items of each task, of each of BLiMP's paradigms; None is all. Raises
    DataError for data that are missing or damaged.
    """
    check_whole("--limit", limit, 1)
    every = [(task, read_rows(task, data)) for task in tasks]
    return [
        Questions(task, rows, first(items_of(task, rows, rows.place), limit))
        for task, rows in every
    ]


def evaluate_tasks(
    subject: Subject,
    questions: Sequence[Questions],
    *,
    positions: int | None = None,
    harness: bool = False,
    device: torch.device | str = "cpu",
    show: Show = lambda name, done, total: None,
) -> list[Measured]:
    """Measure the tasks. Of a run each result is recorded as soon as it is known.

    What was recorded before, of the same weights and items, is not measured again. positions: the
    most tokens that the model reads at once; unset: those of the subject. harness: measure by the
    lm-evaluation-harness. Raises Unsupported if that is not installed.
    """
    check_whole("--positions", positions, 1)
    judge = subject.judge(torch.device(device), positions)
    found = []
    about = {
        "step": subject.step,
        "positions": judge.positions,
        "weights": subject.weights,
        "scorer": "harness" if harness else "own",
    }
    for one in questions:
        task, items = one.task, one.items
        wanted = {**about, "task": task.name, "task_data": checksum(items)}
        known = find(subject.run, wanted) if subject.run else None
        if known is None:
            if harness:
                known = measure_by_harness(subject, judge, task, one.rows, items)
            else:
                known = measure(judge, task, items, _shown(show, task.name))
            if subject.run is not None:
                record(subject.run, known, about)
        else:
            log.info("%s: %s was measured before", subject.name, task.name)
        found.append(known)
    return found


def _shown(show: Show, name: str) -> Watch:
    return lambda done, total: show(name, done, total)


def average(found: Sequence[Measured], group: str) -> float | None:
    """Return the mean `acc` of a group's tasks; None unless all were measured."""
    values = {one.task: one.values["acc"] for one in found if "acc" in one.values}
    names = GROUPS[group]
    return sum(values[n] for n in names) / len(names) if values.keys() >= {*names} else None


@dataclass(frozen=True)
class Against:
    """Paired tests of two models."""

    a: str
    b: str
    tests: Mapping[str, Paired]

    def entry(self) -> dict[str, Any]:
        """Return everything for JSON."""
        tests = {task: test.entry() for task, test in self.tests.items()}
        return {"against": self.b, "tests": tests}


def compared(a: Subject, of_a: Sequence[Measured], b: Subject, of_b: Sequence[Measured]) -> Against:
    """Test on each task that has an accuracy whether A and B differ.

    Their tokenizers may differ, since the items are the same, but a warning says so.
    """
    if a.encoder.vocabulary != b.encoder.vocabulary:
        log.warning(
            "--against %s: its tokenizer differs from that of %s: accuracies of the same items are"
            " tested, but log-likelihoods can't be compared",
            *(b.path, a.path),
        )
    tests = {
        one.task: paired(one.rows, other.rows)
        for one, other in zip(of_a, of_b, strict=True)
        if "acc" in one.values
    }
    if not tests:
        raise ConfigError("--against: none of the tasks has an accuracy; give one such as blimp")
    return Against(a.name, b.name, tests)
