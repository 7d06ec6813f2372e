"""Work that every replica needs alike, done by one process each and sent to the others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_place: ContextVar[tuple[int, int]] = ContextVar("place", default=(0, 1))
"""Rank and number of the processes that share work. By default none does: what rank 0 computes
alone, such as an estimate, must not wait for the others."""


@contextlib.contextmanager
def sharing(rank: int, size: int) -> Iterator[None]:
    """Let `owners` divide work among `size` replicas in the body, which all of them must run."""
    token = _place.set((rank, size))
    try:
        yield
    finally:
        _place.reset(token)


def sharers() -> int:
    """Return how many processes share work here."""
    return _place.get()[1]


@dataclass(frozen=True)
class Owners:
    """Which process does which item."""

    of: tuple[int, ...]
    """The rank that owns each item."""
    rank: int
    """This process."""
    size: int

    @property
    def own(self) -> list[int]:
        """The items of this process."""
        return [i for i in range(len(self.of)) if self.owns(i)]

    def owns(self, item: int) -> bool:
        return self.of[item] == self.rank

    def send_(self, items: Sequence[Iterable[Tensor]]) -> None:
        """Replace the tensors of every item in place by those of its owner."""
        if self.size == 1:
            return
        owned = zip(items, self.of, strict=True)
        send_((tensor, owner) for tensors, owner in owned for tensor in tensors)


def send_(tensors: Iterable[tuple[Tensor, int]]) -> None:
    """Replace each tensor in place by that of the rank given with it.

    Backends lack some dtypes, so bytes are sent. They read and write a tensor as if it were
    contiguous, so one that is not, such as the first columns of a matrix, is copied.
    """
    sent = []
    for tensor, owner in tensors:
        whole = tensor.detach().contiguous()
        work = dist.broadcast(whole.view(-1).view(torch.uint8), owner, async_op=True)
        sent.append((work, tensor.detach(), whole))
    for work, tensor, whole in sent:
        work.wait()
        if not tensor.is_contiguous():
            tensor.copy_(whole)


def owners(costs: Sequence[float]) -> Owners:
    """Give every item to a process, so that each has about as much to do.

    The most costly first, always to the process that has the least so far. `costs` must be the same
    on every process, as those that follow from shapes are.
    """
    rank, size = _place.get()
    of, load = [0] * len(costs), [0.0] * size
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        of[item] = load.index(min(load))
        load[of[item]] += costs[item]
    return Owners(tuple(of), rank, size)
