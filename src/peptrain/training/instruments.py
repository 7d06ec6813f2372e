"""What `train.observe` measures during training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import nn

from peptrain.analysis.live import Dynamics
from peptrain.distributed.world import World
from peptrain.runs.directory import RunDir
from peptrain.sections import TrainConfig


class Instrument(Protocol):
    """Measures a model in training and does not change it. Every rank has one."""

    def due(self, model: nn.Module, step: int) -> bool:
        """Return whether to measure after `step` steps: the same on every rank.

        Called after each step, and before the first step of a process or phase.
        """
        ...

    def measure(
        self, model: nn.Module, step: int, seconds: float, spent: float
    ) -> Iterable[Mapping[str, Any]]:
        """Return rows for metrics.jsonl.

        seconds: the training time up to this step. spent: the time of earlier measurements. Must be
        called on every rank. Only rank 0's rows are written.
        """
        ...


class Nothing:
    """Measures nothing."""

    def due(self, model: nn.Module, step: int) -> bool:
        return False

    def measure(
        self, model: nn.Module, step: int, seconds: float, spent: float
    ) -> Iterable[Mapping[str, Any]]:
        return ()


def instrument(train: TrainConfig, run: RunDir, here: World) -> Instrument:
    """Return the instrument that `train.observe` names."""
    if train.observe == "none":
        return Nothing()
    return Dynamics(run.path, here, steps=train.steps, log_every=train.log_every,
                    budget=train.observe_budget)  # fmt: skip
