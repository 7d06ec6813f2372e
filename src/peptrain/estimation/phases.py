"""What each phase of a configuration takes, from its dry run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import inf
from typing import Any

from peptrain.config import RunConfig
from peptrain.estimation.dry_run import DenseBaseline, DryRun, Event
from peptrain.methods.base import Method
from peptrain.models.hf import count_parameters
from peptrain.runs.build import bounds


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
    """Weights and two moments as the literature counts them (`DryRun.paper_bytes`)."""
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


class PhaseEstimator:
    """A configuration, each phase of which is run dry when it is first asked for."""

    def __init__(
        self,
        config: RunConfig[Method],
        ranks: int,
        on_gpu: bool,
        dense: DenseBaseline | None = None,
    ) -> None:
        t = config.train
        assert t.micro_batch is not None
        self.config, self.ranks, self.on_gpu = config, ranks, on_gpu
        self.micro_batch, self.rows = t.micro_batch, t.batch_size // ranks
        uncompiled = replace(
            t, compile=False, memory_budget=1.0, cuda_graph=False, kernels="torch", device="cpu"
        )
        self._run = replace(config, train=uncompiled)
        self._bounds = bounds(config)
        self.dense = dense or DenseBaseline(self._run)
        self._made = cache(self._make)
        self._events = cache(DryRun.events)
        self._step_peak = cache(DryRun.step_peak)

    def like(self, config: RunConfig[Method]) -> PhaseEstimator:
        """Another configuration of the same model."""
        return PhaseEstimator(config, self.ranks, self.on_gpu, self.dense)

    def phases(self, micro_batch: int | None = None) -> list[PhaseEstimate]:
        """At the configured micro-batch, unless another is given."""
        return [self._phase(r, micro_batch or self.micro_batch) for r in self._dry_runs()]

    def peak(self, micro_batch: int, gpu_memory: float = inf) -> int:
        """The most bytes in tensors in any phase; at a micro-batch of 0 what stays. Once over the
        GPU's memory, no more is looked at."""
        most = 0
        for size in self._sizes(micro_batch):
            most = max(most, size)
            if most > gpu_memory:
                break
        return most

    def _sizes(self, micro_batch: int) -> Iterator[int]:
        """The quickly known first."""
        for r in self._dry_runs():
            yield self._static(r)
            if micro_batch:
                yield self._step(r, micro_batch)
        for r in self._dry_runs() if micro_batch else ():
            yield self._peak(r, micro_batch)

    def _dry_runs(self) -> Iterator[DryRun]:
        return map(self._made, range(len(self._bounds) - 1))

    def _make(self, phase: int) -> DryRun:
        steps = range(*self._bounds[phase : phase + 2])
        return DryRun(self._run, self.dense, phase, steps, rows=self.rows, on_gpu=self.on_gpu)

    def _static(self, r: DryRun) -> int:
        """Bytes of what stays."""
        return r.weight_bytes() + r.gradient_bytes + r.state_bytes() + self._exchanged(r)

    def _step(self, r: DryRun, micro_batch: int) -> int:
        return self._step_peak(r, micro_batch) + self._exchanged(r)

    def _peak(self, r: DryRun, micro_batch: int) -> int:
        apart = (event.peak_bytes + self._exchanged(r) for event in self._events(r))
        return max([self._step(r, micro_batch), *apart])

    def _exchanged(self, r: DryRun) -> int:
        """Bytes of DDP's buckets, copies of the gradients that stay."""
        return r.gradient_bytes if self.ranks > 1 else 0

    def _phase(self, r: DryRun, micro_batch: int) -> PhaseEstimate:
        trainable = count_parameters(r.model, trainable=True)
        embedding, dense = self.dense.embedding, self.dense.parameters
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
            exchange_bytes=self._exchanged(r),
            step_peak_bytes=self._step(r, micro_batch),
            peak_bytes=self._peak(r, micro_batch),
            forward_flops=r.flops_per_token(r.forward, micro_batch),
            training_flops=r.flops_per_token(r.training, micro_batch),
            events=tuple(self._events(r)),
        )
