"""Compare a configuration with the settings that a checkpoint was written with."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from peptrain.config import RunConfig
from peptrain.errors import CheckpointError
from peptrain.methods.base import Method
from peptrain.models.hf import config_file
from peptrain.optim.adamw import OWN_RATES
from peptrain.runs.checkpoint import Checkpoint, agrees
from peptrain.settings.fields import before, quiet
from peptrain.text import quoted

log = logging.getLogger("peptrain")
FIXED = ("precision", "seed", "batch_size", "seq_len")
FIXED_OPTIM = ("kind", "momentum")
FIXED_TUNE = ("task", "epochs", "rows", "labels", "pad_token")
CHANGEABLE = ("method", "optim", "schedule", "train")
"""Sections with settings that are not in the identity."""
RATES = ("method.", "optim.", "schedule.")
"""What the weights depend on among those settings, besides train.steps."""


def identity_of(config: RunConfig[Method], data: str) -> dict[str, Any]:
    """Return the settings in which a checkpoint and a run that continues it must agree.

    The learning rates, the schedule and the number of steps may change. data: the fingerprint of
    the corpus.
    """
    method = asdict(config.method)
    for item in fields(config.method):
        if item.metadata.get("changeable"):
            del method[item.name]
    model = asdict(config.model)
    if file := config_file(config.model):
        model["config"] = hashlib.sha256(file.read_bytes()).hexdigest()
    train = {key: getattr(config.train, key) for key in FIXED}
    sections = {
        "method": {"name": config.method.name, **method},
        "model": model,
        "optim": {key: getattr(config.optim, key) for key in FIXED_OPTIM},
        "train": train,
    }
    if config.tune.task:
        sections["tune"] = {key: getattr(config.tune, key) for key in FIXED_TUNE}
    return {**_flat(sections), "data": data}


def other_settings(config: RunConfig[Method]) -> dict[str, Any]:
    """Return the settings that are not in the identity, as JSON has them: rates, schedule,
    intervals, device."""
    every = _flat({name: asdict(getattr(config, name)) for name in CHANGEABLE})
    fixed = identity_of(config, "")
    return {
        key: str(value) if isinstance(value, Path) else value
        for key, value in every.items()
        if key not in fixed
    }


def check_settings(
    saved: Checkpoint,
    config: RunConfig[Method],
    run: Path,
    identity: Mapping[str, Any] | None = None,
) -> None:
    """Compare a run's configuration with a checkpoint, in case config.toml was edited or damaged.

    A warning lists the settings that have changed and may, such as the device. Raises
    CheckpointError, naming the setting, if one differs that the weights depend on, because then
    config.toml would no longer repeat the run. identity: that of a run to continue, with its
    corpus.
    """
    identity = identity or identity_of(config, saved.identity.get("data", ""))
    agrees(saved, identity, _of_older(config, identity))
    _check_own_rates(saved, config, "restore the run's original config.toml")
    now = other_settings(config)
    then = {**_of_older(config, now), **saved.settings}
    if not saved.settings:  # 0.1.0 saved only the step at which the phase was to end
        with quiet():
            ends = (*config.method.phases(config.train.steps), config.train.steps)
        then = {} if saved.end in (0, *ends) else {"train.steps": saved.end}
    changed = [key for key in now if key in then and then[key] != now[key]]
    for key in sorted(changed, key=lambda key: key != "train.steps"):
        if key == "train.steps" or key.startswith(RATES):
            raise CheckpointError(
                f"{key}: the checkpoint of step {saved.step} was written with {then[key]!r}, but"
                f" config.toml has {now[key]!r}; restore it,"
                f" {_instead(key, now[key], saved.step, config.method.name, run)}"
            )
    if changed:
        each = ", ".join(f"{key} from {then[key]!r} to {now[key]!r}" for key in changed)
        log.warning("config.toml has changed since step %d: %s", saved.step, each)


def _instead(key: str, value: object, step: int, method: str, run: Path) -> str:
    if key == "train.steps":
        return f"and make the run longer with `peptrain resume {quoted(run)} --train.steps {value}`"
    point, flag = quoted(f"{run}@{step}"), f"--{key.replace('_', '-')} {value}"
    return (
        f"and change it in a new run, with `peptrain train {method} --continue-from {point} {flag}`"
    )


def check_continued(saved: Checkpoint, config: RunConfig[Method], data: str) -> None:
    """Raise CheckpointError, naming the setting, unless a new run can continue from `saved`.

    data: the fingerprint of the new run's corpus.
    """
    identity = identity_of(config, data)
    repair = (
        f"to continue from {config.continue_from} leave it as it was; for other settings start from"
        f" the weights alone, with --init-from {config.continue_from}"
    )
    agrees(saved, identity, _of_older(config, identity), repair)
    _check_own_rates(saved, config, repair)


def _check_own_rates(saved: Checkpoint, config: RunConfig[Method], repair: str) -> None:
    """Raise CheckpointError if a learning rate that makes a group of the optimizer is set now and
    was not, or conversely: the step counts of its parameters are those of their group."""
    for key in OWN_RATES:
        then, now = saved.settings.get(f"optim.{key}"), getattr(config.optim, key)
        if (then is None) != (now is None):
            raise CheckpointError(
                f"optim.{key}: the checkpoint of step {saved.step} was written with {then!r}, but"
                f" the configuration has {now!r}; its value may change, but not whether it is set;"
                f" {repair}"
            )


def _of_older(config: RunConfig[Method], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the `wanted` settings that older versions did not have, as they were then."""
    older = _flat({name: before(getattr(config, name)) for name in ("model", *CHANGEABLE)})
    return {key: value for key, value in older.items() if key in wanted}


def _flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{s}.{k}": v for s, values in sections.items() for k, v in values.items()}
