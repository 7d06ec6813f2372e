"""A process that waits too long for others ends, whatever it waits in, and no other one does."""

import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from peptrain.distributed.watchdog import Watchdog, watchdog
from peptrain.distributed.world import World

MODULE = sys.modules[Watchdog.__module__]


class Ended(BaseException):
    """In place of the end of the process."""


class Clock:
    """Time passes by TICK at each look, with what the program does in the meantime."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *acts: Any) -> None:
        self.looks, self.acts = 0, acts
        monkeypatch.setattr(MODULE, "time", SimpleNamespace(sleep=self._sleep))
        monkeypatch.setattr(MODULE, "_end", self._end)

    def _sleep(self, seconds: float) -> None:
        self.looks += 1
        for act in self.acts[self.looks - 1 : self.looks]:
            act()
        if self.looks > 1000:
            raise KeyboardInterrupt

    def _end(self, limit: float) -> None:
        raise Ended(limit)

    def run(self, dog: Watchdog) -> int:
        """Return the number of looks until the end, 1001 if there was none."""
        try:
            dog._watch()
        except (Ended, KeyboardInterrupt):
            return self.looks
        raise AssertionError("it looks forever")


def enter(dog: Watchdog, seconds: float) -> Any:
    context = dog.within(seconds)
    return lambda: context.__enter__()


def test_a_body_that_takes_longer_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    dog = Watchdog()
    looks = Clock(monkeypatch, enter(dog, 20)).run(dog)
    assert 20 <= looks * MODULE.TICK <= 22


def test_without_a_limit_nothing_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Clock(monkeypatch).run(Watchdog()) == 1001


def test_every_body_that_ends_is_a_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    dog = Watchdog()

    def step() -> None:
        with dog.within(2):
            pass

    steps = [step, lambda: None, lambda: None] * 20
    looks = Clock(monkeypatch, enter(dog, 2), *steps).run(dog)
    assert len(steps) * MODULE.TICK < looks * MODULE.TICK < len(steps) * MODULE.TICK + 4


def test_the_shorter_of_two_limits_holds_and_the_outer_one_comes_back() -> None:
    dog = Watchdog()
    with dog.within(10):
        with dog.within(600):
            assert dog._limit == 10
        with dog.within(3):
            assert dog._limit == 3
        assert dog._limit == 10
    assert dog._limit is None


def test_what_the_gpu_completes_is_a_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program has launched several steps and waits in one place for all of them."""

    class Event:
        def __init__(self, at: int) -> None:
            self.at = at

        def query(self) -> bool:
            return clock.looks >= self.at

    dog = Watchdog()
    dog._events = tuple(Event(at) for at in (20, 40, 60))  # type: ignore[arg-type]
    clock = Clock(monkeypatch, enter(dog, 12))
    ended = clock.run(dog)
    assert 60 + 12 / MODULE.TICK <= ended <= 60 + (12 + MODULE.QUIET + 2) / MODULE.TICK


def test_the_gpu_is_not_asked_while_a_graph_may_be_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Event:
        def query(self) -> bool:
            assert clock.looks * MODULE.TICK >= MODULE.QUIET
            return True

    dog = Watchdog()
    dog._events = (Event(),)  # type: ignore[assignment]
    clock = Clock(monkeypatch, enter(dog, 12))
    assert clock.run(dog) < 1000


def test_one_process_may_take_any_time() -> None:
    with World(0, 1, torch.device("cpu")).within(0.01):
        time.sleep(0.05)


def test_there_is_one_for_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Watchdog] = []
    monkeypatch.setattr(Watchdog, "start", lambda dog: started.append(dog))
    watchdog.cache_clear()
    assert [watchdog()] == started and watchdog() is started[0] and len(started) == 1
    watchdog.cache_clear()
