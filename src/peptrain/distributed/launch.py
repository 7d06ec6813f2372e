"""Environment variables by which `torchrun` tells a process its place. Read without PyTorch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from peptrain.errors import ConfigError, Unsupported
from peptrain.settings.fields import check

TORCHRUN = (
    "start several processes with `torchrun --nproc-per-node N -m -- peptrain ...`, or unset"
    " WORLD_SIZE to use one"
)
SEVERAL = {
    "SLURM_STEP_NUM_TASKS": ("srun", "srun --ntasks-per-node 1"),
    "OMPI_COMM_WORLD_SIZE": ("mpirun", "mpirun --map-by ppr:1:node"),
}
"""Variables with the number of processes, of launchers that do not set WORLD_SIZE: the launcher,
and the command that starts one process on each machine."""


@dataclass(frozen=True)
class Launch:
    """The place of this process among those that were started together."""

    rank: int = 0
    size: int = 1
    local: int = 0
    """Rank on this machine, and so the number of its GPU."""
    machine: int = 1
    """Processes on this machine, where the launcher says so."""


def launch() -> Launch:
    """Read the place of this process. WORLD_SIZE alone decides whether there are several.

    Launchers and containers leave variables behind, so that one process ignores the others, and an
    empty variable counts as unset. Raises Unsupported if WORLD_SIZE promises several processes and
    a variable that they need to meet is missing or impossible, and ConfigError if srun or mpirun
    started several without WORLD_SIZE, of which each would be a run of its own.
    """
    if not _given("WORLD_SIZE"):
        _check_alone()
    size = _number("WORLD_SIZE", 1, least=1)
    if size == 1:
        return Launch()
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not _given(name):
            raise Unsupported(f"{name}: not set, but WORLD_SIZE is {size}; {TORCHRUN}")
    _number("MASTER_PORT", 0, least=1, most=65535)
    local = _number("LOCAL_RANK", 0, least=0, most=size - 1)
    machine = _number("LOCAL_WORLD_SIZE", 1, least=1, most=size)
    return Launch(_number("RANK", 0, least=0, most=size - 1), size, local, machine)


def cores() -> int:
    """Return the number of CPU cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def threads(machine: int) -> int | None:
    """Return its share of the cores for one of several processes on a machine, or None.

    None where OMP_NUM_THREADS is unset, or says anything but 1. torchrun sets 1 for several
    processes if it is unset, which can't be told from a user's 1.
    """
    alone = machine == 1 or _given("OMP_NUM_THREADS") != "1"
    return None if alone else max(1, cores() // machine)


def restarts() -> int:
    """Return how many times `torchrun` has restarted the processes after one of them failed."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0, least=0)


def check_parallel(parallel: str | None, size: int) -> None:
    """Raise ConfigError unless train.parallel fits the number of processes, as unset does."""
    fitting = "ddp" if size > 1 else "none"
    wanted = f"{fitting} with {size} process{'es' if size > 1 else ''}, or unset"
    check(parallel in (None, fitting), "train.parallel", parallel, wanted)


def speaks() -> bool:
    """Return whether this process prints: all but the later ones of several."""
    try:
        return launch().rank == 0
    except (ConfigError, Unsupported):
        return True


def _check_alone() -> None:
    """Raise ConfigError if this is one of several processes that do not know of each other."""
    for name, (launcher, one_each) in SEVERAL.items():
        started = _number(name, 1, least=1)
        if started > 1:
            raise ConfigError(
                f"{name}: {launcher} started {started} processes, but WORLD_SIZE is not set, so"
                f" each would be a run of its own; start them with `{one_each} torchrun --nnodes"
                " MACHINES --nproc-per-node GPUS --rdzv-backend c10d --rdzv-endpoint HOST:29400 -m"
                " -- peptrain ...`, or set WORLD_SIZE=1 to use one process"
            )


def _given(name: str) -> str:
    return os.environ.get(name, "").strip()


def _number(name: str, unset: int, least: int, most: int = 10**6) -> int:
    value = _given(name)
    if not value:
        return unset
    if not (value.isascii() and value.isdigit() and len(value) < 8 and least <= int(value) <= most):
        raise Unsupported(f"{name}: must be an integer from {least} to {most} (got {value!r});"
                          f" {TORCHRUN}")  # fmt: skip
    return int(value)
