"""Results of tasks in a run: RUN/eval.json and RUN/eval/TASK.jsonl."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peptrain.errors import CheckpointError
from peptrain.eval.run import WAIT
from peptrain.files import no_links, read_json, write_atomically
from peptrain.runs.directory import RunDir
from peptrain.runs.lock import lock
from peptrain.tasks.measure import Measured, Values

log = logging.getLogger("peptrain")
FOLDER = "eval"
KEYS = ("step", "task", "task_data", "positions", "weights", "scorer")
"""What identifies a result."""


def find(run: RunDir, wanted: Mapping[str, Any]) -> Measured | None:
    """Return the result that was recorded for `wanted`, KEYS and their values; None if none was."""
    try:
        entries = read_json(run.path / "eval.json", list)
    except ValueError:
        return None  # missing, or damaged: then writing reports it
    for entry in reversed(entries):
        same = isinstance(entry, dict) and all(entry.get(k) == wanted[k] for k in KEYS)
        if same and isinstance(entry.get("items"), int):
            rows = _rows_of(run, entry["task"], entry["step"])
            if len(rows) != entry["items"]:
                return None
            about = ("task", "items", "task_data", "groups", *KEYS)
            kept = {k: v for k, v in entry.items() if k not in about}
            values: Values = {k: math.inf if v is None else v for k, v in kept.items()}
            groups = entry.get("groups", {})
            return Measured(entry["task"], len(rows), entry["task_data"], values, groups, rows)
    return None


def _rows_of(run: RunDir, task: str, step: int) -> list[dict[str, Any]]:
    found = (json.loads(line) for line in _lines(run, task))
    return [row for row in found if row.get("step") == step]


def _lines(run: RunDir, task: str) -> Iterator[str]:
    file = run.path / FOLDER / f"{task}.jsonl"
    if not file.is_file():
        return
    with open(file, encoding="utf-8", opener=no_links) as opened:
        yield from opened


def record(run: RunDir, found: Measured, about: Mapping[str, Any]) -> None:
    """Write a result: first the items of its step, in place of earlier ones, then eval.json.

    If that fails, a warning is logged.
    """
    step, file = about["step"], run.path / FOLDER / f"{found.task}.jsonl"
    try:
        with lock(run.path / "eval.json.lock", lambda holder: f"in use by {holder}", WAIT):
            file.parent.mkdir(exist_ok=True)
            others = [line for line in _lines(run, found.task) if not _is_of(line, step)]
            write_atomically(file, "".join([*others, *lines(found, step)]))
            run.append("eval.json", {**found.entry(), **about})
    except (OSError, CheckpointError) as error:
        log.warning("%s: the result could not be saved: %s", file, error)


def _is_of(line: str, step: int) -> bool:
    return line.startswith(f'{{"step": {step}, ')


def record_more(run: RunDir, entry: Mapping[str, Any]) -> None:
    """Append an entry without items to eval.json. If that fails, a warning is logged."""
    try:
        with lock(run.path / "eval.json.lock", lambda holder: f"in use by {holder}", WAIT):
            run.append("eval.json", entry)
    except (OSError, CheckpointError) as error:
        log.warning("%s: the result could not be saved: %s", run.path / "eval.json", error)


def lines(found: Measured, step: int | None) -> list[str]:
    """Return a JSON line for each item."""
    return [json.dumps({"step": step, **row}) + "\n" for row in found.rows]


def write_out(file: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Write results to the file of --out. Raises CheckpointError if that fails."""
    try:
        write_atomically(file, json.dumps(list(entries), indent=1) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"--out {file}: can't be written: {error.strerror}; choose another file"
        ) from error
