"""From a resolved configuration to a model with the method's layers: one path for all."""

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
from peptrain.models.dense import dense_state, load_dense
from peptrain.models.hf import build_model
from peptrain.models.sites import find_sites, has_effective_weight, reparametrized, warn_of_experts
from peptrain.rng import Rng, seed_default
from peptrain.runs.checkpoint import Checkpoint, latest, load_model
from peptrain.runs.directory import RunDir

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plain_model(config: RunConfig[Method]) -> PreTrainedModel:
    """The Hugging Face model before any method, freshly initialised, on the CPU."""
    train = config.train
    assert train.precision is not None
    seed = Rng(train.seed).integer("model")
    return build_model(config.model, seq_len=train.seq_len, seed=seed, precision=train.precision)


def build(
    config: RunConfig[Method], phase: int, dense: Mapping[str, Tensor] | None = None
) -> PreTrainedModel:
    """The model of `phase` on the CPU: fresh, or from `dense` weights that were trained."""
    model = plain_model(config)
    if dense is not None:
        load_dense(model, dense)
    warn_of_experts(model)
    sites = find_sites(model, fresh=dense is None)
    rng = Rng(config.train.seed)
    with torch.random.fork_rng(devices=[]):  # for modules that draw by themselves, an nn.Linear say
        seed_default(rng.integer("install", phase))
        config.method.install(model, sites, rng, phase)
    _check_dense_weights(config, model, phase)
    return model


def _check_dense_weights(config: RunConfig[Method], model: PreTrainedModel, phase: int) -> None:
    """Raise Unsupported now for layers whose dense weights will be asked for and don't exist."""
    method, layers = config.method, list(reparametrized(model))
    for layer in layers if method.has_dense_equivalent else ():
        if not has_effective_weight(layer):
            kind = type(layer).__name__
            raise Unsupported(
                f"method.name: {method.name}: {kind} has no effective_weight(), so the run could"
                f" not be evaluated; define it, or for a map that is not linear set"
                f" has_dense_equivalent = False in {type(method).__name__}"
            )
    if layers and not method.has_dense_equivalent and phase + 2 < len(bounds(config)):
        raise Unsupported(
            f"method.name: {method.name}: has no dense equivalent, so phase {phase + 1} could not"
            f" start from the weights of phase {phase}; keep such layers to the last phase"
        )


def rebuild(config: RunConfig[Method], saved: Checkpoint, phase: int) -> PreTrainedModel:
    """The model of `phase` with the weights of a checkpoint of it, or of an earlier phase."""
    model = build(config, saved.phase)
    load_model(model, saved.model)
    return model if phase == saved.phase else build(config, phase, dense_state(model))


def bounds(config: RunConfig[Method]) -> tuple[int, ...]:
    """The steps between which the phases lie: 0, where the model is rebuilt, the run's last."""
    steps = config.train.steps
    return (0, *(b for b in config.method.phases(steps) if b < steps), steps)


def phase_at(config: RunConfig[Method], step: int) -> tuple[int, int]:
    """(phase, the step at which it ends) once `step` steps are completed."""
    ends = bounds(config)[1:]
    phase = min(bisect_right(ends[:-1], step), len(ends) - 1)
    return phase, ends[phase]


@dataclass(frozen=True)
class Opened:
    """A run as it stood at a checkpoint, on the CPU."""

    config: RunConfig[Method]
    saved: Checkpoint
    model: PreTrainedModel
    """With the method's layers."""

    def evaluated(self) -> PreTrainedModel:
        """What evaluation looks at: the dense twin, or the model itself where there is none."""
        return self.dense_twin() if self.config.method.has_dense_equivalent else self.model

    def dense_twin(self) -> PreTrainedModel:
        """The same function as a plain Hugging Face model, in the run's dtype."""
        plain = plain_model(self.config)
        load_dense(plain, dense_state(self.model))
        plain.eval()
        return plain


def run_config(run: RunDir) -> RunConfig[Method]:
    """The configuration in a run directory; a config.json is read from the run's own copy."""
    config = load(run.config_file)
    if not run.model_file.exists():
        return config
    return replace(config, model=replace(config.model, config=run.model_file))


def open_run(path: Path) -> Opened:
    """The run in `path` at its newest whole checkpoint. Raises CheckpointError if it has none."""
    run = RunDir.open(path)
    config = run_config(run)
    saved = latest(run.checkpoints)
    if saved is None:
        raise CheckpointError(f"{path}: there is no checkpoint in it yet")
    model = rebuild(config, saved, saved.phase)
    model.eval()
    return Opened(config, saved, model)
