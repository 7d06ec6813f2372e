"""The processes of a training run: a single one, or several under `torchrun`."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from peptrain.errors import PeptrainError, Unsupported

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's rank among `size` processes, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this process writes the run directory."""
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over all ranks."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.size
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks."""
        return self.mean(values) * self.size

    def agree(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def exchange(self, module: nn.Module, now: bool) -> AbstractContextManager[object]:
        """Return the context of a backward pass that reduces gradients over ranks only if `now`."""
        waits = isinstance(module, DistributedDataParallel) and not now
        return module.no_sync() if waits else contextlib.nullcontext()  # type: ignore[operator]

    def on_main(self, action: Callable[[], object]) -> None:
        """Run `action` on rank 0 while the others wait. Its PeptrainError is raised on every rank.

        Raised on rank 0 alone, it would leave the others waiting forever.
        """
        error = None
        if self.main:
            try:
                action()
            except PeptrainError as raised:
                error = raised
        error = self.agree(error)
        if error is not None:
            raise error

    def parallelize(self, module: nn.Module) -> nn.Module:
        """Wrap `module` in DistributedDataParallel if there are several processes.

        Every phase needs a new wrapper, because one built for another set of trainable parameters
        silently reduces wrong gradients. Buffers are constants and equal on every rank, so they are
        not broadcast: SLTrain's would be sent with every pass.
        """
        if self.size == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids, broadcast_buffers=False)


def _leave() -> None:
    """Destroy the process group at exit.

    Discarded replicas still refer to it. Unless they are collected first, its threads outlive the
    interpreter: on a loaded machine one exit in seven was an abort.
    """
    gc.collect()
    dist.destroy_process_group()


@contextlib.contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """Yield the world of this process, joining the process group of `torchrun` if there is one.

    The group is created once per process and destroyed at exit, because a second rendezvous under
    torchrun would find the addresses of the first. device: auto (a GPU if there is one), cpu or
    cuda. Raises Unsupported for a GPU that is absent.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise Unsupported(f"train.device: must be auto, cpu or cuda (got {device!r})")
    if device == "cuda" and not torch.cuda.is_available():
        raise Unsupported(
            "train.device: cuda was requested, but PyTorch sees no GPU; use cpu or auto"
        )
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else None
    if local is not None:
        torch.cuda.set_device(local)
    here = local or torch.device("cpu")
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(0, 1, here)
        return
    if not dist.is_initialized():
        dist.init_process_group("nccl" if on_gpu else "gloo")
        atexit.register(_leave)
    yield World(dist.get_rank(), size, here)
