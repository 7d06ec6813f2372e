"""Load initial weights from a run or from a Hugging Face model directory."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from peptrain.config import RunConfig
from peptrain.data import Corpus
from peptrain.data.index import INDEX, Index
from peptrain.data.tokenizer import load_tokenizer
from peptrain.errors import ConfigError, Unsupported
from peptrain.methods.base import Method
from peptrain.methods.targets import TargetedMethod
from peptrain.models.auto import load_model
from peptrain.models.dense import dense_state
from peptrain.models.hf import ModelConfig, dtype_of, hf_config
from peptrain.models.presets import DEFAULT_PRESET, PRESETS
from peptrain.runs import checkpoint
from peptrain.runs.build import open_run, plain_model, read_run, run_config
from peptrain.runs.directory import RunDir, refuse_known
from peptrain.runs.identity import check_continued
from peptrain.runs.match_size import matched
from peptrain.runs.select import at, find
from peptrain.runs.tokenizer import load_run_tokenizer
from peptrain.settings.fields import check

log = logging.getLogger("peptrain")
ADVICE = "leave out all model settings to use the model of init_from"


def with_inherited_model(config: RunConfig[Any]) -> RunConfig[Any]:
    """Return `config` with its model filled in.

    With `match_trainable` it is a model shrunk to match another run. With `init_from` or
    `continue_from`, and if `config` sets no model itself, it is the model of those weights. The
    step of `continue_from` is filled in too. Without these it has the vocabulary of the corpus,
    unless `config` names a preset, a config.json or a vocabulary.

    Raises ConfigError for a method that needs given weights without them, and for one that can't
    start from them with them.
    """
    if config.continue_from is not None:
        return _continuing(config, config.continue_from)
    if config.match_trainable is not None:
        return matched(config)
    path = config.init_from
    if path is not None and config.method.from_scratch_only:
        repair = "choose" if config.tune.task else "leave it out, or choose"  # a tuning needs it
        raise ConfigError(
            f"init_from: {path}: the layers of {config.method.name} can't represent its matrices;"
            f" {repair} another method, such as lowrank, which approximates them"
        )
    if path is not None and not config.tune.task:
        _check_language_model(path)
    if path is None:
        if setting := config.method.needs_weights:
            raise ConfigError(f"{setting} needs the weights of a trained model; give --init-from")
        if isinstance(config.method, TargetedMethod) and config.method.freezes:
            named = config.method.train
            log.warning(
                "%s at their random initial values; start from trained weights with --init-from",
                f"method.train: {named} leaves other parameters" if named
                else "method.train_rest: false leaves embeddings and head",
            )  # fmt: skip
        return _with_vocabulary(config)
    return replace(config, model=_model_of(path)) if config.model == ModelConfig() else config


def _check_language_model(path: Path) -> None:
    """Raise ConfigError for a run that was fine-tuned, whose head is for classes."""
    if is_run(path) and (theirs := run_config(RunDir.open(at(path)[0]))).tune.task:
        raise ConfigError(
            f"init_from: {path} was fine-tuned on {theirs.tune.task} and is no language model any"
            f" more; give the model that it started from, {theirs.init_from}"
        )


def _with_vocabulary(config: RunConfig[Any]) -> RunConfig[Any]:
    """Return `config` with the vocabulary of its corpus, if that is prepared and not the preset's.

    Where it is the preset's, as that of the default corpus is, vocab_size stays unset, so that the
    runs of a grid keep the names that 0.1.0 gave them.
    """
    model, path = config.model, config.data.path
    given = model.preset or model.config or model.vocab_size
    if path is None or given or not (path / INDEX).is_file():
        return config
    size = Index.load(path).vocab_size
    if size == PRESETS[DEFAULT_PRESET].V:
        return config
    return replace(config, model=replace(model, vocab_size=size))


def _continuing(config: RunConfig[Any], path: Path) -> RunConfig[Any]:
    for key in ("init_from", "match_trainable"):
        if (other := getattr(config, key)) is not None:
            raise ConfigError(
                f"{key}: {other}: can't be combined with continue_from {path}, which has the"
                " weights; leave out one of the two"
            )
    directory, step = at(path)
    run = RunDir.open(directory)
    found = checkpoint.available(run.checkpoints)
    if step is None and found:
        step = checkpoint.step_of(found[-1])
    if step is None:
        raise ConfigError(f"continue_from: {path}: contains no checkpoint yet; give another run")
    model = run_config(run).model if config.model == ModelConfig() else config.model
    return replace(config, model=model, continue_from=Path(f"{directory}@{step}"))


def branching_point(
    config: RunConfig[Method], identity: Mapping[str, Any]
) -> checkpoint.Checkpoint:
    """Return the checkpoint that a resolved `config` continues from.

    Raises ConfigError for a run of another method and if no steps are left, CheckpointError,
    naming the setting, if one differs that the weights depend on.
    """
    assert config.continue_from is not None
    _, other, saved = read_run(config.continue_from)
    if other.method.name != config.method.name:
        raise ConfigError(
            f"continue_from: {config.continue_from} was trained by {other.method.name}, and only"
            f" {other.method.name} can continue it; to train its weights by {config.method.name}"
            f" give --init-from {config.continue_from}"
        )
    check_continued(saved, config, str(identity["data"]))
    steps = config.train.steps
    check(steps > saved.step, "train.steps", steps, f"> {saved.step}, the step to continue from")
    return saved


def initial_weights(config: RunConfig[Method]) -> dict[str, Tensor] | None:
    """Return the dense weights that `config` starts from, by Hugging Face name, or None.

    Raises ConfigError when they cannot be read or belong to a different model: one with other
    shapes, or one that computes another function with the same shapes.
    """
    path = config.init_from
    if path is None:
        return None
    weights = _of_run(path) if is_run(path) else _pretrained(path, config)
    _check_shapes(weights, config)
    check_function(config)
    return weights


def _of_run(path: Path) -> dict[str, Tensor]:
    opened = open_run(path)
    if not (method := opened.config.method).has_dense_equivalent:
        raise ConfigError(
            f"init_from: {path} was trained by {method.name}, whose layers have no dense weights to"
            " start from; give a run of another method"
        )
    return dense_state(opened.model)


def contents(path: Path) -> str:
    """Return checksums that identify the initial weights.

    They cover the latest checkpoint of a run, or the files of a Hugging Face directory.
    """
    if is_run(path):
        directory, step = at(path)
        run = RunDir(directory)
        place = find(run, step)[0] if step is not None else run.checkpoints
        found = [p for p in checkpoint.available(place) if step in (None, checkpoint.step_of(p))]
        files = [newest / checkpoint.SUMS for newest in found[-1:]]
    else:
        files = sorted([*path.glob("*.json"), *path.glob("*.safetensors")])
    return "".join(f"{file.parent.name}/{file.name} {sha256(file)}\n" for file in files)


def sha256(file: Path) -> str:
    """Return the SHA-256 of the file's contents."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _model_of(path: Path) -> ModelConfig:
    return run_config(RunDir.open(at(path)[0])).model if is_run(path) else ModelConfig(config=path)


def compare_tokenizers(config: RunConfig[Method], corpus: Corpus) -> None:
    """Warn when the initial weights were trained with a tokenizer other than the corpus's.

    Without initial weights, warn when a preset's vocabulary is larger than the corpus's.
    """
    if (path := config.init_from) is None:
        if config.data.path is not None:  # the default preset is made for the default corpus
            _compare_vocabularies(config.model, corpus)
        return
    run = RunDir(at(path)[0])
    file = (run.tokenizer if is_run(path) else path) / "tokenizer.json"
    if is_run(path):
        theirs, _ = load_run_tokenizer(run)
    elif file.is_file():
        theirs = load_tokenizer(file)
    else:
        return
    if load_tokenizer(corpus.tokenizer_file).get_vocab() != theirs.get_vocab():
        log.warning(
            "init_from: the tokenizer of %s differs from that of %s, so token ids do not match the"
            " weights; prepare the data with --tokenizer %s", path, corpus.path, file,
        )  # fmt: skip


def _compare_vocabularies(model: ModelConfig, corpus: Corpus) -> None:
    if model.config is not None or model.vocab_size is not None or model.preset is None:
        return
    if (size := PRESETS[model.preset].V) > corpus.vocab_size:
        log.warning(
            "model.preset %s: has a vocabulary of %s, of which %s uses %s; --model.vocab-size %d"
            " leaves out the rest", model.preset, f"{size:,}", corpus.path,
            f"{corpus.vocab_size:,}", corpus.vocab_size,
        )  # fmt: skip


def is_run(path: Path) -> bool:
    """Return whether `init_from` names a run and not a Hugging Face model.

    Raises ConfigError if it is neither.
    """
    if RunDir(at(path)[0]).config_file.is_file():
        return True
    if (path / "config.json").is_file():
        return False
    refuse_known(path)
    raise ConfigError(
        f"init_from: {path} is neither a run directory (no config.toml) nor a Hugging Face model"
        " (no config.json); give one of the two"
    )


def _pretrained(path: Path, config: RunConfig[Method]) -> dict[str, Tensor]:
    assert config.train.precision is not None
    try:
        model, report = load_model(path, dtype_of(config.train.precision))
    except (OSError, ValueError, RuntimeError, SafetensorError, Unsupported) as error:
        raise ConfigError(f"init_from: {path} can't be read: {error}") from error
    _check_whole(report, path)
    return dense_state(model)


def _check_whole(report: Mapping[str, Any], path: Path) -> None:
    """Raise ConfigError for weights that would stay randomly initialised; warn of unused ones."""
    if missing := sorted(report["missing_keys"]):
        raise ConfigError(
            f"init_from: {path} lacks {missing[0]} and {len(missing) - 1} more weights of its"
            " model; give a complete causal language model"
        )
    for name, has, wants in sorted(report["mismatched_keys"]):
        raise ConfigError(
            f"init_from: {path} has shape {list(has)} for {name}, but its config.json implies"
            f" {list(wants)}; use the config.json that belongs to these weights"
        )
    if unused := sorted(report["unexpected_keys"]):
        log.warning(
            "init_from: %s contains %s and %d more weights that the model in its config.json does"
            " not have; they are ignored", path, unused[0], len(unused) - 1,
        )  # fmt: skip


NO_PART_OF_THE_FUNCTION = {
    *("dtype", "architectures", "transformers_version", "use_cache", "initializer_range"),
    *("max_position_embeddings", "attention_dropout", "pretraining_tp"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
    *("id2label", "label2id", "num_labels", "problem_type"),
}


def check_function(config: RunConfig[Method]) -> None:
    """Raise ConfigError if the models differ in a way that equal shapes hide (heads, RoPE)."""
    assert config.init_from is not None
    theirs = hf_config(_model_of(config.init_from), seq_len=1).to_dict()
    ours = hf_config(config.model, seq_len=1).to_dict()
    for key in sorted(theirs.keys() | ours.keys()):
        if key in NO_PART_OF_THE_FUNCTION or key.startswith("_") or "drop" in key:
            continue
        if theirs.get(key) != ours.get(key):
            raise ConfigError(
                f"init_from: {config.init_from} has {key} {theirs.get(key)!r}, but the model of"
                f" this run has {ours.get(key)!r}; {ADVICE}"
            )


def _check_shapes(weights: dict[str, Tensor], config: RunConfig[Method]) -> None:
    wanted = {name: list(p.shape) for name, p in plain_model(config).named_parameters()}
    given = {name: list(p.shape) for name, p in weights.items()}
    for name in sorted(wanted.keys() | given.keys()):
        if (has := given.get(name, "nothing")) != (wants := wanted.get(name, "nothing")):
            raise ConfigError(
                f"init_from: {config.init_from} has {has} for {name}, but the model of this run"
                f" has {wants}; {ADVICE}"
            )
