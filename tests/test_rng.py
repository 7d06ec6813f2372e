"""Numbers drawn by several threads, and what a merge draws with them."""

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from byhand import made, snapshot, walk
from support import tiny_method
from torch import nn
from torch._subclasses import FakeTensorMode

from peptrain.distributed import owners
from peptrain.models.sites import reparametrized
from peptrain.rng import Rng, drawn
from peptrain.testing import EVENT


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def one(i: int) -> torch.Tensor:
    """Numbers of the i-th address, the later the sooner."""
    time.sleep(0.003 * (20 - i) / 20)
    return torch.randn(50 + i, generator=Rng(0)(f"site {i}"))


def test_several_threads_draw_what_one_draws_in_the_same_order(three_threads: None) -> None:
    names: set[str] = set()

    def noted(i: int) -> torch.Tensor:
        names.add(threading.current_thread().name)
        return one(i)

    found = list(drawn([partial(noted, i) for i in range(20)]))
    assert len(names) > 1 and all(name.startswith("draw") for name in names)
    for i, numbers in enumerate(found):
        assert torch.equal(numbers, one(i))
    assert len(found) == 20


def test_at_most_two_results_a_thread_are_in_memory(three_threads: None) -> None:
    begun: list[int] = []

    def noted(i: int) -> torch.Tensor:
        begun.append(i)
        return torch.zeros(1)

    results = drawn([partial(noted, i) for i in range(20)])
    next(results)
    time.sleep(0.05)
    assert sorted(begun) == list(range(7))
    assert len(list(results)) == 19


def test_an_error_in_a_thread_is_raised(three_threads: None) -> None:
    def fails() -> torch.Tensor:
        raise ValueError("a draw")

    with pytest.raises(ValueError, match="a draw"):
        list(drawn([partial(one, 0), fails, partial(one, 1)]))


def test_an_estimate_draws_nothing(three_threads: None) -> None:
    with FakeTensorMode() as mode:
        found = list(drawn([partial(torch.zeros, 3, device="cpu") for _ in range(4)]))
    assert all(getattr(x, "fake_mode", None) is mode for x in found)


def merged(name: str, threads: int) -> nn.Module:
    """A model after a few steps and a merge by `threads` threads."""
    before = torch.get_num_threads()
    model, optimizer, config = made(tiny_method(name))
    walk(model, optimizer, 2)
    torch.set_num_threads(threads)
    try:
        config.method.after_step(model, optimizer, EVENT, Rng(0))
    finally:
        torch.set_num_threads(before)
    return model


@pytest.mark.parametrize("name, factor", [("bpt", "U"), ("relora", "A")])
def test_a_merge_is_the_same_by_several_threads_and_processes(
    name: str, factor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of two processes draws its share, and both shares are what one process draws."""
    alone = merged(name, 1)
    wanted, seen = snapshot(alone), list[int]()
    names = [f"{layer.site}.{factor}" for layer in reparametrized(alone)]
    assert all(torch.equal(wanted[key], x) for key, x in snapshot(merged(name, 3)).items())
    for rank in (0, 1):
        own: list[int] = []
        monkeypatch.setattr(
            owners.Owners, "send_", lambda self, items, own=own: own.extend(self.own)
        )
        with owners.sharing(rank, 2):
            found = snapshot(merged(name, 3))
        seen += own
        left = {key for i, key in enumerate(names) if i not in own}
        assert {key for key, x in found.items() if not torch.equal(x, wanted[key])} == left
    assert sorted(seen) == list(range(len(names)))
