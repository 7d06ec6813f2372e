"""Search for the largest micro-batch and rank that fit into a GPU, or the reason none does."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from peptrain.config import RunConfig
from peptrain.errors import ConfigError
from peptrain.estimation.phases import PhaseEstimator
from peptrain.methods.base import Method
from peptrain.settings.fields import quiet

MIB, GIB = 2**20, 2**30
Watch = Callable[[str], None]
"""Called with a description of the next trial, since a trial takes seconds."""


@dataclass(frozen=True)
class MemoryFit:
    """The largest micro-batch and rank that fit into `gpu_memory` bytes."""

    gpu_memory: int
    fits: bool
    """Whether the run fits as configured."""
    micro_batch: int | None
    """The largest that fits at the configured rank, among the divisors of a process's sequences per
    step. None if even 1 does not fit."""
    rank: int | None = None
    """If the run does not fit: the largest rank that does, at `rank_micro_batch`; None for none."""
    rank_micro_batch: int | None = None
    """The configured micro-batch if it fits at some rank, else 1."""


def fit(configured: PhaseEstimator, gpu_memory: int, watch: Watch) -> MemoryFit:
    """Search for what fits. Raises ConfigError if no other micro-batch and no lower rank does."""
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
        """The largest micro-batch that fits at the configured rank; None for none.

        The search starts from 0, at which `peak` is the static memory alone.
        """
        rows = self.configured.rows
        divisors = [k for k in range(1, rows + 1) if rows % k == 0]
        return _largest([0, *divisors], lambda k: self._peak(k, self.rank), self.gpu_memory) or None

    def _largest_rank(self, micro_batch: int) -> int | None:
        """The largest rank, up to the configured one, at which the run fits; None for none."""
        if self.rank is None:
            return None
        ranks = range(1, self.rank + 1)
        return _largest(ranks, lambda rank: self._peak(micro_batch, rank), self.gpu_memory)

    def _peak(self, micro_batch: int, rank: int | None) -> int:
        if micro_batch:
            self.watch(f"micro-batch {micro_batch}" + (f" at rank {rank}" if rank else ""))
        return self.at_rank(rank).peak(micro_batch, self.gpu_memory)

    def _at_rank(self, rank: int | None) -> PhaseEstimator:
        if rank == self.rank:
            return self.configured
        method: Any = replace(self.configured.config.method, rank=rank)  # type: ignore[call-arg]
        return self.configured.like(replace(self.configured.config, method=method))

    def _too_little(self) -> str:
        """The error for a run that does not fit at the smallest sizes, with what would help."""
        rank = self.rank and 1
        least = self.at_rank(rank)
        at = "micro-batch 1" + (" and rank 1" if rank else "")
        helps = []
        for name, config in _repairs(least.config):
            self.watch(f"{at} with {name}")
            if least.like(config).peak(1, self.gpu_memory) <= self.gpu_memory:
                helps.append(name)
        advice = f"set {' or '.join(helps)}, or " if helps else ""
        return (
            f"--gpu-memory: {least.config.method.name} does not fit in {in_units(self.gpu_memory)}"
            f" even at {at}: {_excess(least, self.gpu_memory)}; {advice}choose a smaller model or"
            " another method"
        )


def _largest(sizes: Sequence[int], peak: Callable[[int], int], gpu_memory: int) -> int | None:
    """The largest of the ascending `sizes` whose peak fits; None if none does.

    A peak takes seconds to compute and is nearly linear in the size. So the next size tried,
    between one that fits and one that does not, is where the line through their two peaks crosses
    `gpu_memory`.
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
    """Yield settings that take less memory, each with its name."""
    t = config.train
    if not t.checkpoint_activations:
        again = replace(t, checkpoint_activations=True)
        yield "train.checkpoint_activations true", replace(config, train=again)
    if t.precision != "bf16":
        yield "train.precision bf16", replace(config, train=replace(t, precision="bf16"))
    yield "a shorter train.seq_len", replace(config, train=replace(t, seq_len=1))
    if getattr(config.method, "warm_start_steps", 0):
        cold = replace(config.method, warm_start_steps=0)
        name = "method.warm_start_steps 0 (--init-from loads weights trained before)"
        yield name, replace(config, method=cold)


def _excess(estimator: PhaseEstimator, gpu_memory: int) -> str:
    """Describe what exceeds `gpu_memory` at micro-batch 1: static memory, a step or an event."""
    phases = estimator.phases(1)
    stays = max(phases, key=lambda phase: phase.static_bytes)
    if stays.static_bytes > gpu_memory:
        where = f" in steps {stays.first} to {stays.last}" if len(phases) > 1 else ""
        parts = {"weights": stays.weight_bytes, "gradients": stays.gradient_bytes,
                 "optimizer state": stays.state_bytes}  # fmt: skip
        parts = {name: size for name, size in parts.items() if size}
        return (
            f"{' + '.join(parts)} need {in_units(stays.static_bytes)}"
            f" ({' + '.join(map(in_units, parts.values()))}){where}, independent of batch size"
            " and recomputation, and the same on every process"
        )
    step = max(phases, key=lambda phase: phase.step_peak_bytes)
    if step.step_peak_bytes > gpu_memory:
        static = in_units(step.static_bytes)
        return f"a step needs {in_units(step.step_peak_bytes)}, of which {static} are static"
    event = max((e for phase in phases for e in phase.events), key=lambda e: e.peak_bytes)
    return f"{event.what.replace('_', ' ')} needs {in_units(event.peak_bytes)}"


def in_units(size: int) -> str:
    """Format bytes in GiB, or in MiB below 1 GiB."""
    return f"{size / GIB:.4g} GiB" if size >= GIB else f"{size / MIB:.4g} MiB"
