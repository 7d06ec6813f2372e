"""What a run will take, before it: parameters, bytes, operations, and what fits into a GPU."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import pairwise
from math import inf
from typing import Any

import torch

from peptrain.build import bounds
from peptrain.config import RunConfig, resolved
from peptrain.errors import ConfigError
from peptrain.initial import adopting
from peptrain.methods.base import Method
from peptrain.model import count_parameters
from peptrain.rehearsal import Event, Plain, Rehearsal, without_numbers
from peptrain.settings import check, quiet

GIB = 2**30
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
         "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}  # fmt: skip


@dataclass(frozen=True)
class PhaseEstimate:
    """One phase: steps `first` to `last` of the run, counted from 0, the last one not included."""

    first: int
    last: int
    total_parameters: int
    trainable_parameters: int
    non_embedding_reduction: float
    """Part of the dense model's parameters that need no training: 1 - (trainable - E) / (dense -
    E), E those of embedding and head, once when they are tied."""
    paper_bytes: int
    """Weights and two moments as the literature counts them (`Rehearsal.paper_bytes`)."""
    weight_bytes: int
    gradient_bytes: int
    state_bytes: int
    """Of the optimizer's tensors."""
    exchange_bytes: int
    """Of the buffers in which replicas exchange gradients; 0 for one rank."""
    step_peak_bytes: int
    """The most that is in tensors at once during a usual step."""
    peak_bytes: int
    """The same, with what happens now and then."""
    forward_flops: dict[str, float]
    """Per token and by kind, of a forward pass alone."""
    training_flops: dict[str, float]
    """The same of forward and backward as trained, with what is computed again."""
    events: tuple[Event, ...]

    @property
    def static_bytes(self) -> int:
        """What stays at the dtypes of the run: weights, gradients, optimizer state."""
        return self.weight_bytes + self.gradient_bytes + self.state_bytes

    @property
    def flops_per_token(self) -> float:
        return sum(self.training_flops.values())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        sums = {"static_bytes": self.static_bytes, "flops_per_token": self.flops_per_token}
        return asdict(self) | sums


@dataclass(frozen=True)
class Fit:
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


@dataclass(frozen=True)
class Estimate:
    """What a run takes on each rank. Counts are those of the last phase, the peak that of all."""

    config: RunConfig[Method]
    ranks: int
    on_gpu: bool
    phases: tuple[PhaseEstimate, ...]
    fit: Fit | None

    @property
    def tokens(self) -> int:
        return self.config.train.steps * self._tokens_per_step

    @property
    def peak_bytes(self) -> int:
        return max(phase.peak_bytes for phase in self.phases)

    @property
    def run_flops(self) -> float:
        """Of all forward and backward passes, on all ranks."""
        each = ((p.last - p.first) * p.flops_per_token for p in self.phases)
        return self._tokens_per_step * sum(each)

    @property
    def _tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.config.train.seq_len

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        t, last = self.config.train, self.phases[-1].as_dict()
        for key in ("first", "last", "step_peak_bytes", "peak_bytes"):
            del last[key]
        return {
            "method": self.config.method.name,
            "rank": getattr(self.config.method, "rank", None),
            "model": str(self.config.model.config or self.config.model.preset),
            "precision": t.precision,
            "device": "cuda" if self.on_gpu else "cpu",
            "ranks": self.ranks,
            "batch_size": t.batch_size,
            "micro_batch": t.micro_batch,
            "seq_len": t.seq_len,
            "checkpoint_activations": t.checkpoint_activations,
            "steps": t.steps,
            "tokens": self.tokens,
            "run_flops": self.run_flops,
            "peak_bytes": self.peak_bytes,
            **last,
            "phases": [phase.as_dict() for phase in self.phases],
            "fit": asdict(self.fit) if self.fit else None,
        }


def estimate(config: RunConfig[Any], *, ranks: int = 1, gpu_memory: int | None = None) -> Estimate:
    """What the run of `config` takes on each of `ranks` replicas, uncompiled.

    A model without numbers is built, and takes its steps, as the trainer does it: nothing is
    allocated, read or written. With `gpu_memory`, in bytes, also what fits into that; the run is
    then one on a GPU, unless train.device is cpu.

    Raises ConfigError for settings that can't be, and when nothing fits; Unsupported for a model
    or method that looks at the numbers.
    """
    device = config.train.device
    on_gpu = device == "cuda" or (
        device == "auto" and (gpu_memory is not None or torch.cuda.is_available())
    )
    check(ranks >= 1, "--ranks", ranks, "1 or more")
    config = resolved(adopting(config), world_size=ranks, on_gpu=on_gpu)
    with without_numbers():
        candidate = _Candidate(config, ranks, on_gpu)
        phases = tuple(candidate.phase(r) for r in candidate.rehearsals)
        fit = None if gpu_memory is None else _fit(candidate, gpu_memory)
    return Estimate(config, ranks, on_gpu, phases, fit)


class _Candidate:
    """A configuration in rehearsal, all its phases."""

    def __init__(
        self, config: RunConfig[Method], ranks: int, on_gpu: bool, plain: Plain | None = None
    ) -> None:
        t = config.train
        assert t.micro_batch is not None
        self.config, self.ranks, self.on_gpu = config, ranks, on_gpu
        self.micro_batch, self.rows = t.micro_batch, t.batch_size // ranks
        uncompiled = replace(
            t, compile=False, memory_budget=1.0, cuda_graph=False, kernels="torch", device="cpu"
        )
        config = replace(config, train=uncompiled)
        self.plain = plain or Plain(config)
        self.rehearsals = [
            Rehearsal(config, self.plain, phase, range(*of_it), rows=self.rows, on_gpu=on_gpu)
            for phase, of_it in enumerate(pairwise(bounds(config)))
        ]
        self.events = cache(Rehearsal.events)
        self.step_peak = cache(Rehearsal.step_peak)

    def peak(self, micro_batch: int, budget: float = inf) -> int:
        """The most bytes in tensors in any phase. Where steps alone are over the budget, no more
        is looked at."""
        steps = max(self._step(r, micro_batch) for r in self.rehearsals)
        return steps if steps > budget else max(self._peak(r, micro_batch) for r in self.rehearsals)

    def _step(self, r: Rehearsal, micro_batch: int) -> int:
        return self.step_peak(r, micro_batch) + self.exchanged(r)

    def _peak(self, r: Rehearsal, micro_batch: int) -> int:
        apart = (event.peak_bytes + self.exchanged(r) for event in self.events(r))
        return max([self._step(r, micro_batch), *apart])

    def exchanged(self, r: Rehearsal) -> int:
        """Bytes of DDP's buckets, copies of the gradients that stay."""
        return r.gradient_bytes if self.ranks > 1 else 0

    def phase(self, r: Rehearsal) -> PhaseEstimate:
        trainable = count_parameters(r.model, trainable=True)
        embedding, dense = self.plain.embedding, self.plain.parameters
        return PhaseEstimate(
            first=r.begin,
            last=r.end,
            total_parameters=count_parameters(r.model),
            trainable_parameters=trainable,
            non_embedding_reduction=1 - (trainable - embedding) / (dense - embedding),
            paper_bytes=r.paper_bytes(),
            weight_bytes=r.weight_bytes(),
            gradient_bytes=r.gradient_bytes,
            state_bytes=r.state_bytes(),
            exchange_bytes=self.exchanged(r),
            step_peak_bytes=self._step(r, self.micro_batch),
            peak_bytes=self._peak(r, self.micro_batch),
            forward_flops=r.flops_per_token(r.forward, self.micro_batch),
            training_flops=r.flops_per_token(r.training, self.micro_batch),
            events=tuple(self.events(r)),
        )


def _fit(configured: _Candidate, budget: int) -> Fit:
    """Raises ConfigError if no other micro-batch and no lower rank does."""
    now, rows = configured.micro_batch, configured.rows
    fits = configured.peak(now) <= budget
    divisors = [k for k in range(1, rows + 1) if rows % k == 0]
    micro_batch = _largest(divisors, partial(configured.peak, budget=budget), budget)
    if fits:
        return Fit(budget, fits, micro_batch)
    for tried in (now, 1) if micro_batch is None else (now,):
        if (rank := _largest_rank(configured, tried, budget)) is not None:
            return Fit(budget, fits, micro_batch, rank, tried)
    if micro_batch is None:
        raise ConfigError(_too_little(configured, budget))
    return Fit(budget, fits, micro_batch)


def _largest_rank(configured: _Candidate, micro_batch: int, budget: int) -> int | None:
    """The largest rank, up to the configured one, at which the run fits; None for no rank."""
    method: Any = configured.config.method
    top = getattr(method, "rank", None)
    if top is None:
        return None

    def peak(rank: int) -> int:
        if rank == top:
            return configured.peak(micro_batch, budget)
        config = replace(configured.config, method=replace(method, rank=rank))
        candidate = _Candidate(config, configured.ranks, configured.on_gpu, configured.plain)
        return candidate.peak(micro_batch, budget)

    with quiet():
        return _largest(range(1, top + 1), peak, budget)


def _largest(sizes: Sequence[int], peak: Callable[[int], int], budget: int) -> int | None:
    """The largest of the ascending `sizes` whose peak is within the budget; None if none is.

    Between one that fits and one that doesn't, the next to be tried is where the straight line
    between their peaks meets the budget: peaks are nearly straight lines, and cost seconds.
    """
    low, high = 0, len(sizes) - 1
    if (most := peak(sizes[high])) <= budget:
        return sizes[high]
    if (least := peak(sizes[low])) > budget:
        return None
    while high - low > 1:
        share = (budget - least) / (most - least)
        meets = sizes[low] + share * (sizes[high] - sizes[low])
        middle = min(max(bisect_right(sizes, meets) - 1, low + 1), high - 1)
        if (between := peak(sizes[middle])) <= budget:
            low, least = middle, between
        else:
            high, most = middle, between
    return sizes[low]


def _too_little(configured: _Candidate, budget: int) -> str:
    t, method = configured.config.train, configured.config.method
    phases = [configured.phase(r) for r in configured.rehearsals]
    ranks = " and rank 1" if getattr(method, "rank", None) else ""
    advice = "" if t.checkpoint_activations else "set train.checkpoint_activations true, "
    return (
        f"--gpu-memory: {budget / GIB:.4g} GiB is too little for {method.name}, also at a"
        f" micro-batch of 1{ranks}; as configured it takes {configured.peak(1) / GIB:.4g} GiB at a"
        f" micro-batch of 1, {max(p.static_bytes for p in phases) / GIB:.4g} of them for weights,"
        f" gradients and moments; {advice}shorten train.seq_len, or choose a smaller model or"
        " another method"
    )


def memory(text: str) -> int:
    """Bytes of "24GiB", "80 GB" or "512m"; a number alone is bytes. Raises ConfigError."""
    found = re.fullmatch(r"(\d+\.?\d*)\s*([kmgt]i?)?b?", text.strip().lower())
    size = int(float(found[1]) * UNITS[found[2] or ""]) if found else 0
    check(size > 0, "--gpu-memory", text, "a size such as 24GiB or 80GB")
    return size
