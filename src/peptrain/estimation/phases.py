"""Estimates of each phase of a configuration, from its dry run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from math import inf
from typing import Any

from peptrain.config import RunConfig
from peptrain.errors import Unsupported
from peptrain.estimation.dry_run import DenseBaseline, DryRun, Event, fake_tensors
from peptrain.methods.base import Method
from peptrain.models.hf import count_parameters, dtype_of
from peptrain.runs.build import bounds
from peptrain.settings.fields import quiet


@dataclass(frozen=True)
class PhaseEstimate:
    """Estimate of one phase: steps `first` to `last` of the run, from 0, `last` not included."""

    first: int
    last: int
    total_parameters: int
    trainable_parameters: int
    non_embedding_reduction: float
    """Fraction of the dense model's parameters that is not trained: 1 - (trainable - E) / (dense -
    E), where E counts embedding and head, once if they are tied."""
    paper_bytes: int
    """Weights and optimizer state as the literature counts them (`DryRun.paper_bytes`)."""
    weight_bytes: int
    gradient_bytes: int
    state_bytes: int
    """Bytes of the optimizer's state tensors."""
    exchange_bytes: int
    """Bytes of the gradients' copies in another dtype (train.exchange), which several processes
    make in each step; 0 where they sum gradients in place."""
    step_peak_bytes: int
    """Peak bytes in tensors during a usual step."""
    peak_bytes: int
    """Peak bytes in tensors during usual steps and events."""
    forward_flops: dict[str, float]
    """FLOPs of a forward pass alone, per token and by kind."""
    training_flops: dict[str, float]
    """FLOPs of forward and backward as trained, recomputation included, per token and by kind."""
    events: tuple[Event, ...]

    @property
    def static_bytes(self) -> int:
        """Bytes of weights, gradients and optimizer state, at the dtypes of the run."""
        return self.weight_bytes + self.gradient_bytes + self.state_bytes

    @property
    def flops_per_token(self) -> float:
        return sum(self.training_flops.values())

    def as_dict(self) -> dict[str, Any]:
        """Return all values for JSON."""
        sums = {"static_bytes": self.static_bytes, "flops_per_token": self.flops_per_token}
        return asdict(self) | sums


def flops_per_token(config: RunConfig[Method], ranks: int, *, on_gpu: bool) -> float | None:
    """Return the FLOPs per token of a resolved `config`, averaged over its steps.

    They are those of `Estimate`. None for a model or a method that can't be estimated, and for a
    fine-tuning, whose sequences have many lengths.
    """
    if config.tune.task:
        return None
    try:
        with fake_tensors(), quiet():
            return PhaseEstimator(config, ranks, on_gpu).flops_per_token()
    except Unsupported:
        return None


class PhaseEstimator:
    """Estimator of a configuration. The dry run of a phase is made on first use and cached."""

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
        """Return the estimator of another configuration of the same model."""
        return PhaseEstimator(config, self.ranks, self.on_gpu, self.dense)

    def phases(self, micro_batch: int | None = None) -> list[PhaseEstimate]:
        """Estimate every phase at `micro_batch`; None means the configured one."""
        return [self._phase(r, micro_batch or self.micro_batch) for r in self._dry_runs()]

    def flops_per_token(self) -> float:
        """FLOPs of forward and backward per token, averaged over the steps of the run."""
        each = (
            (r.end - r.begin) * sum(r.flops_per_token(r.training, self.micro_batch).values())
            for r in self._dry_runs()
        )
        return sum(each) / self.config.train.steps

    def peak(self, micro_batch: int, gpu_memory: float = inf) -> int:
        """Peak bytes in tensors over all phases; at a micro-batch of 0, of static memory alone.

        Stops early, with the value found so far, once that exceeds `gpu_memory`.
        """
        most = 0
        for size in self._sizes(micro_batch):
            most = max(most, size)
            if most > gpu_memory:
                break
        return most

    def _sizes(self, micro_batch: int) -> Iterator[int]:
        """Yield sizes in bytes, those that are quick to compute first."""
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
        """Bytes that stay allocated between steps."""
        return r.weight_bytes() + r.gradient_bytes + r.state_bytes()

    def _step(self, r: DryRun, micro_batch: int) -> int:
        return max(self._step_peak(r, micro_batch), self._static(r) + self._exchanged(r))

    def _peak(self, r: DryRun, micro_batch: int) -> int:
        return max([self._step(r, micro_batch), *(event.peak_bytes for event in self._events(r))])

    def _exchanged(self, r: DryRun) -> int:
        exchange = self.config.train.exchange
        if self.ranks == 1 or exchange is None:
            return 0
        copied = dtype_of(exchange)
        return sum(p.numel() * copied.itemsize for p in r.moved if p.dtype != copied)

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
