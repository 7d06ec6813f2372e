"""From a resolved configuration to a model with the method's layers: one path for all."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from peptrain.checkpoint import Checkpoint, load_model
from peptrain.config import RunConfig
from peptrain.dense import dense_state, load_dense
from peptrain.methods.base import Method
from peptrain.model import build_model, find_sites
from peptrain.rng import Rng

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build(
    config: RunConfig[Method], phase: int, dense: Mapping[str, Tensor] | None = None
) -> PreTrainedModel:
    """The model of `phase` on the CPU: fresh, or from the `dense` weights of an earlier phase."""
    train, rng = config.train, Rng(config.train.seed)
    assert train.precision is not None
    model = build_model(
        config.model, seq_len=train.seq_len, seed=rng.integer("model"), precision=train.precision
    )
    if dense is not None:
        load_dense(model, dense)
    config.method.install(find_sites(model), rng, phase)
    return model


def rebuild(config: RunConfig[Method], saved: Checkpoint, phase: int) -> PreTrainedModel:
    """The model of `phase` with the weights of a checkpoint of it, or of an earlier phase."""
    model = build(config, saved.phase)
    load_model(model, saved.model)
    return model if phase == saved.phase else build(config, phase, dense_state(model))


def phase_at(config: RunConfig[Method], step: int) -> tuple[int, int]:
    """(phase, the step at which it ends) once `step` steps are completed."""
    steps = config.train.steps
    bounds = [*config.method.phases(steps), steps]
    phase = min(bisect_right(bounds[:-1], step), len(bounds) - 1)
    return phase, bounds[phase]
