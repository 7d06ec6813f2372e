"""Make a run longer. Its earlier end moves to RUN/ends/STEP.

RUN/ends/300/config.toml      the configuration until then
             metrics.jsonl    the rows that were taken back
             checkpoints/     those that were taken back
             longer.json      what was done, with a checksum
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from peptrain.config import RunConfig, dump, load
from peptrain.errors import CheckpointError, ConfigError
from peptrain.files import read_json_object, scratch, write_atomically
from peptrain.methods.base import Method
from peptrain.optim.schedule import Schedule, ScheduleConfig, build
from peptrain.runs.checkpoint import available, step_of
from peptrain.runs.directory import RunDir
from peptrain.settings.fields import check_whole, quiet

RECORD = "longer.json"
CHECKSUM = "sha256"


@dataclass(frozen=True)
class End:
    """An earlier end of a run."""

    path: Path
    step: int
    """The number of steps that the run had."""
    start: int
    """The step after which the longer run departs from it."""


def ends(run: RunDir) -> list[End]:
    """Return the earlier ends of a run, oldest first. Raises CheckpointError if one is damaged."""
    files = [file for file in run.ends.glob(f"*/{RECORD}") if file.parent.name.isdecimal()]
    if (pending := run.path / RECORD).exists():  # a kill interrupted the move, or it is under way
        files.append(pending)
    found = (End(run.ends / str(r["step"]), r["step"], r["start"]) for r in map(_read, files))
    return sorted(found, key=lambda end: end.step)


def config_file(run: RunDir, step: int) -> Path:
    """Return the configuration with which the checkpoint of `step` in RUN/checkpoints was made."""
    file = run.config_file
    for end in reversed(ends(run)):
        earlier = end.path / file.name
        if step > end.start or not earlier.exists():
            break
        file = earlier
    return file


def lengthen(run: RunDir, steps: int | None, schedule: ScheduleConfig | None) -> None:
    """Give a run `steps` steps, and the settings of `schedule` that are not None.

    With wsd the run continues from its last checkpoint before the decay, with a constant rate from
    its last one. With other curves, whose rates depend on the number of steps from the beginning,
    `schedule` must be given, and the run continues from its last checkpoint. Everything later moves
    to RUN/ends. A kill at any moment leaves the run as it was or a longer one. Requires the run's
    lock. Completes a move that was interrupted before.

    Raises ConfigError for fewer steps and for settings that contradict each other, CheckpointError
    if no checkpoint serves or the directory cannot be written.
    """
    try:
        _complete(run)
        if steps is None and schedule is None:
            return
        old = load(run.config_file)
        new = _longer(old, steps, schedule)
        if new == old:
            return  # the same command again, after a kill
        start = _start(run, old, new, given=schedule is not None)
        text = dump(new)
        record = {"step": old.train.steps, "start": start, "config": text}
        write_atomically(run.path / RECORD, json.dumps({**record, CHECKSUM: _sum(record)}) + "\n")
        _complete(run)
    except OSError as error:
        raise CheckpointError(
            f"{run.path}: can't be made longer: {error.filename or run.path}: {error.strerror};"
            " repeat the command when that is mended"
        ) from error


def _longer(
    old: RunConfig[Method], steps: int | None, schedule: ScheduleConfig | None
) -> RunConfig[Method]:
    check_whole("train.steps", steps, 1)
    before = old.train.steps
    wanted = before if steps is None else steps
    chosen = _given(schedule)
    new = replace(
        old,
        train=replace(old.train, steps=wanted),
        schedule=replace(old.schedule, **chosen),
    )
    if wanted < before or (wanted == before and new != old):
        what = f"more than the run's {before}" + (", to give it another schedule" if chosen else "")
        raise ConfigError(
            f"train.steps: must be {what} (got {wanted}); to branch off earlier start a new run"
            f" with `peptrain train {old.method.name} --continue-from RUN@STEP`"
        )
    with quiet():
        _rates(new)
    return new


def _given(schedule: ScheduleConfig | None) -> dict[str, Any]:
    if schedule is None:
        return {}
    values = {field.name: getattr(schedule, field.name) for field in fields(schedule)}
    return {name: value for name, value in values.items() if value is not None}


def _start(run: RunDir, old: RunConfig[Method], new: RunConfig[Method], *, given: bool) -> int:
    """Return the step from which the longer run continues, 0 for the beginning."""
    saved = [step_of(path) for path in available(run.checkpoints)]
    same, kind = agreeing_steps(old, new.train.steps), old.schedule.kind
    if kind == "wsd" and (serving := [step for step in saved if step <= same]):
        return serving[-1]
    last = saved[-1] if saved else 0
    if last <= same or given:
        return last
    why = (
        f"the decay began at step {same}, and no checkpoint before it was kept"
        if kind == "wsd"
        else f"with {kind} the rates of {new.train.steps} steps differ from step {same} on"
    )
    raise ConfigError(
        f"train.steps: {why}; give the schedule from step {last} on too, such as --schedule.kind"
        " constant"
    )


def agreeing_steps(config: RunConfig[Method], steps: int) -> int:
    """Return how many first steps have the same rate in a run of `steps` steps as in `config`."""
    with quiet():
        now = _rates(config)
        other = _rates(replace(config, train=replace(config.train, steps=steps)))
    most = min(config.train.steps, steps)
    return next((t for t in range(most) if now(t) != other(t)), most)


def stable_steps(config: RunConfig[Method]) -> int | None:
    """Return the step up to which a checkpoint serves any longer run with wsd, None without it."""
    if config.schedule.kind != "wsd":
        return None
    return agreeing_steps(config, 2 * config.train.steps)


def _rates(config: RunConfig[Method]) -> Schedule:
    return config.method.schedule(build(config.schedule, config.train.steps))


def _complete(run: RunDir) -> None:
    """Carry out what RUN/longer.json says, where a kill has not let it: each step is idempotent."""
    pending = run.path / RECORD
    if not pending.exists():
        return
    record = _read(pending)
    end, start = run.ends / str(record["step"]), record["start"]
    if run.config_file.read_text(encoding="utf-8") != record["config"]:
        (end / run.checkpoints.name).mkdir(parents=True, exist_ok=True)
        write_atomically(end / run.config_file.name, run.config_file.read_text(encoding="utf-8"))
        write_atomically(end / run.metrics_file.name, run.rows_after(start))
        for path in available(run.checkpoints):
            moved = end / run.checkpoints.name / path.name
            if step_of(path) > start:
                path.replace(moved)
            elif step_of(path) == record["step"] and not moved.exists():
                _copy(path, moved)  # the longer run continues from it
        write_atomically(run.config_file, record["config"])
    pending.replace(end / RECORD)


def _copy(path: Path, to: Path) -> None:
    with scratch(to) as temporary:
        shutil.copytree(path, temporary, dirs_exist_ok=True)
        temporary.replace(to)


def _read(file: Path) -> dict[str, Any]:
    try:
        record = read_json_object(file)
        expected = record.pop(CHECKSUM)
        if expected != _sum(record):
            raise ValueError("does not match its checksum")
        kinds = {"step": int, "start": int, "config": str}
        if {key: type(value) for key, value in record.items()} != kinds:
            raise ValueError("not a record of a longer run")
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{file}: damaged ({error}); restore the file from a copy of the run"
        ) from error
    return record


def _sum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
