"""Go on with a run by the command that started it, as after a restart by `torchrun`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from peptrain.config import RunConfig, load
from peptrain.distributed.launch import restarts
from peptrain.distributed.world import World
from peptrain.errors import ConfigError
from peptrain.methods.base import Method
from peptrain.runs.directory import RunDir
from peptrain.runs.ends import ends
from peptrain.settings.fields import shown
from peptrain.text import quoted

OF_MACHINE = ("precision", "micro_batch")
"""Settings of [train] whose default depends on the device or on the number of processes."""


def goes_on(config: RunConfig[Any], wanted: bool) -> bool:
    """Return whether to resume the run if it has begun: if `wanted`, and after every restart.

    Raises ConfigError without a run directory, since a new run in the first free one would begin
    again.
    """
    again = restarts()
    if (wanted or again) and config.run is None:
        why = f"a restart needs --run (this is restart {again})" if again else "--go-on needs --run"
        raise ConfigError(f"run: {why}; give the run directory, such as --run runs/mine")
    return wanted or again > 0


def begun(given: RunConfig[Any], wanted: RunConfig[Any], here: World) -> RunDir | None:
    """Return the run in the directory of `given` if it has begun, None if it has not.

    wanted: `given`, resolved. Raises ConfigError, on every rank, if the run was started with other
    settings, and CheckpointError if a rank does not see it.
    """
    assert given.run is not None
    run = RunDir(given.run)
    if not here.agree(run.config_file.is_file()):
        return None
    here.on_all(lambda: _check_same(given, wanted, RunDir.open(run.path)))
    return run


def _check_same(given: RunConfig[Any], wanted: RunConfig[Any], run: RunDir) -> None:
    first = [end.path / run.config_file.name for end in ends(run)[:1]]  # it was made longer since
    then = load(next((file for file in first if file.is_file()), run.config_file))
    unset = {key: getattr(then.train, key)
             for key in OF_MACHINE if getattr(given.train, key) is None}  # fmt: skip
    now = _settings(replace(wanted, train=replace(wanted.train, **unset)))
    before, set_here = _settings(then), _settings(given)
    # What is unset follows from other settings, so these are named first.
    for key in sorted([*now, *(before.keys() - now.keys())], key=lambda k: set_here.get(k) is None):
        if now.get(key) != before.get(key):
            raise ConfigError(
                f"{key}: {shown(now.get(key))} here, but {run.path} was started with"
                f" {shown(before.get(key))}; give the same settings, choose another --run, or"
                f" resume it as it is with `peptrain resume {quoted(run.path)}`"
                + (", which takes --train.steps too" if key == "train.steps" else "")
            )


def _settings(config: RunConfig[Method]) -> Mapping[str, Any]:
    """Return all settings but the run directory by their keys, the method's name first."""
    found: dict[str, Any] = {"method.name": config.method.name}
    for section, values in asdict(replace(config, run=None)).items():
        found |= (
            {f"{section}.{key}": value for key, value in values.items()}
            if isinstance(values, dict)
            else {section: values}
        )
    return found
