"""Measure the seconds of a step in each phase of a run.

Usage: python -m peptrain.comparison.timing SETTINGS FILE
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from peptrain.comparison.equal_cost import write_costs
from peptrain.config import RunConfig, load
from peptrain.data import Corpus, configured_corpus
from peptrain.distributed.world import World, world
from peptrain.errors import PeptrainError
from peptrain.execution.prepare import prepare
from peptrain.methods.base import Method
from peptrain.optim import schedule
from peptrain.rng import Rng
from peptrain.runs.build import bounds, build
from peptrain.settings.fields import intervals
from peptrain.training.loop import advance
from peptrain.training.objective import check_vocabulary, windows
from peptrain.training.state import TrainState

BEFORE = 5
"""Steps at the start of a phase that are not timed, for compilation and CUDA graph capture."""
LEAST, SECONDS = 20, 2.0
"""Minimum number of timed steps, and minimum seconds they take in total."""
EVERY = 5
"""Maximum interval of merges and other periodic events during timing."""


def step_seconds(config: RunConfig[Method]) -> list[float]:
    """Time a step in each phase of the run of a resolved `config`, in seconds, on this machine.

    Runs the trainer's own steps on the corpus and synchronizes after each. The learning rate is 0,
    so that training can't diverge.
    """
    corpus = configured_corpus(config.data.path)
    begins = bounds(config)[:-1]
    with world(config.train.device) as here:
        return [_of_phase(config, corpus, here, *which) for which in enumerate(begins)]


def _of_phase(
    config: RunConfig[Method], corpus: Corpus, here: World, phase: int, begin: int
) -> float:
    every = intervals(config.method)
    timed: dict[float, list[float]] = {}
    for steps in sorted({*map(float, every.values())} or {math.inf}):
        alone = {name: min(own, EVERY) if own == steps else 0 for name, own in every.items()}
        method = replace(config.method, **alone)
        timed[steps] = _seconds(replace(config, method=method), corpus, here, phase, begin)
    return spread(timed)


def _seconds(
    config: RunConfig[Method], corpus: Corpus, here: World, phase: int, begin: int
) -> list[float]:
    """Time steps of a phase, with an event every EVERY steps or more often."""
    model = build(config, phase)
    _leave_zero(model)
    check_vocabulary(model, corpus)
    optimizer, forward_backward = prepare(model, config, here, phase)
    # The warm-up may be longer than the run, whose final steps are not known yet.
    base = schedule.build(replace(config.schedule, warmup=0), config.train.steps)
    still = replace(base, multiplier=lambda step: 0.0)
    state = TrainState(model, forward_backward, optimizer, still, phase, begin, end=sys.maxsize)
    for _ in range(BEFORE):
        _timed(state, config, corpus, here)
    seconds: list[float] = []
    while len(seconds) < LEAST or sum(seconds) < SECONDS or len(seconds) % EVERY:
        seconds.append(_timed(state, config, corpus, here))
    return seconds


@torch.no_grad()
def _leave_zero(model: nn.Module) -> None:
    """Move factors that start at 0, for which an event may take another path than later on: LORO
    around frozen weights would find a singular pair in each exact step."""
    for name, p in model.named_parameters():
        if p.requires_grad and p.dim() == 2 and not p.any():
            p.copy_(1e-3 * torch.randn(p.shape, generator=Rng(0)(name), device="cpu"))


def _timed(state: TrainState, config: RunConfig[Method], corpus: Corpus, here: World) -> float:
    start = time.perf_counter()
    parts = windows(config, corpus, state.step, here)
    loss, _, _ = advance(state, config, parts, here)
    loss.item()  # waits for the device
    return time.perf_counter() - start


def spread(timed: Mapping[float, Sequence[float]]) -> float:
    """Seconds per step, with the events of each interval spread over its steps.

    timed: by interval, seconds of steps without the events of other intervals and with its own
    every min(interval, EVERY) steps. The result is u + the sum of x / interval, where u is the
    median of a step and x the excess over it per event.
    """
    usual = {every: statistics.median(seconds) for every, seconds in timed.items()}
    excess = {every: (statistics.fmean(seconds) - usual[every]) * min(every, EVERY)
              for every, seconds in timed.items()}  # fmt: skip
    return statistics.fmean(usual.values()) + sum(x / every for every, x in excess.items())


if __name__ == "__main__":
    settings, file = map(Path, sys.argv[1:])
    try:
        write_costs(file, "seconds", step_seconds(load(settings)))
    except PeptrainError as error:
        sys.exit(f"error: {error}")
