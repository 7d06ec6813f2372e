"""The processes of a training run: a single one, or several under `torchrun`."""

from __future__ import annotations

import atexit
import contextlib
import gc
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from peptrain.distributed.launch import TORCHRUN, Launch, launch, restarts, threads
from peptrain.distributed.owners import sharing
from peptrain.distributed.watchdog import LONGEST, SLOW, Watchdog, watchdog
from peptrain.errors import PeptrainError, Unsupported

log = logging.getLogger("peptrain")
T = TypeVar("T")
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
"""Variables of torchrun, Slurm's srun, and MPI."""
LAUNCHED, UNKNOWN = 300.0, 60.0
"""Seconds to wait for the other processes, with and without such a variable."""
ARRIVED, ON_GPU = "peptrain/arrived", "peptrain/on-gpu"
"""Keys of the store: the number of processes that have connected, and of those with a GPU."""
LEAVING = 60.0
"""Seconds to end the process group in, which waits for what was begun."""
GROUP = timedelta(seconds=LONGEST)
"""Limit of the process groups themselves. The watchdog ends a process before that."""


@dataclass(frozen=True)
class World:
    """This process's rank among `size` processes, and its device."""

    rank: int
    size: int
    device: torch.device
    on_cpu: dist.ProcessGroup | None = None
    """The group in which values are exchanged without the GPU. None: the one that there is."""
    watchdog: Watchdog | None = None
    """Set where there are several processes."""
    slow: float = SLOW
    """Seconds to wait for the others, where they may read, write or compile for long."""

    @property
    def main(self) -> bool:
        """Whether this process writes the run directory."""
        return self.rank == 0

    def within(self, seconds: float) -> AbstractContextManager[None]:
        """Return a context that ends this process if its body takes longer. One alone may take it.

        Collectives of this class have a limit of their own, `slow`.
        """
        return self.watchdog.within(seconds) if self.watchdog else contextlib.nullcontext()

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over all ranks, for which a GPU is waited for."""
        return self.sum(values) / self.size if self.size > 1 else values

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks, for which a GPU is waited for."""
        if self.size > 1:
            values = values.clone()
            with self.within(self.slow):
                dist.all_reduce(values)
                if values.is_cuda:
                    torch.cuda.current_stream().synchronize()
        return values

    def agree(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        values = [value]
        if self.size > 1:
            with self.within(self.slow):
                dist.broadcast_object_list(values)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in order, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            with self.within(self.slow):
                dist.all_gather_object(values, value)
        return values

    def largest(self, value: int) -> Callable[[], int]:
        """Begin to find the largest `value` of all ranks. The function returned waits for it.

        The exchange is between CPUs, so that it needs no turn on the GPU and waits for none.
        """
        if self.size == 1:
            return lambda: value
        held = torch.tensor(value)
        work = dist.all_reduce(held, dist.ReduceOp.MAX, group=self.on_cpu, async_op=True)

        def found() -> int:
            work.wait()
            return int(held)

        return found

    def differing(self, values: Sequence[int]) -> list[int]:
        """Return, on every rank, the indices at which some rank's values differ from rank 0's."""
        first, *others = self.gather(list(values))
        return [i for i, value in enumerate(first) if any(other[i] != value for other in others)]

    def sharing(self) -> AbstractContextManager[None]:
        """Return a context in which the ranks divide work that all need (`owners`).

        Its body must be the same on every rank.
        """
        return sharing(self.rank, self.size)

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

    def on_all(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank and return its value. A PeptrainError of one is raised on all.

        It names the rank, unless all failed alike. Raised on one rank alone, it would leave the
        others waiting. `action` must not communicate.
        """
        if self.size == 1:
            return action()
        own: PeptrainError | None = None
        try:
            found = action()
        except PeptrainError as raised:
            own = raised
        errors = self.gather(own)
        for rank, error in enumerate(errors):
            if error is not None:
                if len({str(one) for one in errors}) > 1:
                    error.args = (f"rank {rank}: {error}", *error.args[1:])
                raise error from own
        return found


def _leave() -> None:
    """Destroy the process group at exit.

    Discarded replicas still refer to it. Unless they are collected first, its threads outlive the
    interpreter: on a loaded machine one exit in seven was an abort.
    """
    gc.collect()
    with watchdog().within(LEAVING):
        dist.destroy_process_group()


@contextlib.contextmanager
def world(device: str = "auto", timeout: float = 0.0) -> Iterator[World]:
    """Yield the world of this process, joining the process group of `torchrun` if there is one.

    The group is created once per process and destroyed at exit, because a second rendezvous under
    torchrun would find the addresses of the first. device: auto (a GPU if there is one), cpu or
    cuda. timeout: what `World.slow` is at least.

    Raises Unsupported for a GPU that is absent, and when the variables of `torchrun` are incomplete
    or the processes don't meet, and ConfigError for several processes that do not know of each
    other. In the context, a collective that fails because another process has ended is a
    PeptrainError.

    Several processes of a machine get a share of its cores each (`launch.threads`).
    """
    if device not in ("auto", "cpu", "cuda"):
        raise Unsupported(f"train.device: must be auto, cpu or cuda (got {device!r})")
    if device == "cuda" and not torch.cuda.is_available():
        raise Unsupported(
            "train.device: cuda was requested, but PyTorch sees no GPU; use cpu or auto"
        )
    place = launch()
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_gpu and place.local >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise Unsupported(f"LOCAL_RANK: there are {gpus} GPUs (got {place.local}); {TORCHRUN}")
    here = torch.device("cuda", place.local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(here)
    if place.size == 1:
        yield World(0, 1, here)
        return
    if on_gpu and not dist.is_nccl_available():
        raise Unsupported(
            "train.device: several GPUs need NCCL, which this build of PyTorch does not have;"
            " install one that has it, train in one process, or set --train.device cpu"
        )
    if share := threads(place.machine):
        torch.set_num_threads(share)
    if not dist.is_initialized():
        _meet("nccl" if on_gpu else "gloo", place)
    with _lost_processes():
        on_cpu = _group_on_cpu() if on_gpu else None
        slow = max(SLOW, timeout)
        yield World(dist.get_rank(), place.size, here, on_cpu, watchdog(), slow)


@cache
def _group_on_cpu() -> dist.ProcessGroup:
    """Return a group of all processes that exchanges tensors on the CPU, created once."""
    with watchdog().within(LAUNCHED):
        made: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=GROUP)
    return made


@contextlib.contextmanager
def _lost_processes() -> Iterator[None]:
    """Raise PeptrainError where a collective fails because another process has ended."""
    try:
        yield
    except RuntimeError as error:  # gloo has no type of its own
        if not (isinstance(error, dist.DistError) or "/gloo/" in str(error)):
            raise
        raise PeptrainError(
            f"another process of this run ended or cannot be reached ({_first_line(error)}); see"
            " its own output; `peptrain resume RUN`, under the same launcher, continues from the"
            " latest checkpoint"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _meet(backend: str, place: Launch) -> None:
    """Join the process group. Raises Unsupported if the processes don't meet.

    Variables that a launcher left behind promise processes that never come. PyTorch would wait for
    10 to 30 minutes. Processes of a launcher start together and may import PyTorch from a slow
    disk, so they are given 5 minutes. Where no launcher has left its mark, 60 s are enough.
    """
    limit = LAUNCHED if any(name in os.environ for name in LAUNCHERS) else UNKNOWN
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    others = f"for the other {place.size - 1} of {place.size} processes at {address}"
    if limit == UNKNOWN:
        log.warning("WORLD_SIZE: waiting up to %g s %s; %s", limit, others, TORCHRUN)
    began = time.monotonic()
    try:
        meeting = dist.rendezvous(  # type: ignore[attr-defined]
            "env://", timeout=timedelta(seconds=limit)
        )
        agents, rank, size = next(meeting)
        # The agent of torchrun keeps its store over restarts, with the addresses of processes that
        # are gone.
        attempt = f"attempt-{restarts()}"
        store = dist.PrefixStore(attempt, agents)  # type: ignore[attr-defined]
        _arrive(store, size, backend == "nccl", began + limit)
        with watchdog().within(LAUNCHED):
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=GROUP)
    except (RuntimeError, ValueError, TimeoutError) as error:
        if time.monotonic() - began >= limit:
            raise Unsupported(
                f"WORLD_SIZE: waited {limit:g} s as RANK {place.rank} {others}; {TORCHRUN}"
            ) from error
        raise Unsupported(
            f"WORLD_SIZE: {place.size} processes did not meet at {address}"
            f" ({_first_line(error)}); {TORCHRUN}"
        ) from error
    atexit.register(_leave)


def _arrive(store: Any, size: int, on_gpu: bool, until: float) -> None:
    """Wait until all processes have arrived. Raises TimeoutError at the time `until`.

    The store of torchrun answers the first process at once. Raises Unsupported, in every process,
    if some of them have a GPU and some have none: they could not exchange anything.
    """
    store.add(ON_GPU, int(on_gpu))
    arrived = store.add(ARRIVED, 1)
    while arrived < size:
        if time.monotonic() >= until:
            raise TimeoutError(f"{arrived} of {size} arrived")
        time.sleep(0.1)
        arrived = store.add(ARRIVED, 0)
    gpus = store.add(ON_GPU, 0)
    if 0 < gpus < size:
        raise Unsupported(
            f"train.device: only {gpus} of {size} processes have a GPU; start one process for each"
            " GPU, on machines that have one, or set --train.device cpu"
        )
