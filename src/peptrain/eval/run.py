"""Evaluate a run directory on held-out text."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import torch

from peptrain.config import RunConfig
from peptrain.data import Corpus, configured_corpus
from peptrain.data.tokenizer import load_tokenizer
from peptrain.errors import CheckpointError, ConfigError, DataError
from peptrain.eval.perplexity import (
    Evaluation,
    Watch,
    held_out_loss,
    held_out_loss_legacy,
    unwatched,
)
from peptrain.methods.base import Method
from peptrain.models.hf import vocabulary_size
from peptrain.runs.build import Opened, open_run
from peptrain.runs.directory import RunDir
from peptrain.runs.lock import lock
from peptrain.runs.tokenizer import load_run_tokenizer
from peptrain.settings.fields import check_whole

log = logging.getLogger("peptrain")
WAIT = 30.0
"""Seconds to wait for other evaluations to write to eval.json, which takes milliseconds."""


def evaluate(
    path: Path | str,
    *,
    data: Path | None = None,
    batch_size: int | None = None,
    legacy: bool = False,
    device: torch.device | str = "cpu",
    watch: Watch = unwatched,
) -> Evaluation:
    """Evaluate the latest checkpoint of a run, or RUN@STEP, on the full held-out set.

    The precision is the run's. The model is the dense equivalent, or without one the run's own. The
    result is also appended to eval.json in the run directory. If that fails, a warning is logged.

    data: a prepared corpus other than the run's own. batch_size: windows per forward pass. legacy:
    divide by batches + 1 like the older repositories. The result then depends on the batch size,
    which is the run's micro-batch if unset (theirs is at most 512). watch:
    called with the tokens predicted so far and in total. Raises DataError for a corpus prepared
    with another tokenizer, whose ids stand for other words.
    """
    check_whole("--batch-size", batch_size, 1)
    path = Path(path)
    opened = open_run(path)
    refuse_tuned(opened.config, path)
    config, corpus = opened.config, corpus_of(opened, data)
    assert config.train.precision is not None
    model = opened.evaluated().to(device)  # type: ignore[arg-type]
    held_out, seq_len, precision = corpus.held_out(), config.train.seq_len, config.train.precision
    if legacy:
        rows = batch_size or config.train.micro_batch or 1
        result = held_out_loss_legacy(
            model, held_out, seq_len=seq_len, batch_size=rows, precision=precision, watch=watch
        )
    else:
        result = held_out_loss(
            model, held_out, seq_len=seq_len, batch_size=batch_size, precision=precision,
            watch=watch,
        )  # fmt: skip
    _record(opened.run, opened.saved.step, corpus, result, legacy)
    return result


def refuse_tuned(config: RunConfig[Method], path: Path) -> None:
    """Raise ConfigError for a fine-tuned run, which is no language model."""
    if config.tune.task:
        raise ConfigError(
            f"{path}: was fine-tuned on {config.tune.task} and is no language model any more; its"
            f" results are in its metrics.jsonl, and `peptrain report {path}` shows them"
        )


def corpus_of(opened: Opened, data: Path | None) -> Corpus:
    """Return the prepared corpus `data`, or that which the run was trained on.

    Raises DataError for one that was prepared with another tokenizer, or changed since.
    """
    corpus = Corpus.open(data) if data else configured_corpus(opened.config.data.path)
    _check_ids(opened.run, vocabulary_size(opened.model), corpus)
    if data is None and corpus.fingerprint != opened.saved.identity.get("data"):
        raise DataError(
            f"data.path: {corpus.path} is not the corpus that the run was trained on; to evaluate"
            f" on it, give --data {corpus.path}"
        )
    return corpus


def _check_ids(run: RunDir, vocabulary: int, corpus: Corpus) -> None:
    ours, _ = load_run_tokenizer(run)
    if ours.get_vocab() != load_tokenizer(corpus.tokenizer_file).get_vocab():
        raise DataError(
            f"--data {corpus.path}: prepared with another tokenizer than the run's;"
            f" prepare that text again with --tokenizer {run.tokenizer}"
        )
    if corpus.max_id >= vocabulary:
        raise DataError(
            f"--data {corpus.path}: contains token id {corpus.max_id}, but the model's"
            f" vocabulary size is {vocabulary}"
        )


def _record(run: RunDir, step: int, corpus: Corpus, result: Evaluation, legacy: bool) -> None:
    file = run.path / "eval.json"
    row = {
        "step": step,
        "data": corpus.fingerprint,
        "legacy": legacy,
        "loss": result.loss,
        "perplexity": result.perplexity if math.isfinite(result.perplexity) else None,
        "tokens": result.tokens,
    }
    try:
        with lock(file.with_name("eval.json.lock"), lambda holder: f"in use by {holder}", WAIT):
            run.append(file.name, row)
    except (OSError, CheckpointError) as error:  # for example no write permission
        log.warning("%s: the result could not be saved: %s", file, error)
