"""Write and read checkpoints: safetensors and JSON (no pickle), written atomically.

step-00000600/model.safetensors       every parameter, by name
              optimizer.safetensors   moments, by "parameter name/key"
              state.json              step, phase, step counters, identity of the run
              SHA256SUMS              for `sha256sum -c`, and verified on every load
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from peptrain.errors import CheckpointError
from peptrain.files import is_barred, open_up, read_json_object, scratch, sha256sums
from peptrain.settings.fields import shown
from peptrain.text import quoted

log = logging.getLogger("peptrain")
FORMAT = 2
FILES = ("model.safetensors", "optimizer.safetensors")
STATE, SUMS = "state.json", "SHA256SUMS"
SUMMED = (*FILES, STATE)
NUMBERS = {"int": int, "float": float, "bool": bool}


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint in memory: tensors on the CPU."""

    step: int
    phase: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    groups: list[dict[str, Any]]
    """The integers of each optimizer group, such as step counters."""
    identity: dict[str, Any]
    """Settings in which a run that continues must agree: method, model, data, precision, ..."""
    end: int = 0
    """The step at which the phase was to end. `after_step` is not called at that step."""
    state_bytes: tuple[int, ...] = ()
    """Bytes of the optimizer's moments, by phase, up to this one; 0 where an older version ran."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The other settings of the run, such as rates; empty where an older version ran."""
    rows: int | None = None
    """Rows of metrics written before this checkpoint; None where an older version ran."""
    sums: str = ""
    """The checksums of its files, which change with its weights; empty before it was saved."""


@dataclass(frozen=True)
class Keep:
    """Which checkpoints are not deleted."""

    last: int
    """How many of the latest."""
    at: Callable[[int], bool] = lambda step: False
    """Whether that of a step is kept forever."""
    stable: int | None = None
    """The latest one up to this step is kept too: where the decay of the schedule begins."""

    def of(self, steps: Sequence[int]) -> set[int]:
        """Return those of `steps`, in ascending order, whose checkpoints are kept."""
        stable = [step for step in steps if self.stable is not None and step <= self.stable]
        return {*steps[-self.last :], *stable[-1:], *filter(self.at, steps)}


def capture(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    step: int,
    phase: int,
    identity: Mapping[str, Any],
    end: int = 0,
    state_bytes: Sequence[int] = (),
    settings: Mapping[str, Any] | None = None,
    rows: int | None = None,
) -> Checkpoint:
    """Return the state of training after `step` steps. Shared parameters are stored once."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    moments = dict(
        _kept(f"{names[p]}/{key}", value)
        for p, state in optimizer.state.items()
        for key, value in state.items()
    )
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    clocks = [{k: v for k, v in g.items() if type(v) is int} for g in optimizer.param_groups]
    sizes = tuple(state_bytes)
    given = dict(settings or {})
    return Checkpoint(
        step, phase, tensors, moments, clocks, dict(identity), end, sizes, given, rows
    )


def _kept(key: str, value: object) -> tuple[str, Tensor]:
    """Return the entry for a value of the optimizer's state. The key of a number gets its type."""
    if isinstance(value, Tensor):
        return key, value.detach().cpu().contiguous()
    kind = type(value).__name__
    if kind not in NUMBERS:
        raise CheckpointError(f"{key}: optimizer state contains a {kind}; use tensors and numbers")
    return f"{key}#{kind}", torch.tensor(value, dtype=torch.float64)


@torch.no_grad()
def load_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved parameters into `model`. Raises CheckpointError unless names and shapes agree."""
    own = dict(model.named_parameters())
    if missing := sorted(own.keys() ^ tensors.keys()):
        raise CheckpointError(
            f"the parameters of the checkpoint and of this model differ: {missing[0]}"
            f" and {len(missing) - 1} more are in only one of them"
        )
    for name, p in own.items():
        if p.shape != tensors[name].shape:
            shapes = f"{list(tensors[name].shape)} in the checkpoint, {list(p.shape)} in the model"
            raise CheckpointError(f"{name}: {shapes}")
        p.copy_(tensors[name])


def load_optimizer(
    model: nn.Module, optimizer: Optimizer, saved: Checkpoint, *, same_phase: bool
) -> None:
    """Restore the saved moments and, within a phase, the integers of the optimizer's groups.

    After a phase boundary only parameters that keep their name and shape get their moments back.
    The state is assigned directly, because torch's load_state_dict would cast moments to the
    parameter's dtype.
    """
    by_name = dict(model.named_parameters())
    trained = {id(p) for g in optimizer.param_groups for p in g["params"]}
    for key, value in saved.optimizer.items():
        name, _, part = key.rpartition("/")
        part, _, kind = part.partition("#")
        p = by_name.get(name)
        if p is not None and id(p) in trained and saved.model[name].shape == p.shape:
            kept = NUMBERS[kind](value.item()) if kind else value.clone().to(p.device)
            optimizer.state[p][part] = kept
    if same_phase:
        if (there := len(saved.groups)) != (here := len(optimizer.param_groups)):
            raise CheckpointError(
                f"the optimizer's groups: {there} in the checkpoint of step {saved.step}, but"
                f" {here} in this run; its {STATE} was changed, or the method was"
            )
        for group, clocks in zip(optimizer.param_groups, saved.groups, strict=True):
            group.update(clocks)


def agrees(
    saved: Checkpoint,
    identity: Mapping[str, Any],
    before: Mapping[str, Any] | None = None,
    repair: str = "restore the run's original {file}",
) -> None:
    """Raise CheckpointError, naming the first setting that differs, unless the identities agree.

    before: values of settings that an older checkpoint does not contain. repair: what to do, with
    the {file} of the run that has the setting, or its data.
    """
    then_all = {**(before or {}), **saved.identity}
    keys = then_all.keys() | identity.keys()
    for key in sorted(keys, key=lambda key: (key != "method.name", key)):
        then, now = then_all.get(key), identity.get(key)
        file = {"model.config": "model.json", "data": "data"}.get(key, "config.toml")
        if then != now:
            raise CheckpointError(
                f"{key}: the checkpoint of step {saved.step} was written with {then!r}, but the"
                f" configuration has {now!r}; {repair.format(file=file)}"
            )


def save(directory: Path, checkpoint: Checkpoint, keep: Keep) -> Path:
    """Write `checkpoint`, then delete those that `keep` does not keep.

    A hidden directory is filled, synced and renamed, so that an interruption leaves earlier
    checkpoints intact. What earlier interruptions left is deleted: only one process trains a run.

    Raises CheckpointError, for example on a full disk, with the path of the
    latest good checkpoint.
    """
    final = _path(directory, checkpoint.step)
    for stray in directory.glob(".step-*"):
        shutil.rmtree(stray, ignore_errors=True)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with scratch(final) as temporary:
            _write(temporary, checkpoint)
            shutil.rmtree(final, ignore_errors=True)
            temporary.replace(final)
        _sync(directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{final}: could not be written: {error}; {last_good(directory)}"
        ) from error
    for path in available(directory):
        if step_of(path) > checkpoint.step:  # it is damaged, and was skipped
            shutil.rmtree(path, ignore_errors=True)
    delete_old(directory, checkpoint.step, keep)
    return final


def delete_old(directory: Path, step: int, keep: Keep) -> None:
    """Delete the checkpoints up to that of `step` that `keep` does not keep.

    Each is renamed first, so that nobody who reads the run takes it for a damaged one meanwhile.
    """
    steps = [s for s in map(step_of, available(directory)) if s <= step]
    for old in set(steps) - keep.of(steps):
        with contextlib.suppress(OSError), scratch(_path(directory, old)) as gone:
            _path(directory, old).replace(gone)


def name_of(step: int) -> str:
    """Return the name of the directory of a step's checkpoint."""
    return f"step-{step:08d}"


def _path(directory: Path, step: int) -> Path:
    return directory / name_of(step)


def last_good(directory: Path) -> str:
    """Describe the latest checkpoint in `directory` for an error message."""
    found = available(directory)
    if not found:
        return "there is no earlier checkpoint"
    again = f"resume from it with `peptrain resume {quoted(directory.parent)}`"
    return f"the last good checkpoint is {found[-1]} ({again})"


def _write(directory: Path, checkpoint: Checkpoint) -> None:
    save_file(checkpoint.model, directory / FILES[0])
    save_file(checkpoint.optimizer, directory / FILES[1])
    state = {
        "format": FORMAT,
        "step": checkpoint.step,
        "phase": checkpoint.phase,
        "end": checkpoint.end,
        "state_bytes": checkpoint.state_bytes,
        "groups": checkpoint.groups,
        "identity": checkpoint.identity,
        "settings": checkpoint.settings,
        "rows": checkpoint.rows,
    }
    (directory / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    (directory / SUMS).write_text(sha256sums(directory, SUMMED), encoding="utf-8")
    open_up(directory)
    for file in directory.iterdir():
        _sync(file)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def available(directory: Path) -> list[Path]:
    """Return the paths of the checkpoints in `directory`, oldest first."""
    named = (p for p in directory.glob("step-*") if p.name.removeprefix("step-").isdecimal())
    return sorted(named, key=step_of)


def step_of(path: Path) -> int:
    """Return the step of the checkpoint at `path`."""
    return int(path.name.removeprefix("step-"))


def at_step(directory: Path, step: int) -> Checkpoint:
    """Return the checkpoint of a step.

    Raises DamagedCheckpoint if it is incomplete or changed, CheckpointError if the run's training
    deletes it meanwhile.
    """
    path = _path(directory, step)
    try:
        return read(path)
    except _Damaged as damage:
        if path not in available(directory):
            raise CheckpointError(
                f"{path}: the training deleted it before it was read; choose another step, or keep"
                " more of them with --train.keep"
            ) from None
        raise DamagedCheckpoint(f"{path} is damaged ({damage}); choose another step") from None


def latest(directory: Path) -> Checkpoint | None:
    """Return the latest complete checkpoint, or None if there are no checkpoints.

    Damaged ones are skipped with a warning. One that the run's training deletes meanwhile has a
    later one in its place. Raises CheckpointError when all are damaged, or when one was written in
    another format.
    """
    found = available(directory)
    for path in reversed(found):
        try:
            return read(path)
        except _Damaged as damage:
            if path not in available(directory):
                return latest(directory)
            log.warning("%s is damaged (%s); falling back to the previous checkpoint", path, damage)
    if found:
        raise CheckpointError(f"{directory}: none of the {len(found)} checkpoints can be read")
    return None


def _rules(path: Path, state: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Yield, for each value of a checkpoint's state, its key and whether it can be right."""

    def counts(values: object) -> bool:
        return isinstance(values, list) and all(map(_is_count, values))

    step, groups = state["step"], state["groups"]
    yield "step", _is_count(step) and path.name == f"step-{step:08d}"
    yield "phase", _is_count(state["phase"])
    yield "end", _is_count(state["end"])
    sound = isinstance(groups, list) and all(isinstance(group, dict) for group in groups)
    yield "groups", sound and all(type(v) is int for group in groups for v in group.values())
    yield "identity", isinstance(state["identity"], dict)
    yield "state_bytes", counts(state.get("state_bytes", []))
    yield "settings", isinstance(state.get("settings", {}), dict)
    yield "rows", state.get("rows") is None or _is_count(state["rows"])


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


class DamagedCheckpoint(CheckpointError):
    """The checkpoint that was asked for is damaged. Others of the run may be whole."""


class _Damaged(Exception):
    """A checkpoint is incomplete or differs from what was written."""


def read(path: Path) -> Checkpoint:
    """Read one checkpoint and verify its checksums.

    Raises CheckpointError for one that may not be read: to fall back to an earlier one, and to
    delete it at the next save, is right for a damaged one only.
    """
    try:
        state = read_json_object(path / STATE)
        if state["format"] != FORMAT:
            raise CheckpointError(
                f"{path}: written in format {state['format']}, but this version reads format"
                f" {FORMAT}; use the version that wrote it"
            )
        written = (path / SUMS).read_text(encoding="utf-8").splitlines()
        for then, now in zip(written, sha256sums(path, SUMMED).splitlines(), strict=True):
            if then != now:
                raise _Damaged(f"{now.split()[-1]} does not match its checksum")
        model, moments = (load_file(path / name) for name in FILES)
        groups, identity, end = (state[key] for key in ("groups", "identity", "end"))
        sizes = tuple(state.get("state_bytes", ()))  # this and what follows is absent in 0.1.0
        settings, rows = state.get("settings", {}), state.get("rows")
        step, phase = state["step"], state["phase"]
        for key, holds in _rules(path, state):
            if not holds:
                raise _Damaged(f"{STATE}: {key} is {shown(state.get(key))}")
        return Checkpoint(
            step, phase, model, moments, groups, identity, end, sizes, settings, rows,
            "\n".join([*written, ""]),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        files = (path, *(path / name for name in (*SUMMED, SUMS)))
        if barred := next(filter(is_barred, files), None):
            raise CheckpointError(
                f"{barred}: can't be read: permission denied; change its permissions"
            ) from error
        raise _Damaged(str(error)) from error
    except RuntimeError as error:  # PyTorch, of a file that is gone; or there is no memory
        if all((path / name).is_file() for name in FILES):
            raise
        raise _Damaged(str(error)) from error
