"""Several trainings side by side: the demo and its table, and grids of runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from peptrain.comparison.equal_cost import allot, clock, count_flops, kept
from peptrain.comparison.grid import Grid, GridRun, load_grid, unstated
from peptrain.comparison.summary import Outcome, outcome, summarize
from peptrain.comparison.table import Comparison, as_csv, latex, markdown
from peptrain.comparison.workers import Job, Status, alone, visible_gpus, work
from peptrain.config import RunConfig, dump, load
from peptrain.data import Corpus, default_corpus
from peptrain.errors import CheckpointError, Interrupted
from peptrain.files import write_atomically
from peptrain.models.hf import config_file
from peptrain.runs.directory import RunDir
from peptrain.settings.fields import check, each_line_once
from peptrain.training.init_from import contents, sha256


@each_line_once()
def compare(
    grid: Path,
    out: Path,
    workers: int | None = None,
    watch: Callable[[Status], None] = lambda status: None,
) -> Comparison:
    """Train what is missing of the grid in the file `grid`, and write its table into `out`.

    out/runs/NAME/            the runs, as `peptrain train` makes them
        logs/NAME.log         what their processes said
        settings/NAME.toml    what they were started with
        costs/NAME.json       FLOPs or seconds of a step, unless the grid is at equal tokens
        table.md, table.csv, table.tex, runs.json

    workers: runs at a time; unset, one per GPU, or else one per core. Finished and diverged runs
    are read, interrupted ones resumed, failed ones tried again. A changed grid adds runs; those
    that are no longer in it stay where they are. Raises what `load_grid` and `allot` do; DataError
    without a corpus of a window or more; CheckpointError while another call works in `out`, if it
    can't be made, or for a run whose config.toml was changed; PeptrainError for steps that can't be
    timed; Interrupted after Ctrl-C or SIGTERM, when the running ones were saved.
    """
    check(workers is None or workers >= 1, "--workers", workers, ">= 1")
    ranks = os.environ.get("WORLD_SIZE", "1")
    check(ranks == "1", "WORLD_SIZE", ranks, "unset: compare starts its own processes")
    asked = load_grid(grid)
    path, seq_len = asked.baseline.config.data.path, asked.baseline.config.train.seq_len
    corpus = Corpus.open(path) if path else default_corpus()  # made before any run waits for it
    epoch = corpus.windows(seq_len) * seq_len
    asked = _identified(asked, corpus)
    gpus = _gpus(asked.runs)
    _make(out)
    with alone(out) as lock:
        planned = _within_budget(asked, out, gpus, lock)
        before = [outcome(run, _place(run, out)) for run in planned]
        jobs = [_job(one, out) for one in before if one.end is None and not one.diverged]
        many = workers or len(gpus) or cores()
        status = work(jobs, many, gpus, lock, len(planned) - len(jobs), watch)
        failed = status.failed
        outcomes = [outcome(o.planned, o.run, failed.get(o.run.path.name, "")) for o in before]
        made = Comparison(summarize(outcomes), asked.equal, epoch, unstated(planned))
        _write(out, made, outcomes)
    if status.interrupted:
        done = sum(one.end is not None or one.diverged for one in outcomes)
        raise Interrupted(
            f"stopped and saved, {done} of {len(planned)} runs finished; the same command goes on"
        )
    return made


def _make(out: Path) -> None:
    try:
        for part in ("runs", "logs", "settings"):
            (out / part).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"--out {out}: can't be made: {error.strerror}; choose another directory"
        ) from error


def _identified(grid: Grid, corpus: Corpus) -> Grid:
    """With what distinguishes the corpus, and the files that runs name, beside their paths."""
    weights, text = cache(contents), cache(sha256)

    def identity(config: RunConfig[Any]) -> str:
        start, file = config.init_from, config_file(config.model)
        return (weights(start) if start else "") + (text(file) if file else "")

    runs = [replace(run, data=corpus.fingerprint + identity(run.config)) for run in grid.runs]
    return replace(grid, runs=runs)


def _within_budget(grid: Grid, out: Path, gpus: Sequence[str], lock: int) -> Sequence[GridRun]:
    if grid.equal == "tokens":
        return grid.runs
    measure = count_flops if grid.equal == "flops" else clock(out, gpus, lock)
    return allot(grid, kept(out / "costs", grid.equal, measure))


def _place(run: GridRun, out: Path) -> RunDir:
    """Its directory, whatever the grid called it when it was made."""
    made = (out / "runs").glob(f"*-{run.digest}")
    place = RunDir(next(made, out / "runs" / run.name))
    if place.config_file.is_file() and dump(load(place.config_file)) != dump(run.config):
        raise CheckpointError(
            f"{place.path}: its config.toml is not what the grid asks for; copy it anew from"
            f" {out / 'settings' / place.path.name}.toml, or move the run away"
        )
    return place


def _job(one: Outcome, out: Path) -> Job:
    name = one.run.path.name
    settings = out / "settings" / f"{name}.toml"
    write_atomically(settings, dump(one.planned.config))
    log = out / "logs" / f"{name}.log"
    return Job(name, one.run.path, settings, log, one.planned.steps)


def cores() -> int:
    """Those that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


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
    lines = [{**asdict(line), "perplexity": line.perplexity} for line in made.lines]
    said = {"equal": made.equal, "caption": made.caption, "notes": made.notes}
    content = {**said, "runs": runs, "configurations": lines}
    write_atomically(out / "runs.json", json.dumps(content, indent=1) + "\n")
