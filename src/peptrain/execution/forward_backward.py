"""Forward and backward passes of one batch, eager or captured in a CUDA graph and replayed."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn

from peptrain.distributed.replicas import Replicas
from peptrain.distributed.world import World
from peptrain.errors import ConfigError, Unsupported
from peptrain.models.hf import Precision, autocast

ForwardBackward = Callable[[Sequence[Any]], Tensor]
"""Map micro-batches, of windows or of labelled rows, to their mean loss and leave the gradients in
the parameters."""


def uses_triton(
    kernels: Literal["auto", "torch", "triton"],
    precision: Precision,
    device: torch.device,
    *,
    recorded: bool,
) -> bool:
    """Return whether linear maps are fused by Triton kernels.

    `recorded` means that passes are captured in a CUDA graph. Raises ConfigError if `kernels` is
    "triton" and Triton cannot be used.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    can = device.type == "cuda" or (kernels == "triton" and interpreted)
    can = can and precision != "fp64" and find_spec("triton") is not None
    if kernels == "triton" and not can:
        raise ConfigError(
            f"train.kernels: 'triton' needs a GPU, the triton package and a precision other than"
            f" fp64 (got {device.type}, {precision}); set it to auto"
        )
    return can and (kernels == "triton" or (kernels == "auto" and recorded))


class EagerSteps:
    """Run micro-batches, which have a length in rows, eagerly, one after another.

    The gradients are those of the loss divided by the number of ranks, whose sum is the mean's.
    """

    def __init__(self, loss: nn.Module, precision: Precision, here: World) -> None:
        self.loss, self.precision, self.here = loss, precision, here

    def __call__(self, parts: Sequence[Any]) -> Tensor:
        # Resumed with another number of processes, the last micro-batch may be shorter.
        rows = sum(len(part) for part in parts)
        total = torch.zeros((), device=self.here.device)
        for part in parts:
            total = total + self.one(part, len(part) / rows)
        return total

    def one(self, part: Any, share: float) -> Tensor:
        with autocast(self.precision, self.here.device):
            loss: Tensor = self.loss(part) * share
        loss.backward(loss.new_full((), 1 / self.here.size))  # type: ignore[no-untyped-call]
        return loss.detach()


class CUDAGraphSteps:
    """Replay the passes of EagerSteps from CUDA graphs instead of launching kernels from Python.

    The first call captures one graph, or two if there are several micro-batches: the first
    micro-batch of a step writes the gradients, later ones add to them. The gradients are the same
    tensors in every step.
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
                f"train.micro_batch: {len(parts[0])} splits the {sum(map(len, parts))} rows of this"
                " step differently from the step captured in the CUDA graph; choose a divisor of"
                " the rows, or set train.cuda_graph to false"
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
        """Run compilation and the libraries' algorithm selection, which cannot be captured.

        The generator's state is restored afterwards, so that dropout in the first step draws the
        values that belong to the seed.
        """
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        gpus = [self.windows.device] if self.windows.is_cuda else []
        # Forking the generators of all GPUs, the default, would warn.
        with torch.cuda.stream(stream), torch.random.fork_rng(gpus):
            for _ in range(3):
                self.eager.one(self.windows, self.share)
                self.eager.loss.zero_grad()
        torch.cuda.current_stream().wait_stream(stream)

    def _recorded(self, pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog is another thread that asks the GPU, which ends a global capture.
        mode = "global" if self.eager.here.size == 1 else "thread_local"
        try:
            with torch.cuda.graph(graph, pool=pool, capture_error_mode=mode):
                loss = self.eager.one(self.windows, self.share)
        except RuntimeError as error:
            # A failure inside may make the end of the capture fail too, and hide the first error.
            first = error.__context__ or error
            for each in (error, first):
                if isinstance(each, torch.OutOfMemoryError):
                    raise each from None
            raise Unsupported(
                "train.cuda_graph: CUDA graph capture failed, probably because of a host-device"
                f" sync; set it to false ({first})"
            ) from error
        return graph, loss


def uses_cuda_graph(cuda_graph: bool | None, suits: bool, here: World) -> bool:
    """Return whether passes are captured in a CUDA graph.

    If `cuda_graph` is unset, they are if that `suits` the model and there is a GPU. The choice is
    not stored in the run's configuration, because a run may be resumed on another machine. Raises
    ConfigError if `cuda_graph` is true and a graph cannot be used.
    """
    can = here.device.type == "cuda"
    if cuda_graph and not can:
        raise ConfigError(
            f"train.cuda_graph: true needs a GPU (got {here.device.type}); leave it unset or set it"
            " to false"
        )
    return (suits and can) if cuda_graph is None else cuda_graph


class ReplicatedSteps:
    """Run the passes on this process's rows, and then sum the gradients over all ranks.

    The sum is not in the graph, so it does not matter how the passes are run.
    """

    def __init__(self, steps: ForwardBackward, replicas: Replicas) -> None:
        self.steps, self.replicas = steps, replicas

    def __call__(self, parts: Sequence[Any]) -> Tensor:
        loss = self.steps(parts)
        self.replicas.sum_gradients()
        return loss


def make_forward_backward(
    loss: nn.Module,
    precision: Precision,
    here: World,
    *,
    recorded: bool,
    exchange: torch.dtype | None = None,
) -> ForwardBackward:
    """Return CUDAGraphSteps if passes are to be captured (`recorded`), else EagerSteps.

    Of several processes, with the exchange of gradients, summed in the dtype `exchange`.
    """
    eager = EagerSteps(loss, precision, here)
    steps: ForwardBackward = CUDAGraphSteps(eager) if recorded else eager
    return steps if here.size == 1 else ReplicatedSteps(steps, Replicas(loss, here, exchange))
