"""Fill in the settings of a fine-tuning that follow from its task and its model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from peptrain.config import RunConfig
from peptrain.errors import ConfigError
from peptrain.methods.base import Method
from peptrain.models.hf import hf_config
from peptrain.optim.adamw import OWN_RATES, OptimConfig, filled
from peptrain.sections import TrainConfig
from peptrain.settings.fields import check
from peptrain.tasks.files import data_files, subsample
from peptrain.tuning.tasks import Example, read_examples, tuning_task
from peptrain.tuning.tokenizer import words_of

log = logging.getLogger("peptrain")
LOWER = 0.1
"""The learning rate where none is given, as a factor of the method's default for pre-training."""


def with_task(config: RunConfig[Any]) -> RunConfig[Any]:
    """Return `config` with its steps, classes and what else follows from `tune` filled in.

    Raises ConfigError for settings that do not fit, DataError for data that are missing or of
    another task.
    """
    if not config.tune.task:
        return config
    tune, t = config.tune, config.train
    task = tuning_task(tune.task, "tune.task")
    for key in ("match_trainable", "continue_from"):
        if getattr(config, key) is not None:
            raise ConfigError(f"{key}: must be unset to fine-tune; give the weights by --init-from")
    if config.init_from is None:
        raise ConfigError(
            "init_from: must be a run or a Hugging Face directory to fine-tune (got None); to"
            " begin without pre-training give RUN@0 of a run with --train.keep_at 0"
        )
    if config.data.path is not None:
        raise ConfigError(
            f"data.path: must be unset to fine-tune (got {config.data.path}), which reads the"
            " directory tune.tasks_data"
        )
    wanted = "0 to fine-tune, after which a model is no language model"
    check(not t.sample_every, "train.sample_every", t.sample_every, wanted)
    rows = len(training_rows(tune.task, tune.tasks_data, tune.rows))
    per_epoch = -(-rows // t.batch_size)
    steps = -(-tune.epochs * rows // t.batch_size)
    for key, given, used in (("steps", t.steps, steps), ("eval_tokens", t.eval_tokens or 0, 0)):
        if given not in (used, getattr(TrainConfig(), key)):
            log.warning("train.%s: %s is not used, since a fine-tuning takes tune.epochs times its"
                        " rows and evaluates all validation rows", key, given)  # fmt: skip
    train = replace(
        t,
        steps=steps,
        eval_every=per_epoch if t.eval_every is None else t.eval_every,
        eval_tokens=0,
        log_every=min(t.log_every, per_epoch),
    )
    label = tune.labels if tune.labels is not None else ",".join(task.labels)
    commas = [name for name in task.labels if "," in name]
    check(not commas, f"{tune.task}: labels", commas, "names without a comma")
    check(label == ",".join(task.labels), "tune.labels", label, f"unset for {task.name}")
    pad = words_of(config.init_from).pad if tune.pad_token is None else tune.pad_token
    size = hf_config(config.model, t.seq_len).get_text_config().vocab_size
    check(pad < size, "tune.pad_token", pad, f"< {size}, the vocabulary of the model")
    return replace(
        config,
        optim=tuned(config.optim, type(config.method)),
        train=train,
        tune=replace(tune, labels=label, pad_token=pad, task=_absolute(tune.task)),
    )


def tuned(optim: OptimConfig, method: type[Method]) -> OptimConfig:
    """Return `optim` with the learning rates of a fine-tuning, where it has none: `LOWER` times the
    method's own for pre-training, of embeddings too where they have one."""
    usual = filled(optim, method.optim_defaults, Method.optim_defaults)
    lower: dict[str, Any] = {
        key: LOWER * rate
        for key in ("lr", *OWN_RATES)
        if getattr(optim, key) is None and (rate := getattr(usual, key)) is not None
    }
    return replace(optim, **lower)


def _absolute(task: str) -> str:
    return str(Path(task).resolve()) if task.endswith(".toml") else task


def data_checksum(config: RunConfig[Any]) -> str:
    """Return a checksum of the rows that a fine-tuning reads."""
    tune, digest = config.tune, sha256()
    task = tuning_task(tune.task, "tune.task")
    validation = (read_examples(task, tune.tasks_data, s) for s in task.validation.values())
    for rows in (training_rows(tune.task, tune.tasks_data, tune.rows), *validation):
        for row in rows:
            digest.update(repr((row.texts, row.label)).encode())
    return digest.hexdigest()[:16]


def training_rows(given: str, directory: Path | None, count: int | None) -> tuple[Example, ...]:
    """Return the training rows of a task, or `count` of them: the same in all runs."""
    task = tuning_task(given, "tune.task")
    found = _read(given, directory, _stamp(data_files(task, directory, task.train)))
    if count is None:
        return found
    check(count <= len(found), "tune.rows", count, f"<= {len(found)}, the rows of {task.name}")
    return tuple(example for _, example in subsample(found, count))


def _stamp(files: Sequence[Path]) -> tuple[tuple[Path, int, int], ...]:
    return tuple((f, f.stat().st_mtime_ns, f.stat().st_size) for f in files)


@lru_cache(maxsize=4)
def _read(given: str, directory: Path | None, stamp: object) -> tuple[Example, ...]:
    """Read the training rows. Remembered, since a grid asks for them once for each run."""
    task = tuning_task(given, "tune.task")
    return tuple(read_examples(task, directory, task.train))
