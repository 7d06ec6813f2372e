"""The forward and backward passes of one batch: call by call, or recorded once and replayed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peptrain.distributed.world import World
from peptrain.errors import ConfigError, Unsupported
from peptrain.models.hf import Precision, autocast

ForwardBackward = Callable[[Sequence[Tensor]], Tensor]
"""Micro-batches of windows to their mean loss, their gradients left in the parameters."""


def uses_triton(
    kernels: Literal["auto", "torch", "triton"],
    precision: Precision,
    device: torch.device,
    *,
    recorded: bool,
) -> bool:
    """Whether linear maps are fused by Triton. Raises ConfigError if that is asked for in vain."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    can = device.type == "cuda" or (kernels == "triton" and interpreted)
    can = can and precision != "fp64" and find_spec("triton") is not None
    if kernels == "triton" and not can:
        raise ConfigError(
            f"train.kernels: 'triton' needs a GPU, Triton and another precision than fp64; this is"
            f" {device.type} in {precision}; set it to auto"
        )
    return can and (kernels == "triton" or (kernels == "auto" and recorded))


class EagerSteps:
    """Each micro-batch in its turn. Replicas exchange gradients once, on the last."""

    def __init__(self, loss: nn.Module, precision: Precision, here: World) -> None:
        self.loss, self.precision, self.here = loss, precision, here

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        rows = sum(len(part) for part in parts)  # resumed on other ranks, the last may be shorter
        total = torch.zeros((), device=self.here.device)
        for i, part in enumerate(parts):
            with self.here.exchange(self.loss, i == len(parts) - 1):
                total = total + self.one(part, len(part) / rows)
        return total

    def one(self, part: Tensor, share: float) -> Tensor:
        with autocast(self.precision, self.here.device):
            loss: Tensor = self.loss(part) * share
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


class CUDAGraphSteps:
    """The same as a CUDA graph: the kernels of a pass are started by the GPU, not from Python.

    Recorded at the first call, twice if there are several micro-batches: the first of a batch
    writes the gradients, those after it add to them. The gradients are the same tensors from
    step to step.
    """

    def __init__(self, eager: EagerSteps) -> None:
        self.eager = eager
        self.first: tuple[torch.cuda.CUDAGraph, Tensor] | None = None
        self.later: tuple[torch.cuda.CUDAGraph, Tensor] | None = None

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        if self.first is None:
            self._record(parts)
        assert self.first is not None
        if len(parts) != self.parts or any(p.shape != self.windows.shape for p in parts):
            raise ConfigError(
                f"train.micro_batch: {len(parts[0])} does not divide the {sum(map(len, parts))}"
                " rows of a step as when the pass was recorded; choose a divisor, or set"
                " train.cuda_graph to false"
            )
        total = torch.zeros((), device=self.windows.device)
        for i, part in enumerate(parts):
            graph, loss = self.first if i == 0 or self.later is None else self.later
            self.windows.copy_(part)
            graph.replay()
            total = total + loss
        for p, gradient in self.gradients:
            p.grad = gradient
        return total

    def _record(self, parts: Sequence[Tensor]) -> None:
        self.windows, self.parts, self.share = parts[0].clone(), len(parts), 1 / len(parts)
        self._warm_up()
        self.first = self._recorded(torch.cuda.graph_pool_handle())
        params = self.eager.loss.parameters()
        self.gradients = [(p, p.grad) for p in params if p.grad is not None]
        if len(parts) > 1:
            self.later = self._recorded(self.first[0].pool())

    def _warm_up(self) -> None:
        """Compilation and the libraries' choices happen here: none of it can be recorded. Dropout
        draws from a copy of the generator, so that the first step's numbers are the seed's."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        gpus = [self.windows.device] if self.windows.is_cuda else []
        with torch.cuda.stream(stream), torch.random.fork_rng(gpus):  # of all, it would warn
            for _ in range(3):
                self.eager.one(self.windows, self.share)
                self.eager.loss.zero_grad()
        torch.cuda.current_stream().wait_stream(stream)

    def _recorded(self, pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool):
                loss = self.eager.one(self.windows, self.share)
        except RuntimeError as error:
            # Whatever goes wrong may make the end of the recording fail as well.
            first = error.__context__ or error
            for each in (error, first):
                if isinstance(each, torch.OutOfMemoryError):
                    raise each from None
            raise Unsupported(
                "train.cuda_graph: the passes of this model can't be recorded, most likely because"
                f" Python looks at a number on the GPU; set it to false ({first})"
            ) from error
        return graph, loss


def uses_cuda_graph(cuda_graph: bool | None, suits: bool, here: World) -> bool:
    """Whether passes are recorded; unset, where that `suits` the model and can be done. Not settled
    in the run's configuration, because a run may be resumed on another machine.

    Raises ConfigError if a graph is asked for in vain.
    """
    can = here.device.type == "cuda" and here.size == 1
    if cuda_graph and not can:
        raise ConfigError(
            f"train.cuda_graph: true needs one GPU, and this is {here.size} x {here.device.type};"
            " leave it out or set it to false"
        )
    return (suits and can) if cuda_graph is None else cuda_graph


def make_forward_backward(
    loss: nn.Module, precision: Precision, here: World, *, recorded: bool
) -> ForwardBackward:
    """CUDAGraphSteps if passes are to be `recorded`, else EagerSteps."""
    eager = EagerSteps(loss, precision, here)
    return CUDAGraphSteps(eager) if recorded else eager
