"""Measure the seconds of a step in each phase of a run.

Usage: python -m peptrain.comparison.timing SETTINGS FILE
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from peptrain.comparison.equal_cost import write_costs
from peptrain.config import RunConfig, load
from peptrain.data import Corpus, configured_corpus
from peptrain.distributed.world import World, world
from peptrain.errors import PeptrainError
from peptrain.execution.prepare import prepare
from peptrain.methods.base import Method
from peptrain.optim import schedule
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
    often = {name: min(steps, EVERY) for name, steps in every.items()}
    config = replace(config, method=replace(config.method, **often))
    model = build(config, phase)
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
    return spread(seconds, min(every.values(), default=math.inf))


def _timed(state: TrainState, config: RunConfig[Method], corpus: Corpus, here: World) -> float:
    start = time.perf_counter()
    parts = windows(config, corpus, state.step, here)
    loss, _, _ = advance(state, config, parts, here)
    loss.item()  # waits for the device
    return time.perf_counter() - start


def spread(seconds: Sequence[float], every: float) -> float:
    """Seconds per step, with events that are due every `every` steps spread over these steps.

    The timed `seconds` have an event every min(every, EVERY) steps. The result is u + x / every,
    where u is the median of a step and x the excess over u per event.
    """
    usual = statistics.median(seconds)
    excess = (statistics.fmean(seconds) - usual) * min(every, EVERY)
    return usual + excess / every


if __name__ == "__main__":
    settings, file = map(Path, sys.argv[1:])
    try:
        write_costs(file, "seconds", step_seconds(load(settings)))
    except PeptrainError as error:
        sys.exit(f"error: {error}")
