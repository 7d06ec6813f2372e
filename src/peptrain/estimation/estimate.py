"""Estimate of a run before it starts: parameters, bytes, FLOPs, and what fits into a GPU."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

import torch

from peptrain.config import RunConfig, resolved
from peptrain.errors import Unsupported
from peptrain.estimation.dry_run import fake_tensors
from peptrain.estimation.memory_fit import MemoryFit, Watch, fit
from peptrain.estimation.phases import PhaseEstimate, PhaseEstimator
from peptrain.methods.base import Method
from peptrain.runs.init_from import with_inherited_model
from peptrain.settings.fields import check, check_whole, each_line_once

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
         "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """Estimate of a run, with memory per process."""

    config: RunConfig[Method]
    ranks: int
    on_gpu: bool
    phases: tuple[PhaseEstimate, ...]
    fit: MemoryFit | None

    @property
    def tokens(self) -> int:
        return self.config.train.steps * self._tokens_per_step

    @property
    def peak_bytes(self) -> int:
        """The largest peak of all phases."""
        return max(phase.peak_bytes for phase in self.phases)

    @property
    def run_flops(self) -> float:
        """FLOPs of all forward and backward passes, summed over all processes."""
        each = ((p.last - p.first) * p.flops_per_token for p in self.phases)
        return self._tokens_per_step * sum(each)

    @property
    def _tokens_per_step(self) -> int:
        return self.config.train.batch_size * self.config.train.seq_len

    def as_dict(self) -> dict[str, Any]:
        """Return all values for JSON. Counts at the top level are those of the last phase."""
        t, last = self.config.train, self.phases[-1].as_dict()
        for key in ("first", "last", "step_peak_bytes", "peak_bytes"):
            del last[key]
        return {
            "method": self.config.method.name,
            "rank": getattr(self.config.method, "rank", None),
            "method_ranks": getattr(self.config.method, "ranks", None),
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


def estimate(
    config: RunConfig[Any],
    *,
    ranks: int = 1,
    gpu_memory: int | None = None,
    watch: Watch = lambda trial: None,
) -> Estimate:
    """Estimate what the run of `config` needs on each of `ranks` processes, uncompiled.

    The model is built and stepped as in the trainer, but on fake tensors: no weights are
    allocated, read or written. With `gpu_memory`, in bytes, also search for the largest
    micro-batch and rank that fit. The run is then assumed to be on a GPU, unless train.device is
    cpu. `watch` is called with a description of each trial of that search.

    Raises ConfigError for impossible settings and when nothing fits, and Unsupported for models
    with experts or convolutions and for a model or method that reads tensor values.
    """
    device = config.train.device
    on_gpu = device == "cuda" or (
        device == "auto" and (gpu_memory is not None or torch.cuda.is_available())
    )
    check_whole("--ranks", ranks, 1)
    if config.tune.task:
        raise Unsupported(
            f"tune.task: must be unset for an estimate (got {config.tune.task}), since the"
            " sequences of a task have many lengths; estimate the model without it"
        )
    config = resolved(with_inherited_model(config), world_size=ranks, on_gpu=on_gpu)
    with fake_tensors(), each_line_once():
        estimator = PhaseEstimator(config, ranks, on_gpu)
        phases = tuple(estimator.phases())
        found = None if gpu_memory is None else fit(estimator, gpu_memory, watch)
    return Estimate(config, ranks, on_gpu, phases, found)


def memory(text: str) -> int:
    """Parse a size such as "24GiB", "80 GB" or "512m" into bytes; a bare number is bytes.

    Raises ConfigError for anything else, and for a bare number below a MiB, which lacks its unit.
    """
    found = re.fullmatch(r"(\d+\.?\d*)\s*([kmgt]i?)?b?", text.strip().lower())
    size = float(found[1]) * UNITS[found[2] or ""] if found else 0.0
    whole = 1 <= size < 2**63 and not (text.strip().isdecimal() and size < 2**20)
    check(whole, "--gpu-memory", text, "a size with its unit, such as 24GiB or 80GB")
    return int(size)
