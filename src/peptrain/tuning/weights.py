"""The weights that a classifier starts from: a pre-trained model's, and a new head."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import Tensor

from peptrain.config import RunConfig
from peptrain.errors import ConfigError, Unsupported
from peptrain.methods.base import Method
from peptrain.models.auto import load_config, load_model
from peptrain.models.classifier import classifier_config
from peptrain.models.dense import dense_state
from peptrain.models.hf import dtype_of
from peptrain.runs.build import Opened, open_run, plain_model
from peptrain.runs.init_from import ADVICE, check_function, is_run
from peptrain.text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("peptrain")


def classifier_weights(config: RunConfig[Method]) -> dict[str, Tensor]:
    """Return the dense weights of a classifier, whose body is that of `config.init_from`.

    What the model there lacks of a head and of an encoder's pooler is drawn from the seed. Raises
    ConfigError if other weights are missing or have other shapes, for a head with another number of
    classes, and for a model that computes another function with the same shapes.
    """
    path = config.init_from
    assert path is not None
    opened = open_run(path) if is_run(path) else None
    fresh = plain_model(config)
    own = {name: p.detach().clone() for name, p in fresh.named_parameters()}
    given = _pretrained(config, path) if opened is None else _of_run(config, path, opened)
    new = []
    for name, p in own.items():
        has = given.pop(name, None)
        if has is not None and has.shape == p.shape:
            own[name] = has
        elif not _may_be_new(fresh, name) or (has is not None and opened is None):
            found = "nothing" if has is None else list(has.shape)
            complete = "give a complete model, or " if has is None else ""
            raise ConfigError(
                f"init_from: {path} has {found} for {name}, but the model of this run has"
                f" {list(p.shape)}; {complete}{ADVICE}"
            )
        else:
            new.append(name)
    log.info("%s: new: %s; not used: %s", path, ", ".join(new) or "nothing",
             ", ".join(sorted(given)) or "nothing")  # fmt: skip
    check_function(config)
    return own


def _may_be_new(model: PreTrainedModel, name: str) -> bool:
    """Return whether a parameter is of the head or of an encoder's pooler, which masked language
    models lack. A model that writes a text has neither."""
    head = not name.startswith(f"{model.base_model_prefix}.") or ".pooler." in name
    return head and not model.config.is_encoder_decoder


def _of_run(config: RunConfig[Method], path: Path, opened: Opened) -> dict[str, Tensor]:
    method, theirs = opened.config.method, opened.config.tune
    if not method.has_dense_equivalent:
        raise ConfigError(
            f"init_from: {path} was trained by {method.name}, whose layers have no dense weights to"
            " start from; give a run of another method"
        )
    given = dense_state(opened.model)
    body = {name: p for name, p in given.items() if not name.startswith(HEADS)}
    if theirs.task and theirs.classes != config.tune.classes and len(body) < len(given):
        log.warning("init_from: %s was fine-tuned on %s; its head is replaced by a new one",
                    path, theirs.task)  # fmt: skip
        return body
    return given


HEADS = ("score.", "classifier.")


def _pretrained(config: RunConfig[Method], path: Path) -> dict[str, Tensor]:
    tune, t = config.tune, config.train
    assert t.precision is not None and tune.pad_token is not None
    wanted = classifier_config(config.model, tune.classes, tune.pad_token, t.seq_len)
    try:
        model, report = load_model(path, dtype_of(t.precision), wanted)
    except (OSError, ValueError, RuntimeError, SafetensorError, Unsupported) as error:
        raise ConfigError(f"init_from: {path} can't be read: {error}") from error
    for name, has, wants in sorted(report["mismatched_keys"]):
        if name.startswith(HEADS):
            raise ConfigError(
                f"init_from: {path} has a head for {has[0]} classes, but tune.task {tune.task} has"
                f" {wants[0]}; give the model that it was fine-tuned from"
            )
        raise ConfigError(
            f"init_from: {path} has shape {list(has)} for {name}, but its config.json implies"
            f" {list(wants)}; use the config.json that belongs to these weights"
        )
    missing = {*report["missing_keys"]}
    given = {name: p for name, p in dense_state(model).items() if name not in missing}
    if any(name.startswith(HEADS) for name in given):
        _check_names(config, path)
    return given


def _check_names(config: RunConfig[Method], path: Path) -> None:
    """Raise ConfigError if the head there has as many classes as the task, but named otherwise.

    Names that tell nothing, such as LABEL_0, may be any.
    """
    theirs: Mapping[Any, str] = load_config(path).id2label or {}
    named = [theirs[number] for number in sorted(theirs)]
    ours = config.tune.classes
    unnamed = named == [f"LABEL_{number}" for number in range(len(named))]
    if ours and not unnamed and [*map(str.casefold, named)] != [*map(str.casefold, ours)]:
        raise ConfigError(
            f"init_from: {path} has a head for the classes {', '.join(map(one_line, named))}, but"
            f" tune.task {config.tune.task} has {', '.join(ours)}; give the model that it was"
            " fine-tuned from"
        )
