"""Train a grid of runs and write the comparison table."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from peptrain.comparison.draw import draw
from peptrain.comparison.equal_cost import allot, clock, count_flops, kept
from peptrain.comparison.grid import Grid, GridRun, load_grid, unstated
from peptrain.comparison.summary import Outcome, outcome, summarize
from peptrain.comparison.table import Comparison, as_csv, latex, markdown
from peptrain.comparison.workers import Job, Status, alone, visible_gpus, work
from peptrain.config import RunConfig, as_named, dump, load
from peptrain.data import configured_corpus
from peptrain.display.training import count
from peptrain.distributed.launch import cores, launch
from peptrain.errors import CheckpointError, Interrupted
from peptrain.files import write_atomically
from peptrain.loggers import chosen
from peptrain.models.hf import config_file
from peptrain.runs.directory import RunDir
from peptrain.runs.init_from import contents, sha256
from peptrain.settings import toml
from peptrain.settings.fields import check, check_whole, each_line_once
from peptrain.training.signals import BY_SYSTEM, stop_on_signals
from peptrain.tuning.settle import data_checksum
from peptrain.tuning.tasks import tuning_task

log = logging.getLogger("peptrain")
PARTS = ("runs", "logs", "settings", "costs", "figures")
"""Directories in the output directory."""


@each_line_once()
def compare(
    grid: Path,
    out: Path,
    workers: int | None = None,
    watch: Callable[[Status], None] = lambda status: None,
    debug: bool = False,
) -> Comparison:
    """Train the runs of the grid file `grid` that are missing and write the table to `out`.

    out/runs/NAME/            run directories, as `peptrain train` creates them
        logs/NAME.log         output of their processes
        settings/NAME.toml    configurations they were started with
        costs/NAME.json       FLOPs or seconds per step, unless the grid is at equal tokens
        table.md, table.csv, table.tex, runs.json
        figures/NAME.svg, NAME.csv  if matplotlib is installed

    workers: number of concurrent runs. Unset: one per GPU, or one per core without GPUs.
    debug: whether the log of a run that fails has the traceback.

    Finished and diverged runs are read, interrupted runs resumed, failed runs retried. A changed
    grid adds runs. Runs that are no longer in the grid are left in place.

    Raises what `load_grid` and `allot` raise; DataError if the corpus is missing or shorter than
    one window; CheckpointError if another call is working in `out`, if a file in it can't be read
    or written, if a run's config.toml was changed, or if the corpus was elsewhere before;
    PeptrainError if steps can't be timed; Interrupted after a signal such as Ctrl-C or SIGTERM,
    once the running runs are saved and the table is written.
    """
    check_whole("--workers", workers, 1)
    ranks = launch().size
    check(ranks == 1, "WORLD_SIZE", ranks, "unset: compare starts its own processes")
    asked = load_grid(grid)
    for names in sorted({run.config.train.log_to for run in asked.runs}):
        chosen(names)
    data, epoch = _training_data(asked.baseline.config)
    asked = _identified(asked, data)
    gpus = _gpus(asked.runs)
    _make(out)
    with _naming_files(), alone(out) as lock:
        _refuse_another_place(asked.runs, out)
        planned = _within_budget(asked, out, gpus, lock)
        _tell_of_other_vocabularies(planned, out)
        before = [outcome(run, _place(run, out)) for run in planned]
        jobs = [_job(one, out, debug) for one in before if one.end is None and not one.diverged]
        many = workers or len(gpus) or cores()
        status = work(jobs, many, gpus, lock, len(planned) - len(jobs), watch)
        with stop_on_signals() as stop:  # so that all tables are of one call
            failed = status.failed
            outcomes = [outcome(o.planned, o.run, failed.get(o.run.path.name, "")) for o in before]
            made = Comparison(summarize(outcomes, asked.equal), asked.equal, epoch,
                              unstated(planned), *_of_tuning(asked.baseline.config))  # fmt: skip
            _write(out, made, outcomes)
    if code := status.interrupted or stop.code or (BY_SYSTEM if status.saved else 0):
        done = sum(one.end is not None or one.diverged for one in outcomes)
        raise Interrupted(
            f"stopped and saved, {done} of {len(planned)} runs finished; run the same command to"
            " continue",
            code,
        )
    return made


def _make(out: Path) -> None:
    if RunDir(out).config_file.exists():
        raise CheckpointError(f"--out {out}: is a run; choose another directory")
    for part in PARTS:
        if (out / part).is_symlink():
            raise CheckpointError(
                f"{out / part}: a link, which is never followed; replace it by a directory"
            )
        if (out / part).exists() and not (out / part).is_dir():
            raise CheckpointError(
                f"{out / part}: not a directory; move it away and run the same command again"
            )
    try:
        for part in ("runs", "logs", "settings"):
            (out / part).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"--out {out}: can't be created: {error.strerror}; choose another directory"
        ) from error


@contextlib.contextmanager
def _naming_files() -> Iterator[None]:
    """Raise CheckpointError with the repair for a file that can't be read or written."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        how = "free some space" if full else "move it away, or change its permissions"
        raise CheckpointError(
            f"{error.filename}: {error.strerror}; {how}, and run the same command again"
        ) from error


def _training_data(config: RunConfig[Any]) -> tuple[str, int]:
    """Return what identifies the data of all runs, and the tokens of one pass over a corpus.

    The default corpus is prepared here, once, before any run.
    """
    if config.tune.task:
        return data_checksum(config), 0
    corpus, seq_len = configured_corpus(config.data.path), config.train.seq_len
    return corpus.fingerprint, corpus.windows(seq_len) * seq_len


def _of_tuning(config: RunConfig[Any]) -> tuple[str, int]:
    """Return the result by which a fine-tuning is judged, and its epochs."""
    task = config.tune.task
    return (tuning_task(task).best_by, config.tune.epochs) if task else ("", 0)


def _identified(grid: Grid, data: str) -> Grid:
    """Add to each run the fingerprint of its data and the hashes of the files it names."""
    weights, text = cache(contents), cache(sha256)

    def identity(config: RunConfig[Any]) -> str:
        start, file = config.continue_from or config.init_from, config_file(config.model)
        return (weights(start) if start else "") + (text(file) if file else "")

    runs = [replace(run, data=data + identity(run.config)) for run in grid.runs]
    return replace(grid, runs=runs)


def _within_budget(grid: Grid, out: Path, gpus: Sequence[str], lock: int) -> Sequence[GridRun]:
    if grid.equal == "tokens":
        return grid.runs
    measure = count_flops if grid.equal == "flops" else clock(out, gpus, lock)
    return allot(grid, kept(out / "costs", grid.equal, measure))


def _place(run: GridRun, out: Path) -> RunDir:
    """Find the directory of a run by its digest, even if its readable name has changed."""
    made = (out / "runs").glob(f"*-{run.digest}")
    place = RunDir(next(made, out / "runs" / run.name))
    if not place.config_file.is_file():
        if any(place.metrics()):
            raise CheckpointError(
                f"{place.path}: config.toml is missing; restore it from"
                f" {out / 'settings' / place.path.name}.toml, or move the run away"
            )
        return place
    found = as_named(load(place.config_file), run.written)
    if dump(found) != dump(run.named):
        raise CheckpointError(
            f"{place.path}: config.toml differs from the grid's settings; restore it from"
            f" {out / 'settings' / place.path.name}.toml, or move the run away"
        )
    return place


def _refuse_another_place(runs: Sequence[GridRun], out: Path) -> None:
    """Raise CheckpointError if the runs in `out` are these, but for the path of the same corpus.

    They would be trained again, as after a directory was copied to another machine.
    """
    made = {place.name[-len(runs[0].digest) :]: place for place in (out / "runs").glob("*-*")}
    if any(run.digest in made for run in runs):
        return
    paths = set[str]()
    for place in made.values():
        if (file := place / "config.toml").is_file():
            data = toml.read(file, "").get("data")
            paths |= {str(data["path"])} if isinstance(data, Mapping) and "path" in data else set()
    for path in sorted(paths):
        if many := sum(run.digest_at(Path(path)) in made for run in runs):
            raise CheckpointError(
                f"--out {out}: has {count(many, 'run')} of this grid, with the same corpus at"
                f" {path}; put it there (no link, which is followed) and write data.path ="
                f" {path!r} in [base], or choose another directory"
            )


def _tell_of_other_vocabularies(runs: Sequence[GridRun], out: Path) -> None:
    """Warn of runs of 0.1.0, whose models have the preset's vocabulary and not the corpus's."""

    def has(digest: str) -> bool:
        return any((out / "runs").glob(f"*-{digest}"))

    older = [run for run in runs if has(run.digest_of_0_1_0) and not has(run.digest)]
    if older:
        model = older[0].config.model
        log.warning(
            "--out %s: found %s of peptrain 0.1.0 with the vocabulary of the preset %s; the grid"
            " now trains with that of the corpus (%s); to keep what is there, write model.preset ="
            ' "%s" in [base]', out, count(len(older), "run"), model.preset, model.vocab_size,
            model.preset,
        )  # fmt: skip


def _job(one: Outcome, out: Path, debug: bool) -> Job:
    name = one.run.path.name
    settings = out / "settings" / f"{name}.toml"
    write_atomically(settings, dump(one.planned.config))
    log = out / "logs" / f"{name}.log"
    return Job(name, one.run.path, settings, log, one.planned.steps, debug)


def _gpus(planned: Sequence[GridRun]) -> list[str]:
    if all(run.config.train.device == "cpu" for run in planned):
        return []
    return visible_gpus(os.environ, torch.cuda.device_count())


def _write(out: Path, made: Comparison, outcomes: Sequence[Outcome]) -> None:
    write_atomically(out / "table.md", markdown(made))
    write_atomically(out / "table.csv", as_csv(made))
    write_atomically(out / "table.tex", latex(made))
    runs = [
        {
            "run": str(one.run.path.relative_to(out)),
            "configuration": one.planned.label,
            "method": one.planned.method,
            "settings": dict(one.planned.settings),
            "lr": one.planned.lr,
            "seed": one.planned.seed,
            "steps": one.planned.steps,
            "tokens": one.planned.tokens,
            "cost": one.planned.cost,
            "state": one.state,
            "error": one.error or None,
            **{key: value for key, value in (one.end or {}).items() if key != "event"},
        }
        for one in outcomes
    ]
    lines = [{**asdict(line), "perplexity": None if made.tuned else line.perplexity}
             for line in made.lines]  # fmt: skip
    said = {"equal": made.equal, "caption": made.caption, "notes": made.notes}
    content = {**said, "runs": runs, "configurations": lines}
    write_atomically(out / "runs.json", json.dumps(content, indent=1) + "\n")
    draw(out, runs, lines, said)
