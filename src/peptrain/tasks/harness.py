"""The same tasks by the lm-evaluation-harness, from the same local copies, without network."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from peptrain.errors import DataError, Unsupported
from peptrain.models.auto import load_tokenizer
from peptrain.runs.tokenizer import copy_run_tokenizer
from peptrain.tasks.measure import Judge, Measured, checksum, mean, summary
from peptrain.tasks.subject import Subject
from peptrain.tasks.table import Item, Row, Task

PREFIX = "peptrain_"
"""Before the names of tasks, so that they are not the harness's own, which download."""
GENERATED = 48
"""Most tokens that the harness's swde generates. The model has to have room for more than these."""


def measure_by_harness(
    subject: Subject,
    judge: Judge,
    task: Task,
    rows: Sequence[Row],
    chosen: Sequence[tuple[int, Item]],
    batch_size: int = 8,
) -> Measured:
    """Measure a task as `measure` does, but by the harness: its texts, its scores, its metrics.

    rows: all rows of the data set. Raises Unsupported if the harness is not installed, DataError
    for a model that reads too few positions to generate text.
    """
    lm_eval, of_model = _imported()
    if task.kind == "text" and judge.positions <= GENERATED:
        raise DataError(
            f"{task.name}: generates {GENERATED} tokens, but the model reads only"
            f" {judge.positions} positions; leave the task out, or give more with --positions"
        )
    with tempfile.TemporaryDirectory() as folder, _without_processes():
        lm = of_model(
            pretrained=judge.model, tokenizer=_tokenizer(subject, Path(folder)),
            max_length=judge.positions, batch_size=batch_size, device=str(judge.model.device),
        )  # fmt: skip
        parts = _parts(task, rows, chosen)
        asked = [
            _asked(Path(folder), task, name, [rows[n] for n in numbers])
            for name, numbers in parts.items()
        ]
        # Without the harness's own tasks, whose thousands of files take 10 s to list.
        manager = import_module("lm_eval.tasks").TaskManager(
            include_path=folder, include_defaults=False
        )
        made = lm_eval.simple_evaluate(
            model=lm, tasks=asked, task_manager=manager, bootstrap_iters=1000, log_samples=True,
        )  # fmt: skip
    found = {
        numbers[sample["doc_id"]]: _row(task, sample)
        for name, numbers in parts.items()
        for sample in made["samples"][PREFIX + name]
    }
    numbered = [{"id": number, **found[number]} for number, _ in chosen]
    if task.kind == "text":  # the harness gives no standard error
        whole, groups = summary(task, numbered)
    else:
        values = {name: _values(made["results"][PREFIX + name]) for name in parts}
        whole = mean(list(values.values())) if task.name == "blimp" else values[task.name]
        groups = values if task.name == "blimp" else {}
    return Measured(task.name, len(chosen), checksum(chosen), whole, groups, numbered)


def _imported() -> tuple[Any, Any]:
    """Return the harness and its class of models, which needs packages of its own."""
    try:
        return import_module("lm_eval"), import_module("lm_eval.models.huggingface").HFLM
    except ImportError as error:
        raise Unsupported(
            f"--harness: needs the lm-evaluation-harness ({error}); install it with"
            " pip install 'peptrain[eval]'"
        ) from error


@contextlib.contextmanager
def _without_processes() -> Iterator[None]:
    """Let the harness estimate the error of a perplexity in this process."""
    key = "DISABLE_MULTIPROC"
    before = os.environ.get(key)
    os.environ[key] = "1"
    try:
        yield
    finally:
        os.environ.pop(key) if before is None else os.environ.update({key: before})


def _tokenizer(subject: Subject, folder: Path) -> Any:
    """Return the tokenizer as transformers loads it, of a run as an export has it."""
    if subject.run is None:
        return load_tokenizer(subject.path)
    (place := folder / "tokenizer").mkdir()
    copy_run_tokenizer(subject.run, place)
    return load_tokenizer(place)


def _parts(
    task: Task, rows: Sequence[Row], chosen: Sequence[tuple[int, Item]]
) -> dict[str, list[int]]:
    """Return the row numbers by task of the harness, which has one for each paradigm of BLiMP."""
    if task.name != "blimp":
        return {task.name: [number for number, _ in chosen]}
    parts: dict[str, list[int]] = {}
    for number, _ in chosen:
        parts.setdefault(str(rows[number]["UID"]), []).append(number)
    return parts


def _asked(folder: Path, task: Task, name: str, rows: Sequence[Row]) -> Any:
    """Return a task on `rows` as the harness takes it: the name of a file's, or a task."""
    if task.kind == "text":
        return _text_task(task, name, rows)
    _write_task(folder, task, name, rows)
    return PREFIX + name


def _text_task(task: Task, name: str, rows: Sequence[Row]) -> Any:
    """Return the harness's task with `rows` as its data. It is a class that takes no settings."""
    module, _, stock = task.stock.rpartition(".")
    columns = task.columns.split(", ")
    kept = [{column: row[column] for column in columns} for row in rows]
    data = {task.splits[0]: import_module("datasets").Dataset.from_list(kept)}

    def download(self: Any, *args: object) -> None:
        self.dataset = data

    parent = getattr(import_module(f"lm_eval.tasks.{module}"), stock)
    made = type(stock, (parent,), {"download": download})()
    made.config.task = PREFIX + name
    return made


def _write_task(folder: Path, task: Task, name: str, rows: Sequence[Row]) -> None:
    """Write the data of a task and a task file that includes the harness's own."""
    root = Path(str(import_module("lm_eval").__file__)).parent / "tasks"
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(_as_stock(task, row)) + "\n" for row in rows), "utf-8")
    about: dict[str, Any] = {
        "include": str(root / (task.stock or "blimp/_template_yaml")),
        "task": PREFIX + name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {"validation": str(data)},
            "cache_dir": str(folder / "cache"),
        },
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
    }
    (folder / f"{name}.yaml").write_text(json.dumps(about), "utf-8")  # JSON is YAML


def _as_stock(task: Task, row: Row) -> Row:
    """Return the row in the columns that the harness reads: BoolQ's answer is its label."""
    if task.name == "boolq" and "label" not in row:
        return {**row, "label": int(row["answer"])}
    return row


def _values(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics by our names: "acc,none" and "acc_stderr,none"."""
    named = {key.partition(",")[0]: value for key, value in result.items() if "," in key}
    return {key: float(value) for key, value in named.items() if isinstance(value, int | float)}


def _row(task: Task, sample: Mapping[str, Any]) -> dict[str, Any]:
    found = sample["filtered_resps"]
    if task.kind == "page":
        value = found[0]
        return {"log_likelihoods": [float(value[0] if isinstance(value, list | tuple) else value)]}
    if task.kind == "text":
        return {"generated": found[0], "correct": bool(sample["contains"])}
    return {
        "log_likelihoods": [float(one[0]) for one in found],
        "correct": bool(sample["acc"]),
        **({"correct_norm": bool(sample["acc_norm"])} if "acc_norm" in sample else {}),
    }
