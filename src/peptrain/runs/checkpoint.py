"""Checkpoints: safetensors and JSON, written whole or not at all, never a pickle.

step-00000600/model.safetensors       every parameter, by name
              optimizer.safetensors   moments, by "parameter name/key"
              state.json              step, phase, clocks, what the run is
                  SHA256SUMS              for `sha256sum -c`, and for us on every load
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from peptrain.errors import CheckpointError

log = logging.getLogger("peptrain")
FORMAT = 2
FILES = ("model.safetensors", "optimizer.safetensors")
STATE, SUMS = "state.json", "SHA256SUMS"
NUMBERS = {"int": int, "float": float, "bool": bool}


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint in memory: tensors on the CPU."""

    step: int
    phase: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    groups: list[dict[str, Any]]
    """The clocks of the optimizer's groups: their integers, `params` left out."""
    identity: dict[str, Any]
    """What a continuation must agree in: the method, the model, the data, the precision."""
    end: int = 0
    """The step at which the phase was to end: what is due between two steps wasn't done there."""


def capture(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    step: int,
    phase: int,
    identity: Mapping[str, Any],
    end: int = 0,
) -> Checkpoint:
    """The state of training after `step` steps. Shared parameters are kept once."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    moments = dict(
        _kept(f"{names[p]}/{key}", value)
        for p, state in optimizer.state.items()
        for key, value in state.items()
    )
    tensors = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}
    clocks = [{k: v for k, v in g.items() if type(v) is int} for g in optimizer.param_groups]
    return Checkpoint(step, phase, tensors, moments, clocks, dict(identity), end)


def _kept(key: str, value: object) -> tuple[str, Tensor]:
    """A tensor of an optimizer's state as it is; a number as one, its type noted in the key."""
    if isinstance(value, Tensor):
        return key, value.detach().cpu().contiguous()
    kind = type(value).__name__
    if kind not in NUMBERS:
        raise CheckpointError(f"{key}: the optimizer keeps a {kind}; keep tensors and numbers")
    return f"{key}#{kind}", torch.tensor(value, dtype=torch.float64)


@torch.no_grad()
def load_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy saved parameters into `model`. Raises CheckpointError unless names and shapes agree."""
    own = dict(model.named_parameters())
    if missing := sorted(own.keys() ^ tensors.keys()):
        raise CheckpointError(
            f"the checkpoint has other parameters than this model: {missing[0]}"
            f" and {len(missing) - 1} more stand on one side only"
        )
    for name, p in own.items():
        if p.shape != tensors[name].shape:
            shapes = f"{list(tensors[name].shape)} in the checkpoint, {list(p.shape)} in the model"
            raise CheckpointError(f"{name}: {shapes}")
        p.copy_(tensors[name])


def load_optimizer(
    model: nn.Module, optimizer: Optimizer, saved: Checkpoint, *, same_phase: bool
) -> None:
    """Restore moments of the parameters that have saved ones and, within a phase, the clocks.

    After a phase boundary that is the parameters which keep their name and shape. Assigned
    directly: torch's load_state_dict would cast moments to the parameter's dtype.
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
        for group, clocks in zip(optimizer.param_groups, saved.groups, strict=True):
            group.update(clocks)


def agrees(
    saved: Checkpoint, identity: Mapping[str, Any], before: Mapping[str, Any] | None = None
) -> None:
    """Raise CheckpointError, naming the first setting, unless the run is what was saved.

    before: what settings count as that the checkpoint doesn't know, because they are newer.
    """
    then_all = {**(before or {}), **saved.identity}
    keys = then_all.keys() | identity.keys()
    for key in sorted(keys, key=lambda key: (key != "method.name", key)):
        then, now = then_all.get(key), identity.get(key)
        if then != now:
            raise CheckpointError(
                f"{key}: the checkpoint of step {saved.step} was written with {then!r}, and the"
                f" configuration says {now!r}; go on with the run's own config.toml"
            )


def save(directory: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `checkpoint`, then delete all but the newest `keep`.

    A hidden directory is filled, synced and renamed, so that an interruption leaves the earlier
    checkpoints alone. Raises CheckpointError (disk full, say), naming the newest good one.
    """
    final = directory / f"step-{checkpoint.step:08d}"
    temporary = directory / f".{final.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write(temporary, checkpoint)
        shutil.rmtree(final, ignore_errors=True)
        temporary.replace(final)
        _sync(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{final}: could not be written: {error}; {last_good(directory)}"
        ) from error
    done = available(directory)
    whole = [path for path in done if path <= final]  # training passed over a newer one: damaged
    for path in {*done} - {*whole[-keep:]}:
        shutil.rmtree(path, ignore_errors=True)
    return final


def last_good(directory: Path) -> str:
    """What a message says of the newest checkpoint there."""
    found = available(directory)
    if not found:
        return "there is no earlier checkpoint"
    again = f"`peptrain resume {directory.parent}` goes on from it"
    return f"the last good checkpoint is {found[-1]}, and {again}"


def _write(directory: Path, checkpoint: Checkpoint) -> None:
    save_file(checkpoint.model, directory / FILES[0])
    save_file(checkpoint.optimizer, directory / FILES[1])
    state = {
        "format": FORMAT,
        "step": checkpoint.step,
        "phase": checkpoint.phase,
        "end": checkpoint.end,
        "groups": checkpoint.groups,
        "identity": checkpoint.identity,
    }
    (directory / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
    (directory / SUMS).write_text(_sums(directory), encoding="utf-8")
    for file in directory.iterdir():
        _sync(file)
    _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sums(directory: Path) -> str:
    """What `sha256sum` would print for the files of a checkpoint."""
    lines = []
    for name in (*FILES, STATE):
        with (directory / name).open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {name}\n")
    return "".join(lines)


def available(directory: Path) -> list[Path]:
    """The checkpoints in `directory`, oldest first."""
    return sorted(directory.glob("step-*"))


def latest(directory: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; a damaged one is named in a warning and passed over.

    None when there is no checkpoint at all. Raises CheckpointError when all are damaged, or when
    one was written in another format.
    """
    found = available(directory)
    for path in reversed(found):
        try:
            return read(path)
        except _Damaged as damage:
            log.warning("%s is damaged (%s); falling back to the one before", path, damage)
    if found:
        raise CheckpointError(f"{directory}: none of the {len(found)} checkpoints can be read")
    return None


class _Damaged(Exception):
    """A checkpoint that is not what was written."""


def read(path: Path) -> Checkpoint:
    """One checkpoint, its checksums verified."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise CheckpointError(
                f"{path}: format {state['format']}, and this peptrain reads format {FORMAT};"
                " continue with the version that wrote it"
            )
        written = (path / SUMS).read_text(encoding="utf-8").splitlines()
        for then, now in zip(written, _sums(path).splitlines(), strict=True):
            if then != now:
                raise _Damaged(f"{now.split()[-1]} has another checksum")
        model, moments = (load_file(path / name) for name in FILES)
        keys = ("groups", "identity", "end")
        return Checkpoint(state["step"], state["phase"], model, moments, *(state[k] for k in keys))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise _Damaged(str(error)) from error
