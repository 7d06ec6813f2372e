"""RUN@STEP: a run at one of its checkpoints."""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from peptrain.errors import CheckpointError, ConfigError
from peptrain.runs.checkpoint import SUMS, DamagedCheckpoint, available, name_of, step_of
from peptrain.runs.directory import RunDir
from peptrain.runs.ends import config_file, ends
from peptrain.settings.fields import check

log = logging.getLogger("peptrain")


def at(path: Path) -> tuple[Path, int | None]:
    """Split RUN@STEP into the directory and the step. The step of a path that exists is None."""
    found = re.fullmatch(r"(.+)@(\d{1,9})", str(path), re.DOTALL)
    if found is None or os.path.lexists(path):
        return path, None
    return Path(found[1]), int(found[2])


def chosen(path: Path, step: str | None) -> list[Path]:
    """Return RUN@STEP for the value of --step: a step, or all that are kept. None is RUN itself."""
    if step is None:
        return [path]
    _, already = at(path)
    check(re.fullmatch(r"\d{1,9}|all", step) is not None, "--step", step, "a step or all")
    if already is not None:
        raise ConfigError(f"--step: {step} can't be combined with {path}; leave out one of them")
    if step != "all":
        return [Path(f"{path}@{int(step)}")]
    kept = map(step_of, available(RunDir.open(path).checkpoints))
    return [Path(f"{path}@{number}") for number in kept]


def find(run: RunDir, step: int) -> tuple[Path, Path]:
    """Return (directory of checkpoints, configuration) of the checkpoint of `step`.

    An earlier end is found under its own step, even if the longer run has a checkpoint there too.
    Raises CheckpointError, naming the steps that are kept, if there is none.
    """
    for place in (places := _places(run, step)):
        if step in _steps(place):
            file = config_file(run, step) if place == run.path else place / run.config_file.name
            return place / "checkpoints", file
    kept = {step for place in places for step in _steps(place)}
    raise CheckpointError(f"{run.path}@{step}: no checkpoint of that step is kept; {_listed(kept)}")


def _places(run: RunDir, step: int) -> list[Path]:
    """Return the run and its earlier ends in the order in which `step` is looked for."""
    earlier = ends(run)
    named = [end.path for end in earlier if end.step == step]
    return [*named, run.path, *(end.path for end in reversed(earlier))]


def _steps(place: Path) -> list[int]:
    return [step_of(path) for path in available(place / "checkpoints")]


@contextlib.contextmanager
def may_vanish(
    path: Path, expected: bool = True, damaged: list[str] | None = None
) -> Iterator[None]:
    """Leave what reads RUN@STEP, with a warning, if the run's training deletes the checkpoint.

    expected: whether nobody asked for this step, as with `--step all`. Otherwise it is an error.
    damaged: gets the error of a damaged checkpoint, which ends what reads it, and not its caller.
    """
    try:
        yield
    except CheckpointError as error:
        directory, step = at(path)
        here = step is None or any(
            step in _steps(place) for place in _places(RunDir(directory), step)
        )
        if here and damaged is not None and isinstance(error, DamagedCheckpoint):
            damaged.append(str(error))
        elif here or not expected:
            raise
        else:
            log.warning("%s: deleted by the training meanwhile, skipped", path)


def check_done(path: Path, done: Sequence[object], damaged: Sequence[str]) -> None:
    """Raise CheckpointError if checkpoints were damaged, or if nothing was done, as all vanished.

    done, damaged: what was done with the others, and the errors of these.
    """
    if damaged:
        rest = f"; the other {len(done)} are done" if done[1:] else "; the other is done"
        raise CheckpointError("; ".join(damaged) + (rest if done else ""))
    if not done:
        raise CheckpointError(
            f"{path}: the training deleted every checkpoint before it was read; keep more of them"
            " with --train.keep"
        )


def checksums(run: RunDir, step: int) -> str:
    """Return the checksums of the files of a checkpoint, which change with its weights.

    Raises CheckpointError if it is not kept or they can't be read.
    """
    file = find(run, step)[0] / name_of(step) / SUMS
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: can't be read: {error}; choose another step") from error


def _listed(steps: set[int]) -> str:
    if not steps:
        return "the run has none yet"
    return f"choose one of {', '.join(map(str, sorted(steps)))}"
