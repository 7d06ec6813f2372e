"""How a training begins: in a new directory, at a run's latest checkpoint, at another run's."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from peptrain.config import RunConfig, dump
from peptrain.distributed.launch import check_parallel, launch
from peptrain.distributed.world import World
from peptrain.errors import CheckpointError, ConfigError
from peptrain.loggers import chosen
from peptrain.loggers.sending import Loggers, sending
from peptrain.methods.base import Method
from peptrain.models.hf import config_file
from peptrain.optim.schedule import ScheduleConfig
from peptrain.runs import checkpoint
from peptrain.runs.build import checked_config, run_config
from peptrain.runs.directory import LOCK, RunDir, first_free
from peptrain.runs.ends import config_file as config_file_at
from peptrain.runs.ends import lengthen
from peptrain.runs.identity import check_settings, other_settings
from peptrain.runs.init_from import branching_point
from peptrain.runs.select import at
from peptrain.text import quoted
from peptrain.training.metrics import MetricsLog
from peptrain.training.objective import Objective
from peptrain.training.state import TrainState

log = logging.getLogger("peptrain")
APPEARS = 60.0
"""Seconds in which a file that one machine wrote appears on another one: NFS keeps what it knows of
a directory for up to 60."""


def to_resume(path: Path) -> RunDir:
    """Open a run to resume. Raises CheckpointError for RUN@STEP, which can only be branched."""
    directory, step = at(path)
    if step is not None:
        raise CheckpointError(
            f"{path}: a run is resumed from its latest checkpoint; resume {directory}, or start a"
            f" new run from step {step} with `peptrain train METHOD --continue-from {path}`"
        )
    return RunDir.open(directory)


def make_longer(run: RunDir, steps: int | None, schedule: ScheduleConfig | None) -> None:
    """Call `lengthen` on a run whose config.toml is that of its latest checkpoint.

    Raises CheckpointError for an edited one, before anything is moved, and what `lengthen` raises.
    """
    if steps is not None or schedule is not None:
        _, config, _ = checked_config(run.path)
        if config.tune.task:
            raise ConfigError(
                f"train.steps: follows from tune.epochs in {run.path}, which is a fine-tuning;"
                " start a new one with more epochs"
            )
    lengthen(run, steps, schedule)


def resumed_config(run: RunDir) -> RunConfig[Method]:
    """Return the configuration of a run to resume, maybe with another number of processes.

    A train.parallel that does not fit it is named in a warning, and what fits is used.
    """
    config, size = run_config(run), launch().size
    try:
        check_parallel(config.train.parallel, size)
    except ConfigError as error:
        log.warning("%s; what fits is used", error)
    rows = config.train.batch_size
    if rows % size:
        raise ConfigError(
            f"train.batch_size: its {rows} rows can't be divided among {size} processes; resume the"
            " run with a number of processes that divides them"
        )
    return config


def first_checkpoint(
    config: RunConfig[Method], run: RunDir | None, identity: Mapping[str, Any], here: World
) -> checkpoint.Checkpoint | None:
    """Return the checkpoint to continue from: the run's latest, or that of another run, if any.

    Of another run no rows are in the metrics of this one.
    """
    if run is None:
        if config.continue_from is None:
            return None
        return here.on_all(lambda: replace(branching_point(config, identity), rows=0))
    saved = latest(run, here)
    if saved is not None:
        here.on_all(lambda: _check_settings(saved, run, identity))
    return saved


def _check_settings(saved: checkpoint.Checkpoint, run: RunDir, identity: Mapping[str, Any]) -> None:
    then = run_config(run, config_file_at(run, saved.step))
    check_settings(saved, then, run.path, identity)


def latest(run: RunDir, here: World) -> checkpoint.Checkpoint | None:
    """Return the latest complete checkpoint that rank 0 sees, on every rank, None without one.

    Raises CheckpointError, on every rank, if one of them can't read it, or if the run had some and
    has none any more: it would begin again and its rows would be dropped.
    """
    found: list[checkpoint.Checkpoint | None] = []
    here.on_main(lambda: found.append(_latest(run)))
    step = here.agree(found[0].step if found and found[0] else None)
    if step is None:
        return None
    return here.on_all(lambda: found[0] if found else checkpoint.at_step(run.checkpoints, step))


def _latest(run: RunDir) -> checkpoint.Checkpoint | None:
    saved = checkpoint.latest(run.checkpoints)
    if saved is None and (row := run.newest("checkpoint")) is not None:
        raise CheckpointError(
            f"{run.checkpoints}: is empty, but {run.metrics_file.name} has a checkpoint of step"
            f" {row['step']}; restore them, or train from the beginning with `peptrain train"
            f" {run_config(run).method.name} --config {quoted(run.config_file)} --run NEW`"
        )
    return saved


def check_shared(run: RunDir, here: World) -> None:
    """Raise CheckpointError, on every rank, unless all see the directory that rank 0 has locked."""
    if here.size == 1:
        return
    file = run.path / LOCK

    def seen() -> str | None:
        return file.read_text("utf-8", errors="replace") if file.is_file() else None

    locked = here.agree(seen())

    def check() -> None:
        deadline = time.monotonic() + APPEARS
        while seen() != locked:
            if time.monotonic() >= deadline:
                raise CheckpointError(
                    f"{run.path}: not the directory that rank 0 trains in, whose lock is not there;"
                    " put the run on a file system that all machines share, under the same path"
                )
            time.sleep(0.1)

    here.on_all(check)


def create_run(
    config: RunConfig[Method],
    objective: Objective,
    here: World,
    held: contextlib.ExitStack,
    saved: checkpoint.Checkpoint | None,
) -> RunDir:
    """Create the run directory, with the checkpoint of another run to continue from, if any.

    Its lock is released when `held` is closed.
    """
    if not config.method.has_dense_equivalent:
        log.warning("%s has no dense equivalent: eval runs the model itself, and `peptrain export`"
                    " %s", config.method.name, "needs --form factorised" if config.method.activation
                    else "is not possible, unless the method has an `activation`")  # fmt: skip
    path = config.run

    def make() -> None:
        nonlocal path
        path = path or first_free(Path("runs"), config.method.name)
        text = dump(config)
        fill = partial(_first_files, config=config, objective=objective, saved=saved)
        held.enter_context(RunDir.create(path, text, fill))

    here.on_main(make)
    path = here.agree(path)
    assert path is not None
    return RunDir(path)


def _first_files(
    run: RunDir,
    config: RunConfig[Method],
    objective: Objective,
    saved: checkpoint.Checkpoint | None,
) -> None:
    """Write what else resume, eval and export need besides their checkpoints and the corpus."""
    objective.write_tokenizer(run)
    if saved is not None:
        own = replace(saved, settings=other_settings(config))
        checkpoint.save(run.checkpoints, own, checkpoint.Keep(1))
    if file := config_file(config.model):
        shutil.copyfile(file, run.model_file)
    if (prompts := config.train.sample_prompts) and config.train.sample_every:
        shutil.copyfile(prompts, run.prompts_file)


def loggers_of(
    config: RunConfig[Method], run: RunDir, step: int
) -> contextlib.AbstractContextManager[Loggers]:
    """Return the open loggers of a run that begins or continues at `step`, before its rewind.

    A run that had ended there has been logged. It is only evaluated again, with the same result.
    """
    if step == config.train.steps and run.newest("end") is not None:
        return contextlib.nullcontext(Loggers())
    settings = tomllib.loads(run.config_file.read_text(encoding="utf-8"))
    return sending(chosen(config.train.log_to), run.path, settings, step)


def checkpoint_row(state: TrainState) -> dict[str, int]:
    """Return the values of the row of a checkpoint."""
    return {"step": state.step, "state_bytes": state.state_bytes[-1]}


def take_back_later(
    config: RunConfig[Method], run: RunDir, state: TrainState, metrics_log: MetricsLog
) -> None:
    """Take back rows after the checkpoint of `state`, and checkpoints that a kill left.

    Writes the checkpoint's row if the process was killed before it did.
    """
    run.rewind(state.step, state.rows)
    checkpoint.delete_old(run.checkpoints, state.step, state.keep)
    metrics_log.continue_clocks()
    if config.continue_from is not None and state.step == at(config.continue_from)[1]:
        return  # a copy of the other run's checkpoint
    written = (row["step"] for row in run.metrics() if row["event"] == "checkpoint")
    if state.state_bytes and state.step not in written:
        metrics_log.record("checkpoint", **checkpoint_row(state))


def how_to_resume(run: RunDir) -> str:
    """Name the command that resumes `run`."""
    return f"resume with `peptrain resume {quoted(run.path)}`"
