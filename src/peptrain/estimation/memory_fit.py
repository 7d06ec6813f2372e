"""What fits into the memory of a GPU: the largest micro-batch and rank; if nothing does, why."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from peptrain.config import RunConfig
from peptrain.errors import ConfigError
from peptrain.estimation.phases import PhaseEstimate, PhaseEstimator
from peptrain.methods.base import Method
from peptrain.settings.fields import quiet

GIB = 2**30
Watch = Callable[[str], None]
"""Is told what is tried next: a trial takes seconds."""


@dataclass(frozen=True)
class MemoryFit:
    """What fits into `gpu_memory` bytes."""

    gpu_memory: int
    fits: bool
    """Whether the run does, as it is configured."""
    micro_batch: int | None
    """The largest at the configured rank; a divisor of the rows of a rank's step. None: not one."""
    rank: int | None = None
    """If the run does not fit: the largest rank that does at `rank_micro_batch`. None: not one."""
    rank_micro_batch: int | None = None
    """The configured one if it fits at some rank, else 1."""


def fit(configured: PhaseEstimator, gpu_memory: int, watch: Watch) -> MemoryFit:
    """Raises ConfigError if no other micro-batch and no lower rank does."""
    with quiet():
        return _Search(configured, gpu_memory, watch).fit()


class _Search:
    def __init__(self, configured: PhaseEstimator, gpu_memory: int, watch: Watch) -> None:
        self.configured, self.gpu_memory, self.watch = configured, gpu_memory, watch
        self.rank: int | None = getattr(configured.config.method, "rank", None)
        self.at_rank = cache(self._at_rank)

    def fit(self) -> MemoryFit:
        now = self.configured.micro_batch
        fits = self.configured.peak(now) <= self.gpu_memory
        micro_batch = self._largest_micro_batch()
        if fits:
            return MemoryFit(self.gpu_memory, fits, micro_batch)
        for tried in (now, 1) if micro_batch is None else (now,):
            if (rank := self._largest_rank(tried)) is not None:
                return MemoryFit(self.gpu_memory, fits, micro_batch, rank, tried)
        if micro_batch is None:
            raise ConfigError(self._too_little())
        return MemoryFit(self.gpu_memory, fits, micro_batch)

    def _largest_micro_batch(self) -> int | None:
        """At the configured rank; a micro-batch of 0, which is what stays, is not one."""
        rows = self.configured.rows
        divisors = [k for k in range(1, rows + 1) if rows % k == 0]
        return _largest([0, *divisors], lambda k: self._peak(k, self.rank), self.gpu_memory) or None

    def _largest_rank(self, micro_batch: int) -> int | None:
        """The largest, up to the configured one, at which the run fits; None for no rank."""
        if self.rank is None:
            return None
        ranks = range(1, self.rank + 1)
        return _largest(ranks, lambda rank: self._peak(micro_batch, rank), self.gpu_memory)

    def _peak(self, micro_batch: int, rank: int | None) -> int:
        if micro_batch:
            self.watch(f"a micro-batch of {micro_batch}" + (f" at rank {rank}" if rank else ""))
        return self.at_rank(rank).peak(micro_batch, self.gpu_memory)

    def _at_rank(self, rank: int | None) -> PhaseEstimator:
        if rank == self.rank:
            return self.configured
        method: Any = replace(self.configured.config.method, rank=rank)  # type: ignore[call-arg]
        return self.configured.like(replace(self.configured.config, method=method))

    def _too_little(self) -> str:
        """Of the least that was tried: what is more than fits, and what would help."""
        rank = self.rank and 1
        least = self.at_rank(rank)
        at = "a micro-batch of 1" + (" and rank 1" if rank else "")
        helps = []
        for name, config in _repairs(least.config):
            self.watch(f"{at} with {name}")
            if least.like(config).peak(1, self.gpu_memory) <= self.gpu_memory:
                helps.append(name)
        advice = f"set {' or '.join(helps)}, or " if helps else ""
        return (
            f"--gpu-memory: {_gib(self.gpu_memory)} is too little for {least.config.method.name},"
            f" also at {at}: {_excess(least, self.gpu_memory)}; {advice}choose a smaller model or"
            " another method"
        )


def _largest(sizes: Sequence[int], peak: Callable[[int], int], gpu_memory: int) -> int | None:
    """The largest of the ascending `sizes` whose peak fits; None if none does.

    Between one that fits and one that doesn't, the next to be tried is where the straight line
    between their peaks meets the GPU's memory: peaks are nearly straight lines, and cost seconds.
    """
    low, high = 0, len(sizes) - 1
    if (most := peak(sizes[high])) <= gpu_memory:
        return sizes[high]
    if (least := peak(sizes[low])) > gpu_memory:
        return None
    while high - low > 1:
        share = (gpu_memory - least) / (most - least)
        meets = sizes[low] + share * (sizes[high] - sizes[low])
        middle = min(max(bisect_right(sizes, meets) - 1, low + 1), high - 1)
        if (between := peak(sizes[middle])) <= gpu_memory:
            low, least = middle, between
        else:
            high, most = middle, between
    return sizes[low]


def _repairs(config: RunConfig[Any]) -> Iterator[tuple[str, RunConfig[Method]]]:
    """Settings that take less memory, each with its name."""
    t = config.train
    if not t.checkpoint_activations:
        again = replace(t, checkpoint_activations=True)
        yield "train.checkpoint_activations true", replace(config, train=again)
    if t.precision != "bf16":
        yield "train.precision bf16", replace(config, train=replace(t, precision="bf16"))
    yield "a shorter train.seq_len", replace(config, train=replace(t, seq_len=1))
    if getattr(config.method, "warm_start_steps", 0):
        cold = replace(config.method, warm_start_steps=0)
        name = "method.warm_start_steps 0 (--init-from takes what was trained before)"
        yield name, replace(config, method=cold)


def _excess(estimator: PhaseEstimator, gpu_memory: int) -> str:
    """What of the phases, at a micro-batch of 1, is more than there is memory."""
    phases = estimator.phases(1)
    stays = max(phases, key=_stays)
    if _stays(stays) > gpu_memory:
        where = f" in steps {stays.first} to {stays.last}" if len(phases) > 1 else ""
        parts = {"weights": stays.weight_bytes, "gradients": stays.gradient_bytes,
                 "optimizer state": stays.state_bytes, "exchange between ranks":
                 stays.exchange_bytes}  # fmt: skip
        listed = " + ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size)
        return (
            f"{listed} = {_gib(_stays(stays))} stay{where}, which neither a micro-batch nor"
            " recomputation changes, nor more ranks, each of which holds it all"
        )
    step = max(phases, key=lambda phase: phase.step_peak_bytes)
    if step.step_peak_bytes > gpu_memory:
        return f"a step takes {_gib(step.step_peak_bytes)}, of which {_gib(_stays(step))} stay"
    event = max((e for phase in phases for e in phase.events), key=lambda e: e.peak_bytes)
    return f"{event.what.replace('_', ' ')} takes {_gib(event.peak_bytes)}"


def _stays(phase: PhaseEstimate) -> int:
    return phase.static_bytes + phase.exchange_bytes


def _gib(size: int) -> str:
    return f"{size / GIB:.4g} GiB"
