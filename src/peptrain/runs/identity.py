"""Compare a configuration with the settings that a checkpoint was written with."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from peptrain.config import RunConfig
from peptrain.methods.base import Method
from peptrain.models.hf import config_file
from peptrain.runs.checkpoint import Checkpoint, agrees
from peptrain.settings.fields import before

log = logging.getLogger("peptrain")
FIXED = ("precision", "seed", "batch_size", "seq_len")
FIXED_OPTIM = ("kind", "momentum")
CHANGEABLE = ("method", "optim", "schedule", "train")
"""Sections with settings that may change when a run is resumed."""


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
    return {**_flat(sections), "data": data}


def other_settings(config: RunConfig[Method]) -> dict[str, Any]:
    """Return the settings that are not in the identity: rates, schedule, intervals, device."""
    every = _flat({name: asdict(getattr(config, name)) for name in CHANGEABLE})
    return {key: value for key, value in every.items() if key not in identity_of(config, "")}


def check_settings(
    saved: Checkpoint, config: RunConfig[Method], identity: Mapping[str, Any] | None = None
) -> None:
    """Compare a run's configuration with a checkpoint, in case config.toml was edited or damaged.

    A warning lists the settings that have changed and may. Raises CheckpointError, naming the
    setting, if one of the identity differs. identity: that of a run to continue, with its corpus.
    """
    older = _flat({name: before(getattr(config, name)) for name in ("model", *CHANGEABLE)})
    identity = identity or identity_of(config, saved.identity.get("data", ""))
    agrees(saved, identity, {key: value for key, value in older.items() if key in identity})
    now, then = other_settings(config), {**older, **saved.settings}
    changed = [
        f"{key} from {then[key]!r} to {value!r}"
        for key, value in now.items()
        if key in then and then[key] != value
    ]
    if saved.settings and changed:  # those of 0.1.0 are not known
        log.warning("config.toml has changed since step %d: %s", saved.step, ", ".join(changed))


def _flat(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{s}.{k}": v for s, values in sections.items() for k, v in values.items()}
