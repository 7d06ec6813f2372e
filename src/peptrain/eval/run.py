"""Held-out perplexity of a run directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from peptrain.build import open_run
from peptrain.data import Corpus, default_corpus
from peptrain.eval.perplexity import Evaluation, evaluate, evaluate_legacy
from peptrain.rundir import RunDir, write_atomically


def evaluate_run(
    path: Path,
    *,
    data: Path | None = None,
    batch_size: int | None = None,
    legacy: bool = False,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """The newest checkpoint's dense twin on the whole held-out part, in the run's precision.

    data: another prepared corpus than the run's own. legacy: the older repositories' division by
    batches + 1, where the batch size (theirs is 512 at most) does change the number. The result
    is also kept in eval.json beside the run's other files.
    """
    opened = open_run(path)
    config = opened.config
    source = data or config.data.path
    corpus = Corpus.open(source) if source else default_corpus()
    assert config.train.precision is not None
    measure = evaluate_legacy if legacy else evaluate
    result = measure(
        opened.dense_twin().to(device),  # type: ignore[arg-type]
        corpus.held_out(),
        seq_len=config.train.seq_len,
        batch_size=batch_size or config.train.micro_batch or 1,
        precision=config.train.precision,
    )
    _record(RunDir(path), opened.saved.step, corpus, result, legacy)
    return result


def _record(run: RunDir, step: int, corpus: Corpus, result: Evaluation, legacy: bool) -> None:
    file = run.path / "eval.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    row = {
        "step": step,
        "data": corpus.fingerprint,
        "legacy": legacy,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "tokens": result.tokens,
    }
    write_atomically(file, json.dumps([*rows, row], indent=1) + "\n")
