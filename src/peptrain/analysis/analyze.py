"""Analyze runs and Hugging Face directories: measure every matrix and write tables."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peptrain.analysis.gradients import dense_gradients, gradient_rows, probe_batch
from peptrain.analysis.measures import THRESHOLD, TOLERANCES, Row, ov_pairs, ov_rows, rows_of_layer
from peptrain.analysis.source import (
    References,
    Source,
    digest,
    is_run,
    kept_steps,
    open_source,
    references,
)
from peptrain.analysis.table import Output, count_nan
from peptrain.data import Corpus
from peptrain.distributed.world import World
from peptrain.errors import CheckpointError, ConfigError
from peptrain.eval.run import corpus_of
from peptrain.models.hf import vocabulary_size
from peptrain.runs.directory import RunDir
from peptrain.runs.environment import environment
from peptrain.runs.lock import lock
from peptrain.runs.select import at, check_done, find, may_vanish
from peptrain.settings.fields import check_whole, each_line_once

log = logging.getLogger("peptrain")
FORMAT = 1
WAIT = 30.0
"""Seconds to wait for another analysis to write the same files, which takes milliseconds."""
SEQ_LEN = 256
"""Tokens of a probe sequence for a Hugging Face directory. A run has its own length."""


Watch = Callable[[str, int, int], None]
"""Called with the name of a model, and the numbers of matrices done and in all, over all models."""


@dataclass(frozen=True)
class Job:
    """A model to analyze, and where its tables go."""

    path: Path
    output: Output
    may_vanish: bool
    """Whether nobody asked for this step, so that a run in training may delete it meanwhile."""


def analyze(
    paths: Sequence[Path],
    *,
    out: Path | None = None,
    data: Path | None = None,
    probe: int = 8,
    device: torch.device | str = "cpu",
    watch: Watch = lambda name, done, total: None,
) -> list[Path]:
    """Measure the matrices of runs, RUN@STEP or Hugging Face directories; return the tables' paths.

    Of a run without a step, every checkpoint that it keeps is measured. The tables are
    RUN/analysis/STEP.csv, or OUT/NAME/STEP.csv with `out`, which Hugging Face directories need.
    What was measured before, in the same way, is skipped. The run may be in training.

    data: a prepared corpus for the gradients, instead of a run's own. probe: the number of held-out
    sequences of the gradients' batch, 0 for no gradients. Raises CheckpointError for what can't be
    read, for damaged checkpoints after all others are measured, and DataError for a held-out part
    shorter than the probe batch.
    """
    check_whole("--probe", probe, 0)
    if not paths:
        raise CheckpointError("no run is given; give RUN, RUN@STEP or a Hugging Face directory")
    device = torch.device(device)
    jobs = list(_jobs(paths, out))
    written, damaged = list[Path](), list[str]()
    with each_line_once():
        for number, job in enumerate(jobs):
            with may_vanish(job.path, job.may_vanish, damaged):
                source = open_source(job.path)
                each, name = len(source.layers), source.name

                def show(done: int, name: str = name, before: int = number * each) -> None:
                    watch(name, before + done, each * len(jobs))  # noqa: B023

                _analyze(source, job.output, data, probe, device, show)
                written.append(job.output.directory / f"{job.output.stem}.csv")
    check_done(paths[0], written, damaged)
    return written


def _jobs(paths: Sequence[Path], out: Path | None) -> Iterable[Job]:
    """Yield what to analyze. Raises CheckpointError and ConfigError before anything is measured."""
    names = Counter(at(path)[0].resolve() for path in paths)
    stems = Counter(path.name for path in names)
    if out is not None and (twice := [name for name, n in stems.items() if n > 1]):
        raise ConfigError(f"--out: two models are named {twice[0]!r}; analyze them one by one")
    for path in paths:
        directory, step = at(path)
        place = None if out is None else out / directory.resolve().name
        if not is_run(path):
            if place is None:
                raise ConfigError(f"--out: must be given for {path}, which is not a run (got None)")
            yield Job(path, Output(place, "model"), False)
            continue
        run = RunDir.open(directory)
        steps = kept_steps(run) if step is None else [step]
        if not steps:
            raise CheckpointError(f"{directory}: contains no checkpoint yet")
        if step is not None:
            find(run, step)
        for each in steps:
            output = Output(place or directory / "analysis", f"{each}")
            yield Job(Path(f"{directory}@{each}"), output, step is None)


def _analyze(
    source: Source,
    output: Output,
    data: Path | None,
    probe: int,
    device: torch.device,
    show: Callable[[int], None],
) -> None:
    against = references(source)
    corpus = _corpus(source, data) if probe else None
    asked = {
        "format": FORMAT,
        "source": source.name,
        "weights": digest(source),
        "compared_with": _compared(against),
        "probe": _probe(source, corpus, probe),
        "tolerances": list(TOLERANCES),
        "threshold": THRESHOLD,
    }
    if output.finished(asked):
        log.info("%s: measured before, skipped (%s)", source.name, output.json)
        return
    rows = measure(source, against, corpus, probe, device, show)
    if nan := count_nan(rows):
        first = next(row for row in rows if row.sigma[0].isnan())
        log.warning("%s: %d of %d rows are NaN, because matrices contain NaN or infinity; the first"
                    " is %s of %s in layer %d", source.name, nan, len(rows), first.what,
                    first.module, first.layer)  # fmt: skip
    missing = dict(against.missing or {})
    if corpus is None:
        tuned = source.opened is not None and source.opened.config.tune.task
        without = "fine-tuned, and no language model" if tuned else "needs --data"
        missing["gradient"] = without if probe else "--probe is 0"
    counted = Counter(row.what for row in rows)
    made: dict[str, Any] = {
        **asked,
        "dtype": "float64",
        "gradient_dtype": "float32",
        "device": str(device),
        "rows": dict(counted),
        "not_measured": missing,
        "versions": environment(World(0, 1, device)),
    }
    guard = output.directory / f"{output.stem}.lock"
    output.directory.mkdir(parents=True, exist_ok=True)
    with lock(guard, lambda holder: f"{guard}: in use by {holder}; try again", WAIT):
        output.write(rows, str(source.path), source.step, made)


def measure(
    source: Source,
    against: References,
    corpus: Corpus | None,
    probe: int,
    device: torch.device,
    show: Callable[[int], None] = lambda done: None,
) -> list[Row]:
    """Return the rows of all matrices and OV circuits, a matrix at a time."""
    gradients = {}
    if corpus is not None:
        batch = probe_batch(corpus, probe, _seq_len(source))
        gradients = dense_gradients(source.dense().to(device), batch)  # type: ignore[arg-type]
    rows: list[Row] = []
    for done, name in enumerate(source.layers, 1):
        rows += rows_of_layer(source, name, against, device)
        if f"{name}.weight" in gradients:
            rows += gradient_rows(source, name, gradients, device)
        show(done)
    circuits = ov_pairs(source)
    if not circuits:
        log.warning("%s: OV circuits are not measured, as no layer has o_proj and v_proj of"
                    " matching shapes", source.name)  # fmt: skip
    for layer, names in circuits.items():
        rows += ov_rows(source, layer, names, device)
    return rows


def _seq_len(source: Source) -> int:
    return SEQ_LEN if source.opened is None else source.opened.config.train.seq_len


def _corpus(source: Source, data: Path | None) -> Corpus | None:
    """Return the corpus of the gradients.

    None for a Hugging Face directory without `data`, and for a run that was fine-tuned.
    """
    if source.opened is not None:
        if source.opened.config.tune.task:
            return None
        return corpus_of(source.opened, data)
    if data is None:
        return None
    corpus = Corpus.open(data)
    if corpus.max_id >= vocabulary_size(source.model):
        raise ConfigError(
            f"--data {data}: contains token id {corpus.max_id}, but the vocabulary of {source.path}"
            f" has {vocabulary_size(source.model)}; prepare the text with --tokenizer {source.path}"
        )
    return corpus


def _probe(source: Source, corpus: Corpus | None, probe: int) -> dict[str, Any] | None:
    if corpus is None:
        return None
    probe_batch(corpus, probe, _seq_len(source))
    return {"sequences": probe, "seq_len": _seq_len(source), "corpus": corpus.fingerprint}


def _compared(against: References) -> dict[str, Any]:
    given = {"start": against.start, "warm": against.warm, "before": against.before}
    steps: dict[str, Any] = {key: other and other.step for key, other in given.items()}
    return {**steps, "cycles": [other.step for other in against.cycles]}
