"""Steps at equal FLOPs and equal time, against arithmetic and in earnest."""

import json
import math
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import algebra, footprint
from support import rows, tiny, write_grid

import peptrain.comparison.equal_cost
from peptrain.comparison import timing
from peptrain.comparison.compare import compare
from peptrain.comparison.equal_cost import Timing, allot, clock, count_flops, kept, write_costs
from peptrain.comparison.grid import Grid, GridRun, expand, load_grid
from peptrain.comparison.workers import Job, alone
from peptrain.config import resolved
from peptrain.errors import CheckpointError, ConfigError, Interrupted, PeptrainError
from peptrain.methods import LORO, Full, ReLoRA
from peptrain.testing import MODEL, TRAIN

ARCH = algebra.Arch(family="llama", V=320, d=16, f=24, L=2, heads=2, kv=2, tied=True)
"""The shape of the tests' model."""
BASE = {"model": MODEL | {"tied": True}, "train": TRAIN | {"device": "cpu"}}


def grid_of(*blocks: dict[str, Any], equal: str = "flops", **train: Any) -> Grid:
    return expand(
        {"equal": equal, "base": BASE | {"train": BASE["train"] | train}, "grid": list(blocks)}
    )


def per_token(method: str, rank: int) -> float:
    """Training FLOPs by hand, at the tests' length."""
    length = TRAIN["seq_len"]
    _, training = footprint.flops(ARCH, method, rank, length, 4 * length)
    return sum(training.values())


def by_method(runs: Sequence[GridRun]) -> dict[str, GridRun]:
    return {run.method: run for run in runs}


# FLOPs, against arithmetic.


@pytest.mark.parametrize("steps, rank, batch_size", [(40, 2, 4), (100, 4, 4), (33, 3, 8)])
def test_low_rank_and_full_steps_cost_what_arithmetic_says(
    steps: int, rank: int, batch_size: int, tmp_path: Path
) -> None:
    grid = grid_of(
        {"method.name": "lowrank", "method.rank": rank, "train.batch_size": batch_size},
        {"method.name": "full"},
        steps=steps,
    )
    found = by_method(allot(grid, kept(tmp_path / "costs", "flops", count_flops)))
    budget = steps * 4 * 16 * per_token("full", 0)
    step = batch_size * 16 * per_token("lowrank", rank)
    assert found["full"].steps == steps
    assert found["full"].cost == pytest.approx(budget, rel=1e-12)
    assert found["lowrank"].steps == math.floor(budget / step)
    assert found["lowrank"].cost == pytest.approx(found["lowrank"].steps * step, rel=1e-12)


def test_a_warm_start_counts_as_full_training_and_merges_count(tmp_path: Path) -> None:
    settings = {"method.name": "relora", "method.rank": 2, "method.warm_start_steps": 10}
    grid = grid_of(
        {"method.name": "full"},
        settings | {"method.merge_every": 0},
        settings | {"method.merge_every": 20},
        steps=50,
    )
    _, plain, merging = allot(grid, kept(tmp_path / "costs", "flops", count_flops))
    warm, rest = (64 * per_token(*what) for what in (("full", 0), ("relora", 2)))
    assert plain.steps == 10 + math.floor(40 * warm / rest)
    assert plain.cost == pytest.approx(10 * warm + (plain.steps - 10) * rest, rel=1e-12)
    # In 50 steps one is at 20 and one at 40: two for 40 steps, each 2nmr for every adapted matrix.
    sides = [(n, m) for n, m, on in footprint.matrices(ARCH, "relora", 2) if on]
    merge = ARCH["L"] * sum(2 * n * m * 2 for n, m in sides)
    after = rest + 2 * merge / 40
    assert merging.cost == pytest.approx(10 * warm + (merging.steps - 10) * after, rel=1e-12)


def test_what_is_left_unset_is_resolved_for_the_steps_of_the_run(tmp_path: Path) -> None:
    grid = grid_of({"method.name": "full"}, {"method.name": "relora", "method.rank": 2}, steps=80)
    found = by_method(allot(grid, kept(tmp_path / "costs", "flops", count_flops)))["relora"]
    assert found.steps > 80 and isinstance(found.config.method, ReLoRA)
    assert found.config.method.warm_start_steps == round(0.25 * found.steps)
    assert found.config.method.merge_every == math.ceil(0.25 * found.steps)
    assert found.config.schedule.warmup == round(0.1 * found.steps)
    assert found.config.train.log_every == TRAIN["log_every"], "what is said stays"
    assert found.config == resolved(found.written, world_size=1, on_gpu=False)


# Any cost.


def priced(full: float, warm: float, rest: float) -> tuple[list[str], Any]:
    """Costs of a step by phase, and the lines that asked for them."""
    asked: list[str] = []

    def costs(run: GridRun) -> list[float]:
        asked.append(run.label)
        if run.method == "full":
            return [full]
        assert isinstance(run.config.method, ReLoRA)
        return [warm, rest] if run.config.method.warm else [rest]

    return asked, costs


@settings(max_examples=60, deadline=None)
@example(steps=1, full=1.0, warm=1.0, rest=0.125)  # the warm start comes with the third step
@given(
    steps=st.integers(1, 60),
    full=st.floats(0.5, 2.0),
    warm=st.floats(0.1, 4.0),
    rest=st.floats(0.1, 4.0),
)
def test_the_steps_are_the_most_that_the_budget_pays(
    steps: int, full: float, warm: float, rest: float
) -> None:
    """A quarter of them is the warm start: the search is against trying one after the other."""
    grid = grid_of({"method.name": "full"}, {"method.name": "relora"}, steps=steps)
    _, costs = priced(full, warm, rest)

    def cost(n: int) -> float:
        return round(n / 4) * warm + (n - round(n / 4)) * rest

    tried = [n for n in range(1, 60 * 20 + 2) if cost(n) <= steps * full * (1 + 1e-9)]
    if not tried:
        with pytest.raises(ConfigError, match=r"relora: at the baseline's budget, train\.steps: "):
            allot(grid, costs)
        return
    found = by_method(allot(grid, costs))["relora"]
    assert found.steps == max(tried)
    assert found.cost == pytest.approx(cost(found.steps))


def test_seeds_and_rates_cost_nothing() -> None:
    grid = grid_of(
        {"method.name": "full", "optim.lr": [1e-3, 2e-3], "train.seed": [0, 1]},
        {"method.name": "relora", "train.seed": [0, 1], "optim.clip": [0.5, 1.0]},
        steps=40,
    )
    asked, costs = priced(1.0, 1.0, 0.5)
    made = allot(grid, costs)
    assert sorted(asked) == ["full", "relora optim.clip=0.5", "relora optim.clip=1.0"]
    assert len(made) == 8 and len({run.configuration for run in made}) == 3


def test_a_baseline_is_the_first_full_run_or_the_first_run() -> None:
    _, costs = priced(1.0, 0.5, 0.5)
    relora = {"method.name": "relora"}
    cheap = grid_of(relora, {"method.name": "full", "train.steps": 30}, steps=10)
    assert [run.steps for run in allot(cheap, costs)] == [60, 30]
    assert [run.label for run in allot(cheap, costs)] == ["relora", "full"]
    alone = grid_of(relora, relora | {"train.batch_size": 2}, steps=20)
    assert [run.steps for run in allot(alone, costs)] == [20, 20]


def test_a_warm_start_has_to_fit_into_steps_that_are_its_own() -> None:
    """Twice as many of half the batch: 50 of 80, though the baseline has 40."""
    _, costs = priced(1.0, 0.5, 0.5)
    grid = grid_of({"method.name": "full"}, {"method.name": "relora", "train.batch_size": 2,
                   "method.warm_start_steps": 50}, steps=40)  # fmt: skip
    assert [run.steps for run in allot(grid, costs)] == [40, 80]


def test_what_the_budget_does_not_pay_is_named() -> None:
    _, costs = priced(1.0, 2.0, 1.0)
    long = grid_of({"method.name": "full"}, {"method.name": "relora",
                   "method.warm_start_steps": 60}, steps=100)  # fmt: skip
    named = r"^relora warm_start_steps=60: at the baseline's budget, method\.warm_start_steps: .*60"
    with pytest.raises(ConfigError, match=named):
        allot(long, costs)
    twice = grid_of({"method.name": "full"}, {"method.name": "full"}, steps=10)
    with pytest.raises(ConfigError, match="two identical runs"):
        allot(twice, costs)


# Kept.


def test_costs_are_measured_once(tmp_path: Path) -> None:
    measured: list[str] = []

    def measure(run: GridRun, file: Path) -> None:
        measured.append(run.label)
        file.write_text(json.dumps({"seconds": [1.0 / len(measured)]}))  # never the same again

    blocks = ({"method.name": "full"}, {"method.name": "lowrank", "method.rank": 2})
    grid = grid_of(*blocks, equal="time", steps=20)
    first = allot(grid, kept(tmp_path / "costs", "time", measure))
    assert [run.steps for run in first] == [20, 40]
    assert allot(grid, kept(tmp_path / "costs", "time", measure)) == first
    assert measured == ["full", "lowrank rank=2"]
    more = grid_of(*blocks, {"method.name": "lowrank", "method.rank": 3}, equal="time", steps=20)
    assert allot(more, kept(tmp_path / "costs", "time", measure))[:2] == first
    assert measured == ["full", "lowrank rank=2", "lowrank rank=3"]


def test_rates_share_a_measurement_but_groups_of_their_own_do_not(tmp_path: Path) -> None:
    measured: list[str] = []

    def measure(run: GridRun, file: Path) -> None:
        measured.append(file.name)
        write_costs(file, "seconds", [1.0 / len(measured)])  # never the same again

    grid = grid_of(
        {"method.name": "full"},
        {"method.name": "full", "optim.embedding_lr": [1.0, 5e-3], "optim.head_lr": [1e-3, 2e-3]},
        {"method.name": "full", "optim.embedding_lr": 2.5e-3},
        equal="time", steps=20,
    )  # fmt: skip
    made = allot(grid, kept(tmp_path / "costs", "time", measure))
    assert [run.steps for run in made] == [20, 40, 40, 40, 40, 60]
    assert len({run.configuration for run in made}) == 6
    assert [name.rsplit("-", 1)[0] for name in measured] == ["time-full"] * 3


DAMAGES = [
    "", "null", "[1.0]", "{}", "[" * 10**5, "9" * 5000, '{"flops": 2.0}', '{"flops": [2.0, 2.0]}',
    '{"flops": [-2.0]}', '{"flops": [2.0], "sha256": null}', '{"flops": [1e999]}',
    '{"flops": ["2.0"]}', '{"seconds": [2.0]}',
]  # fmt: skip


@pytest.mark.parametrize("damage", [*DAMAGES, "a digit"])
def test_a_damaged_cost_is_named(damage: str, tmp_path: Path) -> None:
    costs = kept(tmp_path, "flops", lambda run, file: write_costs(file, "flops", [2.0]))
    (run,) = grid_of({"method.name": "full"}).runs
    assert costs(run) == [2.0]
    file = tmp_path / f"flops-{run.costs_name}.json"
    file.write_text(file.read_text().replace("2.0", "3.0") if damage == "a digit" else damage)
    with pytest.raises(CheckpointError, match=r"flops-full-\w+\.json: damaged .*; delete it"):
        costs(run)
    file.write_text('{"flops": [2.0]}')  # as 0.1.0 wrote it
    assert costs(run) == [2.0]


# Time.


def test_a_step_has_its_share_of_what_comes_now_and_then() -> None:
    # 1 s a step and 6 at each fifth: of an event every 50 steps 5 / 50 are a step's.
    seconds = [1.0, 1.0, 1.0, 1.0, 6.0] * 4
    assert timing.spread({50: seconds}) == pytest.approx(1.1)
    assert timing.spread({5: seconds}) == pytest.approx(2.0)
    assert timing.spread({math.inf: seconds}) == 1.0
    assert timing.spread({2: [1.0, 3.0] * 10}) == pytest.approx(2.0)
    dear = [1.0, 1.0, 1.0, 1.0, 101.0] * 4
    assert timing.spread({50: seconds, 1000: dear}) == pytest.approx(1.1 + 0.1)


def test_each_phase_is_timed_with_its_merges(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of our own: full steps take 2 s, others 1 and 10 more where merges are due."""
    now, seen = [0.0], []

    def advance(train_state: Any, config: Any, corpus: Any, here: Any) -> tuple[Any, None, Any]:
        train_state.step += 1
        merges = train_state.phase == 1 and train_state.step % config.method.merge_every == 0
        now[0] += 2.0 if train_state.phase == 0 else 11.0 if merges else 1.0
        seen.append((train_state.phase, train_state.step, train_state.schedule(train_state.step)))
        return SimpleNamespace(item=lambda: 0.0), None, {}

    monkeypatch.setattr(timing, "advance", advance)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    method = ReLoRA(rank=2, warm_start_steps=7, merge_every=100)
    config = tiny(method, corpus, train={"steps": 200, "device": "cpu"})
    found = timing.step_seconds(resolved(config, world_size=1, on_gpu=False))
    assert found == pytest.approx([2.0, 1.0 + 10 / 100])
    assert seen[0] == (0, 1, 0.0) and seen[25] == (1, 8, 0.0) and len(seen) == 50


def test_events_of_two_intervals_are_timed_apart(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rare, dear event has its own interval, also beside a frequent one."""
    now = [0.0]

    def advance(train_state: Any, config: Any, corpus: Any, here: Any) -> tuple[Any, None, Any]:
        train_state.step += 1
        due = {"exact_every": 10.0, "refresh_every": 100.0}
        every = {name: getattr(config.method, name) for name in due}
        now[0] += 1.0 + sum(due[k] for k, n in every.items() if n and train_state.step % n == 0)
        return SimpleNamespace(item=lambda: 0.0), None, {}

    monkeypatch.setattr(timing, "advance", advance)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for exact, refresh, wanted in ((20, 200, 2.0), (50, 50, 3.2), (20, 0, 1.5), (0, 0, 1.0)):
        method = LORO(rank=2, exact_every=exact, refresh_every=refresh, exact_cap=0.5)
        config = tiny(method, corpus, train={"steps": 400, "device": "cpu"})
        (found,) = timing.step_seconds(resolved(config, world_size=1, on_gpu=False))
        assert found == pytest.approx(wanted)


def test_factors_that_start_at_zero_are_moved_before_they_are_timed(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def advance(train_state: Any, config: Any, corpus: Any, here: Any) -> tuple[Any, None, Any]:
        train_state.step += 1
        seen.append([bool(p.any()) for n, p in train_state.model.named_parameters()
                     if n.endswith(".B")])  # fmt: skip
        return SimpleNamespace(item=lambda: 0.0), None, {}

    monkeypatch.setattr(timing, "advance", advance)
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    config = tiny(ReLoRA(rank=2, warm_start_steps=0), corpus, train={"device": "cpu"})
    timing.step_seconds(resolved(config, world_size=1, on_gpu=False))
    assert seen[0] and all(map(all, seen))


def test_timed_steps_leave_the_weights_alone(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a rate at which training breaks."""
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    config = tiny(Full(), corpus, optim={"lr": 1e30}, train={"device": "cpu"})
    (seconds,) = timing.step_seconds(resolved(config, world_size=1, on_gpu=False))
    assert seconds > 0


def test_steps_are_timed_of_a_run_that_is_shorter_than_its_warm_up(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cheap configuration is timed before it is known to have more steps."""
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    config = tiny(Full(), corpus, schedule={"warmup": 50}, train={"steps": 8, "device": "cpu"})
    (seconds,) = timing.step_seconds(resolved(config, world_size=1, on_gpu=False))
    assert seconds > 0


def test_what_can_not_be_timed_says_why(corpus: Path, tmp_path: Path, importable: None) -> None:
    """In the words of the error, without Python's name for it."""
    for part in ("logs", "settings"):
        (tmp_path / part).mkdir()
    small = {"model": BASE["model"] | {"vocab_size": 10}, "data": {"path": str(corpus)}}
    grid = grid_of({"method.name": "full", **small}, equal="time")
    told = r"^full .*: steps can't be timed: model\.vocab_size: "
    with alone(tmp_path) as lock, pytest.raises(PeptrainError, match=told):
        allot(grid, kept(tmp_path / "costs", "time", clock(tmp_path, [], lock)))


@pytest.mark.parametrize("says, error, message", [
    ("raise SystemExit('out of memory')", PeptrainError, "full: steps can't be timed: out of"),
    ("import os; os.kill(os.getppid(), 15); import time; time.sleep(600)", Interrupted, "continue"),
    ("import os; os.kill(os.getppid(), 15)", Interrupted, "continue"),
])  # fmt: skip
@pytest.mark.usefixtures("signals")
def test_a_timing_that_ends_early_is_told(
    says: str, error: type[Exception], message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(Timing, "command", lambda job: [sys.executable, "-S", "-c", says])
    for part in ("logs", "settings"):
        (tmp_path / part).mkdir()
    grid = grid_of({"method.name": "full"}, equal="time")
    with alone(tmp_path) as lock, pytest.raises(error, match=message):
        allot(grid, kept(tmp_path / "costs", "time", clock(tmp_path, [], lock)))
    assert not list((tmp_path / "costs").iterdir())


# In earnest.


@pytest.mark.slow
@pytest.mark.parametrize("equal", ["flops", "time"])
def test_a_comparison_at_an_equal_budget(
    equal: str, corpus: Path, tmp_path: Path, importable: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = write_grid(
        tmp_path, corpus, {}, {"method.name": "lowrank", "method.rank": 2},
        train__seed=0, optim__lr=1e-3,
    )  # fmt: skip
    grid.write_text(f'equal = "{equal}"\n{grid.read_text()}')
    out = tmp_path / "out"
    made = compare(grid, out, 1)
    full, low = made.lines
    assert full.steps == TRAIN["steps"] and full.finished == low.finished == 1
    assert full.cost and low.cost
    step = low.cost / low.steps
    assert full.cost - step < low.cost <= full.cost * (1 + 1e-9)
    if equal == "flops":
        assert low.steps > full.steps
    for run in json.loads((out / "runs.json").read_text())["runs"]:
        (end,) = rows(out / run["run"], "end")
        assert end["step"] == run["steps"] and run["tokens"] == 4 * 16 * run["steps"]
    assert f"| {low.tokens:,} |" in (out / "table.md").read_text()

    def never(job: Job) -> list[str]:
        raise AssertionError(f"{job.name}: begun again")

    monkeypatch.setattr(Job, "command", never)
    monkeypatch.setattr(Timing, "command", never)
    for kept_apart in list(out.glob("*/checkpoints")):  # large, and no longer needed
        shutil.rmtree(kept_apart)
    elsewhere = shutil.copytree(out, tmp_path / "elsewhere")
    assert compare(grid, elsewhere, 1) == made and made.equal == equal


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("swallowed", [False, True])
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_while_flops_are_counted_is_no_failure_and_is_not_lost(
    number: int, code: int, swallowed: bool, corpus: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def estimate(config: Any) -> SimpleNamespace:
        try:
            signal.raise_signal(number)
        except Interrupted:
            if not swallowed:
                raise
        return SimpleNamespace(phases=[])

    monkeypatch.setattr(peptrain.comparison.equal_cost, "estimate", estimate)
    grid = load_grid(write_grid(tmp_path, corpus))
    with pytest.raises(Interrupted, match="run the same command to continue") as stopped:
        count_flops(grid.runs[0], tmp_path / "costs.json")
    assert stopped.value.code == code and not (tmp_path / "costs.json").exists()
