"""Addressed random numbers: every draw is a function of (seed, site, step, purpose)."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

Draw = Callable[[], Tensor]


@dataclass(frozen=True)
class Rng:
    """`rng(site, step)` returns a fresh CPU generator, the same on every rank and after a resume.

    Drawing on the CPU makes the values independent of the device. (Only the bits of stochastic
    rounding, 16 per weight, are drawn on the weight's device.) Code that draws must therefore pass
    device="cpu", because torch's default device may be a GPU. An address instead of one shared
    stream makes the values independent of how many were drawn before.
    """

    seed: int

    def __call__(self, site: str, step: int = 0, purpose: str = "") -> torch.Generator:
        return torch.Generator().manual_seed(self.integer(site, step, purpose))

    def integer(self, site: str, step: int = 0, purpose: str = "") -> int:
        """Return a 63-bit integer for this address."""
        address = f"{self.seed}|{site}|{step}|{purpose}".encode()
        return int.from_bytes(hashlib.blake2b(address, digest_size=8).digest(), "little") >> 1


def drawn(draws: Sequence[Draw]) -> Iterator[Tensor]:
    """Begin to draw in as many threads as PyTorch uses, and return the results, in the same order.

    PyTorch fills a tensor with random numbers in one thread, without Python's lock, at 4 to 7 ns a
    number. Each draw must have a generator of its own, so that the values do not depend on the
    number of threads, and must do nothing that PyTorch divides among threads itself, since every
    thread here would start as many again. At most two results a thread are in memory.

    Without threads where there is one, and in a mode such as FakeTensorMode, which is the calling
    thread's alone.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(draws) < 2 or type(torch.empty(0, device="cpu")) is not Tensor:
        return (draw() for draw in draws)
    pool = ThreadPoolExecutor(threads, "draw")
    first, later = draws[: 2 * threads], draws[2 * threads :]
    return _in_order(pool, deque(pool.submit(draw) for draw in first), later)


def _in_order(
    pool: ThreadPoolExecutor, begun: deque[Future[Tensor]], later: Sequence[Draw]
) -> Iterator[Tensor]:
    with pool:
        for draw in later:
            done = begun.popleft().result()
            begun.append(pool.submit(draw))
            yield done
        while begun:
            yield begun.popleft().result()


def seed_default(seed: int, device: torch.device | None = None) -> None:
    """Seed what a module draws from by itself, such as dropout, on `device` or the default one.

    On a CPU without torch.manual_seed, which keeps a stack trace for each kind of accelerator that
    has not been used yet, at every call.
    """
    if (device or torch.get_default_device()).type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
