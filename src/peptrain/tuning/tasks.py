"""The tasks of fine-tuning: GLUE's, and those that a user describes in a TOML file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peptrain.errors import ConfigError, DataError
from peptrain.settings import toml
from peptrain.settings.fields import LARGEST, as_path, check, nearest, shown
from peptrain.tasks.files import located_rows
from peptrain.tasks.table import Row

OF_CLASSES = ("acc", "f1", "matthews")
"""Metrics of predicted classes."""
OF_NUMBERS = ("pearson", "spearman")
"""Metrics of predicted numbers."""
KEYS = ("texts", "labels", "label", "metrics", "train", "validation", "words")
"""Keys of the TOML of a task of one's own."""
NO_LABEL = -1
"""Label of GLUE's test sets, whose labels are not published."""


@dataclass(frozen=True)
class TuningTask:
    """A data set of one or two texts and a label: a class, or a number."""

    name: str
    texts: tuple[str, ...]
    """Columns of the texts, one or two, in the order in which a classifier reads them."""
    labels: tuple[str, ...]
    """Names of the classes in the order of their numbers; () where the label is a number."""
    metrics: tuple[str, ...]
    """Names in `metrics.NAMES`. The first chooses the best checkpoint."""
    folder: str
    """Folder of the data, below the directory of all; an absolute one for a task of one's own."""
    source: str
    """Hugging Face data set with its configuration, or the TOML of a task of one's own."""
    validation: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: {"": ("validation",)})
    """From the suffix of a metric's name to the names of the split; the first that exists is read.
    The first entry chooses the best checkpoint."""
    label: str = "label"
    """Column of the label."""
    train: tuple[str, ...] = ("train",)
    """Names of the split to train on, likewise."""
    words: tuple[str, ...] = ()
    """What a text-to-text model has to generate: for each class, or the nearest to a number."""
    prefix: str = ""
    """Begins the text of a text-to-text model."""
    form: tuple[str, ...] = ()
    """The columns in the order of that text, if it is not that of `texts`."""

    def copy_of(self, split: str) -> str:
        """Return in words what the file of a split is a copy of."""
        return f"the split {split} of the Hugging Face data set {self.source}"

    @property
    def best_by(self) -> str:
        """Name of the result that chooses the best checkpoint and learning rate: TASK_METRIC."""
        return f"{self.name}{next(iter(self.validation))}_{self.metrics[0]}"


@dataclass(frozen=True)
class Example:
    """A row of the data."""

    texts: tuple[str, ...]
    label: float
    """Number of the class, or the number itself."""


def _glue(
    name: str, texts: str, labels: str, metrics: str, *, form: str = "", suffixes: str = ""
) -> TuningTask:
    """Return a task of GLUE; its words in T5 are the names of its classes."""
    classes = tuple(labels.split())
    return TuningTask(
        name,
        tuple(texts.split()),
        classes,
        tuple(metrics.split()),
        folder=name,
        source=f"nyu-mll/glue ({name})",
        validation={end: (f"validation{end}",) for end in suffixes.split() or ("",)},
        words=classes or tuple(f"{fifths / 5:.1f}" for fifths in range(26)),
        prefix=name,
        form=tuple(form.split()),
    )


# The metrics are those of the papers. LORO (A.2) has Matthews' correlation for CoLA, Pearson's for
# STS-B, both accuracies for MNLI, F1 for MRPC, and the accuracy for the rest, also QQP. ReLoRA does
# not say, but MRPC's values in its Table 3, 76.96 and 78.43, are 314 and 320 correct of 408. So
# MRPC has both, the accuracy first: F1 is 81 already for always "equivalent". QQP has F1 as in
# GLUE's own table. The texts for T5 are those of its paper's appendix D, with MNLI's hypothesis
# first.
TASKS = {
    task.name: task
    for task in (
        _glue("cola", "sentence", "unacceptable acceptable", "matthews"),
        _glue("sst2", "sentence", "negative positive", "acc"),
        _glue("rte", "sentence1 sentence2", "entailment not_entailment", "acc"),
        _glue("mrpc", "sentence1 sentence2", "not_equivalent equivalent", "acc f1"),
        _glue("qnli", "question sentence", "entailment not_entailment", "acc"),
        _glue("qqp", "question1 question2", "not_duplicate duplicate", "acc f1"),
        _glue("mnli", "premise hypothesis", "entailment neutral contradiction", "acc",
              form="hypothesis premise", suffixes="_matched _mismatched"),
        _glue("stsb", "sentence1 sentence2", "", "pearson spearman"),
    )
}  # fmt: skip


def tuning_task(given: str, key: str = "--task") -> TuningTask:
    """Return the task of a name in `TASKS`, or of a TOML file.

    Raises ConfigError, which names `key` or the file, for an unknown name and a wrong file.
    """
    if given in TASKS:
        return TASKS[given]
    if not given.endswith(".toml"):
        raise ConfigError(
            f"{key}: unknown task {shown(given)}; {nearest(given, TASKS)}choose from"
            f" {', '.join(TASKS)}, or give a FILE.toml"
        )
    return _own(as_path(given, key), key)


def _own(path: Path, key: str) -> TuningTask:
    """Return the task of a TOML file: `texts` and `labels`, and what differs from the defaults."""
    table = toml.read(path, f"{key} ")
    place = f"{path}: "
    for name in table:
        if name not in KEYS:
            raise ConfigError(place + toml.unknown(name, KEYS))
    texts, labels = (_names(table, name, place) for name in ("texts", "labels"))
    check(len(texts) in (1, 2), f"{place}texts", list(texts), "the names of one or two columns")
    check(len(labels) != 1, f"{place}labels", list(labels),
          "the names of two classes or more, or [] for numbers")  # fmt: skip
    metrics = _names(table, "metrics", place, ("acc",) if labels else OF_NUMBERS)
    known = OF_CLASSES if labels else OF_NUMBERS
    fit = bool(metrics) and set(metrics) <= set(known)
    check(fit, f"{place}metrics", list(metrics),
          f"one or more of {', '.join(known)}, for labels = {_list(labels)}")  # fmt: skip
    check("f1" not in metrics or len(labels) == 2, f"{place}metrics", list(metrics),
          f"without f1, which is of two classes (labels has {len(labels)})")  # fmt: skip
    label = _name(table, "label", place, "label")
    check(label not in texts, f"{place}label", label, "another column than texts has")
    words = _names(table, "words", place, labels)
    check(not labels or len(words) == len(labels), f"{place}words", list(words),
          f"as many as labels, {len(labels)}")  # fmt: skip
    check(bool(labels) or all(map(_is_number, words)), f"{place}words", list(words),
          'texts of numbers, such as "0.5", where labels = []')  # fmt: skip
    splits = {name: _name(table, name, place, name) for name in ("train", "validation")}
    check(len({*splits.values()}) == 2, f"{place}validation", splits["validation"],
          "another file than that of train")  # fmt: skip
    return TuningTask(
        path.stem, texts, labels, metrics, str(path.absolute().parent), str(path),
        {"": (splits["validation"],)}, label, (splits["train"],), words, path.stem,
    )  # fmt: skip


def _list(names: Sequence[str]) -> str:
    return f"[{', '.join(map(repr, names))}]"


def _name(table: Mapping[str, Any], name: str, place: str, default: str) -> str:
    found: str = toml.parse_value(str, table.get(name, default), place + name)
    check(bool(found), place + name, found, "a name")
    return found


def _names(
    table: Mapping[str, Any], name: str, place: str, default: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Return a list of different names. Raises ConfigError if it is missing or anything else."""
    if name not in table and default is None:
        raise ConfigError(f'{place}{name}: must be given, as in {name} = ["one", "two"]')
    found = table.get(name, default)
    fit = isinstance(found, list | tuple) and all(isinstance(n, str) and n for n in found)
    fit = fit and len(set(found)) == len(found)
    check(fit, place + name, found, 'a list of different names, such as ["one", "two"]')
    return tuple(found)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def read_examples(
    task: TuningTask, directory: Path | None, splits: tuple[str, ...]
) -> list[Example]:
    """Return the examples of a split of a task: `task.train` or one of `task.validation`.

    Raises DataError, naming the file and the row, for data that are missing or of another task,
    that have no labels, and for a validation split on which a metric of the task is undefined.
    """
    found = [_example(task, row, where) for where, row in located_rows(task, directory, splits)]
    if not found:
        raise DataError(f"{task.name}: {splits[0]} has no rows; give those of {task.source}")
    if splits in task.validation.values():
        check_defined(task, [example.label for example in found], splits[0])
    return found


def _example(task: TuningTask, row: Row, where: str) -> Example:
    for column in (*task.texts, task.label):
        if column not in row:
            raise DataError(
                f"{where}: no column {column!r} (columns: {', '.join(map(shown, row)) or 'none'});"
                f" these are data of another task, or without labels; {task.name} has"
                f" {', '.join((*task.texts, task.label))}, as in {task.source}"
            )
    return Example(
        tuple(_text(row[column], f"{where}: {column}") for column in task.texts),
        _label(task, row[task.label], f"{where}: {task.label}"),
    )


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{place}: must be a text (got {shown(value)}); correct or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # half a surrogate pair, which JSON can spell
        raise DataError(f"{place}: {shown(value)} is not UTF-8; remove the row") from error
    return value


def _label(task: TuningTask, value: object, place: str) -> float:
    """Return the number of a class, given as number or name, or a number."""
    if task.labels and isinstance(value, str) and value in task.labels:
        return float(task.labels.index(value))
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if task.labels:
        listed = ", ".join(f"{n} {name}" for n, name in enumerate(task.labels))
        fit, wanted = number and value in range(len(task.labels)), f"a class: {listed}"
    else:
        fit, wanted = number and abs(value) <= LARGEST, "a finite number"  # type: ignore[arg-type]
        if task.words:
            low, high = (pick(map(float, task.words)) for pick in (min, max))
            fit = fit and low <= value <= high  # type: ignore[operator]
            wanted = f"a number from {low:g} to {high:g}, as words has"
    if fit:
        return float(value)  # type: ignore[arg-type]
    hint = "give data of this task"
    if value is None or (number and value == NO_LABEL):
        hint = "the row has no label, like those of GLUE's test sets; give a split with labels"
    raise DataError(f"{place}: must be {wanted} (got {shown(value)}); {hint}")


def check_defined(task: TuningTask, gold: Sequence[float], split: str) -> None:
    """Raise DataError if a metric of the task is undefined whatever is predicted of `gold`.

    acc always is defined. f1 needs a row of class 1, and the correlations two different labels.
    """
    for metric in task.metrics:
        constant = metric != "acc" and len(set(gold)) == 1
        if constant and not (metric == "f1" and gold[0] == 1):
            what = task.labels[int(gold[0])] if task.labels else f"{gold[0]:g}"
            raise DataError(
                f"{task.name}: {split}: {metric} is undefined, since the label of all {len(gold):,}"
                f" rows is {what}; give rows with other labels too"
            )


def text_form(task: TuningTask, example: Example) -> str:
    """Return what a text-to-text model reads, as T5's: "rte sentence1: ... sentence2: ..."."""
    texts = dict(zip(task.texts, example.texts, strict=True))
    parts = (f"{column}: {texts[column]}" for column in task.form or task.texts)
    return " ".join((task.prefix, *parts))


def target_words(task: TuningTask) -> tuple[str, ...]:
    """Return `task.words`. Raises ConfigError for a task of one's own, of numbers, without them."""
    if not task.words:
        raise ConfigError(
            f"{task.source}: words: must be given for a text-to-text model where labels = [],"
            ' as in words = ["0.0", "0.5", "1.0"]'
        )
    return task.words


def target_word(task: TuningTask, example: Example) -> str:
    """Return what a text-to-text model has to generate: one of `task.words`.

    Of a number it is the nearest word; of two that are equally near the one whose place, from 0,
    is even, so that STS-B's are rounded as T5's: 2.5 becomes "2.4", and 4.3 becomes "4.4".
    """
    words = target_words(task)
    if task.labels:
        return words[int(example.label)]
    # Decimals, since 4.2 and 4.4 are not equally far from 4.3 in binary.
    away = [round(abs(float(word) - example.label), 9) for word in words]
    return words[min(range(len(away)), key=lambda place: (away[place], place % 2))]
