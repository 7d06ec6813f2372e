"""Build a model with the method's layers from a resolved configuration or a checkpoint."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peptrain.config import RunConfig, load
from peptrain.errors import CheckpointError, Unsupported
from peptrain.methods.base import Method
from peptrain.methods.targets import TargetedMethod
from peptrain.models.classifier import build_classifier
from peptrain.models.dense import dense_state, load_dense
from peptrain.models.hf import build_model
from peptrain.models.sites import (
    check_adaptable,
    find_sites,
    has_effective_weight,
    reparametrized,
    warn_of_experts,
)
from peptrain.rng import Rng, seed_default
from peptrain.runs.checkpoint import Checkpoint, at_step, latest, load_model
from peptrain.runs.directory import RunDir
from peptrain.runs.ends import config_file
from peptrain.runs.identity import check_settings
from peptrain.runs.select import at, find

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plain_model(config: RunConfig[Method]) -> PreTrainedModel:
    """Return the Hugging Face model, freshly initialised on the CPU, without any method."""
    train, tune = config.train, config.tune
    assert train.precision is not None
    seed = Rng(train.seed).integer("model")
    if tune.task:
        assert tune.pad_token is not None
        return build_classifier(
            config.model, tune.classes, tune.pad_token,
            seq_len=train.seq_len, seed=seed, precision=train.precision,
        )  # fmt: skip
    return build_model(config.model, seq_len=train.seq_len, seed=seed, precision=train.precision)


def build(
    config: RunConfig[Method], phase: int, dense: Mapping[str, Tensor] | None = None
) -> PreTrainedModel:
    """Return the model of `phase` on the CPU, fresh or with the trained weights `dense`."""
    model = plain_model(config)
    if dense is not None:
        load_dense(model, dense)
    warn_of_experts(model)
    sites = find_sites(model, fresh=dense is None)
    if isinstance(config.method, TargetedMethod):
        check_adaptable(model)
    rng = Rng(config.train.seed)
    with torch.random.fork_rng(devices=[]):  # for modules that draw globally, like nn.Linear
        seed_default(rng.integer("install", phase))
        config.method.install(model, sites, rng, phase)
    _check_dense_weights(config, model, phase)
    if dense is not None:
        _check_buffers(config, model, phase)
    return model


def _check_dense_weights(config: RunConfig[Method], model: PreTrainedModel, phase: int) -> None:
    """Raise Unsupported early for layers without the dense weights that will be needed."""
    method, layers = config.method, list(reparametrized(model))
    for layer in layers if method.has_dense_equivalent else ():
        if not has_effective_weight(layer):
            kind = type(layer).__name__
            raise Unsupported(
                f"method.name: {method.name}: {kind} has no effective_weight(), so the run could"
                f" not be evaluated; define it, or, if the layer is not linear, set"
                f" has_dense_equivalent = False in {type(method).__name__}"
            )
    if layers and not method.has_dense_equivalent and phase + 2 < len(bounds(config)):
        raise Unsupported(
            f"method.name: {method.name}: has no dense equivalent, so phase {phase + 1} could not"
            f" start from the weights of phase {phase}; use such layers only in the last phase"
        )


def _check_buffers(config: RunConfig[Method], model: PreTrainedModel, phase: int) -> None:
    """Raise Unsupported if a layer's buffer depends on trained weights.

    Checkpoints contain no buffers, and a resume builds the layers from weights drawn again.
    """
    held = _buffers(model)
    again = _buffers(build(config, phase)) if held else {}
    for name, buffer in held.items():
        if name not in again or not torch.equal(buffer, again[name]):
            raise Unsupported(
                f"method.name: {config.method.name}: the buffer {name} depends on the weights, and"
                " checkpoints contain no buffers, so a resumed run would have another one; make it"
                " nn.Parameter(..., requires_grad=False)"
            )


def _buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    layers = reparametrized(model)
    return {f"{x.site}.{name}": buffer for x in layers for name, buffer in x.named_buffers()}


def rebuild(config: RunConfig[Method], saved: Checkpoint, phase: int) -> PreTrainedModel:
    """Return the model of `phase` with the weights of a checkpoint of that or an earlier phase."""
    if saved.phase > (last := len(config.method.phases(config.train.steps))):
        raise CheckpointError(
            f"the checkpoint of step {saved.step} is of phase {saved.phase}, but the last phase of"
            f" {config.method.name} is {last}; its state.json was changed, or the method was"
        )
    model = build(config, saved.phase)
    load_model(model, saved.model)
    return model if phase == saved.phase else build(config, phase, dense_state(model))


def bounds(config: RunConfig[Method]) -> tuple[int, ...]:
    """Return the steps that delimit the phases: 0, those where the model is rebuilt, the last."""
    steps = config.train.steps
    return (0, *(b for b in config.method.phases(steps) if b < steps), steps)


def phase_at(config: RunConfig[Method], step: int) -> tuple[int, int]:
    """Return (phase, the step at which it ends) after `step` completed steps."""
    ends = bounds(config)[1:]
    phase = min(bisect_right(ends[:-1], step), len(ends) - 1)
    return phase, ends[phase]


@dataclass(frozen=True)
class Opened:
    """A run at one of its checkpoints, on the CPU."""

    run: RunDir
    config: RunConfig[Method]
    saved: Checkpoint
    model: PreTrainedModel
    """The model with the method's layers."""

    def evaluated(self) -> PreTrainedModel:
        """Return the model to evaluate: the dense equivalent, or the model itself without one."""
        return self.dense_twin() if self.config.method.has_dense_equivalent else self.model

    def dense_twin(self) -> PreTrainedModel:
        """Return the dense equivalent as a plain Hugging Face model in the run's dtype."""
        plain = plain_model(self.config)
        load_dense(plain, dense_state(self.model))
        plain.eval()
        return plain


def run_config(run: RunDir, file: Path | None = None) -> RunConfig[Method]:
    """Load the configuration of a run. A model's config.json is read from the run's own copy.

    file: the configuration of an earlier end. Unset: that of the run.
    """
    config = load(file or run.config_file)
    for key in ("precision", "micro_batch", "eval_tokens"):  # whichever version wrote the file
        if getattr(config.train, key) is None:
            raise CheckpointError(
                f"{file or run.config_file}: incomplete (train.{key} is missing); restore the"
                " original file"
            )
    if not run.model_file.exists():
        return config
    return replace(config, model=replace(config.model, config=run.model_file))


def checked_config(path: Path) -> tuple[RunDir, RunConfig[Method], Checkpoint | None]:
    """Load the configuration of a run and its latest complete checkpoint, None before the first.

    For RUN@STEP they are those of the step. Raises CheckpointError if no checkpoint of the step is
    kept, or if the configuration is not that of the checkpoint.
    """
    path, step = at(path)
    run = RunDir.open(path)
    if step is not None:
        directory, file = find(run, step)
        saved: Checkpoint | None = at_step(directory, step)
    elif (saved := latest(run.checkpoints)) is not None:
        file = config_file(run, saved.step)
    if saved is None:
        return run, run_config(run), None
    config = run_config(run, file)
    check_settings(saved, config, run.path)
    return run, config, saved


def read_run(path: Path) -> tuple[RunDir, RunConfig[Method], Checkpoint]:
    """Do as `checked_config`, but raise CheckpointError for a run without a checkpoint."""
    run, config, saved = checked_config(path)
    if saved is None:
        raise CheckpointError(f"{path}: contains no checkpoint yet")
    return run, config, saved


def open_run(path: Path) -> Opened:
    """Open a run at its latest complete checkpoint, or RUN@STEP at that of the step.

    Raises what `read_run` raises.
    """
    run, config, saved = read_run(path)
    model = rebuild(config, saved, saved.phase)
    model.eval()
    return Opened(run, config, saved, model)
