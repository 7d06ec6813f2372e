"""The weights that a classifier starts from: a pre-trained model's, and a new head."""

from __future__ import annotations

import logging
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from peptrain.config import RunConfig
from peptrain.errors import ConfigError, Unsupported
from peptrain.methods.base import Method
from peptrain.models.auto import load_model
from peptrain.models.classifier import classifier_config
from peptrain.models.dense import dense_state
from peptrain.models.hf import dtype_of
from peptrain.models.sites import decoder_layers
from peptrain.runs.build import Opened, open_run, plain_model
from peptrain.runs.init_from import is_run

log = logging.getLogger("peptrain")


def classifier_weights(config: RunConfig[Method]) -> dict[str, Tensor]:
    """Return the dense weights of a classifier, whose body is that of `config.init_from`.

    What the model there lacks, a head or the pooler of an
    encoder, is drawn from the seed. Raises ConfigError if layers or embeddings are missing or have
    other shapes, and for a head with another number of classes.
    """
    path = config.init_from
    assert path is not None
    opened = open_run(path) if is_run(path) else None
    fresh = plain_model(config)
    own = {name: p.detach().clone() for name, p in fresh.named_parameters()}
    given = _pretrained(config, path) if opened is None else _of_run(config, path, opened)
    body = {f"{name}.weight" for name, module in fresh.named_modules()
            if module is fresh.get_input_embeddings()}  # fmt: skip
    stack = decoder_layers(fresh)[0]
    new = []
    for name, p in own.items():
        has = given.pop(name, None)
        in_body = name in body or name.startswith(f"{stack}.")
        if has is not None and has.shape == p.shape:
            own[name] = has
        elif in_body or (has is not None and opened is None):
            found = "nothing" if has is None else list(has.shape)
            raise ConfigError(
                f"init_from: {path} has {found} for {name}, but the model of this run has"
                f" {list(p.shape)}; leave out all model settings to use the model of init_from"
            )
        else:
            new.append(name)
    log.info("%s: new: %s; not used: %s", path, ", ".join(new) or "nothing",
             ", ".join(sorted(given)) or "nothing")  # fmt: skip
    return own


def _of_run(config: RunConfig[Method], path: Path, opened: Opened) -> dict[str, Tensor]:
    method, theirs = opened.config.method, opened.config.tune
    if not method.has_dense_equivalent:
        raise ConfigError(
            f"init_from: {path} was trained by {method.name}, whose layers have no dense weights to"
            " start from; give a run of another method"
        )
    given = dense_state(opened.model)
    if theirs.task and theirs.classes != config.tune.classes:
        log.warning("init_from: %s was fine-tuned on %s; its head is replaced by a new one",
                    path, theirs.task)  # fmt: skip
        given = {name: p for name, p in given.items() if not name.startswith(HEADS)}
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
    return {name: p for name, p in dense_state(model).items() if name not in missing}
