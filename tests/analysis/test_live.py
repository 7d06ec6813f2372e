"""Measurements during training: what a budget allows, and that a resume continues the series."""

import json
import logging
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import Killed, kill_at, rows, tiny, untimed

from peptrain.analysis.analyze import analyze
from peptrain.analysis.live import FILE, Choice, Dynamics, choose, described
from peptrain.analysis.table import read_table
from peptrain.config import resolved
from peptrain.distributed.world import world
from peptrain.errors import CheckpointError, ConfigError
from peptrain.files import CHECKSUM
from peptrain.methods.lowrank import LowRank
from peptrain.runs.directory import NEWEST, RunDir
from peptrain.testing import STEPS, differences, newest
from peptrain.training.loop import resume, train

SETTINGS = {"observe": "dynamics", "observe_budget": 1.0, "device": "cpu", "checkpoint_every": 2,
            "keep": 99, "steps": 12}  # fmt: skip


def stored(run: Path) -> list[Choice]:
    entries = json.loads((run / FILE).read_text())
    return [Choice(**{k: v for k, v in entry.items() if k != CHECKSUM}) for entry in entries]


def prepared(monkeypatch: pytest.MonkeyPatch, choice: Choice) -> None:
    """Choose so, whatever the times, and find that it costs nothing."""
    monkeypatch.setattr("peptrain.analysis.live.choose", lambda *given: choice)
    monkeypatch.setattr(Dynamics, "_keep_the_budget", lambda *given: None)


@pytest.mark.parametrize(
    "cost, budget, wanted",
    [
        (0.1, 0.02, Choice(20, 40, 1)),  # 8 layers take 0.8 s, 2 % of 40 steps of 1 s
        (0.1, 1.0, Choice(20, 10, 1)),
        (0.4, 0.02, Choice(20, 40, 4)),  # every layer only each 160 steps, 6 times
        (5.0, 0.02, Choice(20, 250, 8)),
        (40.0, 0.02, Choice(20, 0, 8)),
    ],
)
def test_layers_and_interval_keep_the_budget(cost: float, budget: float, wanted: Choice) -> None:
    trial = budget * 20  # as much as the steps before it allow
    found = choose(20, 1020, layers=8, log_every=10, seconds=1.0, cost=cost, budget=budget,
                   spent=trial)  # fmt: skip
    assert found == wanted
    if found.every:
        measured = math.ceil(8 / found.stride)
        assert trial + cost * measured * (1000 // found.every) <= budget * 1020


@pytest.mark.parametrize(
    "spent, wanted",
    [
        (0.4, Choice(20, 40, 1)),
        (10.4, Choice(20, 40, 2)),
        (20.4, Choice(20, 0, 8)),
        (30.0, Choice(20, 0, 8)),
    ],
)
def test_the_trial_counts(spent: float, wanted: Choice) -> None:
    """Of 20.4 s for 1020 steps, 8 layers in 0.8 s may take what it leaves."""
    found = choose(20, 1020, layers=8, log_every=10, seconds=1.0, cost=0.1, budget=0.02,
                   spent=spent)  # fmt: skip
    assert found == wanted


@pytest.mark.parametrize("budget, tries, measured", [(1.0, 2, True), (1e-6, 1, False)])
def test_a_layer_is_tried_twice_where_that_fits_into_the_budget(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: float, tries: int,
    measured: bool,
) -> None:  # fmt: skip
    """The first trial loads libraries, so that the second tells what a measurement takes."""
    costs = iter([2e-3, 1e-6])
    monkeypatch.setattr(Dynamics, "_cost", lambda *given: next(costs))
    run = tmp_path / "run"
    train(tiny("full", corpus, run, train={**SETTINGS, "observe_budget": budget}))
    assert len(list(costs)) == 2 - tries
    assert (stored(run)[0].every > 0) == measured


def test_what_was_chosen_is_said_in_one_line() -> None:
    assert described(Choice(20, 40, 4), 8, 0.02) == (
        "train.observe: every 4th layer (2 of 8) is measured every 40 steps, to take at most 0.02"
        " of the training time"
    )
    assert "so nothing is measured" in described(Choice(20, 0, 8), 8, 0.02)


def test_a_run_chooses_once_says_so_and_measures_what_it_chose(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Dynamics, "_cost", lambda *given: 1e-4)  # fits, however slow this machine
    run = tmp_path / "run"
    with caplog.at_level(logging.INFO, logger="peptrain"):
        train(tiny("lora", corpus, run, train={**SETTINGS, "checkpoint_every": 0, "steps": 24}))
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("train.observe")]
    (choice, *later), found = stored(run), rows(run, "dynamics")
    assert f"every {choice.every} steps" in said[0] and len(said) == 1 + len(later)
    steps = sorted({x["step"] for x in found})
    assert steps[0] == min(s for s in range(3, 25) if s % choice.every == 0)
    layers = {0, 1} if choice.stride == 1 else {0}
    assert {x["layer"] for x in found} == layers
    assert {x["what"] for x in found} == {"weight", "update"}
    assert len(found) == len(steps) * len(layers) * 7 * 2
    spent = [x["observe_seconds"] for x in found]
    assert spent == sorted(spent) and spent[0] > 0


def test_what_is_measured_is_what_analyze_measures(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(monkeypatch, Choice(2, 5, 1))
    run = tmp_path / "run"
    kept = {**SETTINGS, "keep_at": "0,4,5"}
    train(tiny("relora", corpus, run, train=kept))
    analyze([Path(f"{run}@5")], probe=0)
    table = read_table(run / "analysis" / "5.csv")
    found = [x for x in rows(run, "dynamics") if x["step"] == 5]
    assert len(found) == 28
    for x in found:
        (same,) = [y for y in table if y["head"] is None
                   and all(y[k] == x[k] for k in ("layer", "module", "what"))]  # fmt: skip
        for key in ("structural_rank", "per", "rank_1e-3", "condition", "frobenius"):
            assert x[key] == pytest.approx(same[key], rel=1e-6), (key, x)


def test_an_update_is_measured_where_the_weight_is_the_parameter_itself(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full training in float64 on a CPU: the kept weight must not change with the parameter."""
    prepared(monkeypatch, Choice(2, 2, 1))
    train(tiny("full", corpus, tmp_path / "run", train={**SETTINGS, "steps": 4}))
    found = [x for x in rows(tmp_path / "run", "dynamics") if x["what"] == "update"]
    assert found and all(x["frobenius"] > 0 for x in found)


def test_of_every_step_the_update_is_measured(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two measured steps in a row: each has the weights of the step before it, also when the
    interval changes between them."""
    updates = {}
    for name, first in (("each", Choice(2, 1, 1)), ("some", Choice(2, 3, 1))):
        prepared(monkeypatch, first)
        train(tiny("relora", corpus, tmp_path / name, train=SETTINGS))
        found = rows(tmp_path / name, "dynamics")
        updates[name] = {(x["step"], x["layer"], x["module"]): x["frobenius"]
                         for x in found if x["what"] == "update"}  # fmt: skip
        assert 2 * len(updates[name]) == len(found)
    assert {step for step, *_ in updates["each"]} == set(range(3, 13))
    assert all(size > 0 for size in updates["each"].values())
    assert updates["some"] and updates["some"].items() <= updates["each"].items()


def test_a_rarer_interval_may_begin_with_the_next_step(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second step up to step 8, then every third."""

    def rarer(self: Dynamics, choice: Choice, step: int, *times: float) -> None:
        if step == 8:
            self._choices = self._store([choice, Choice(8, 3, 1)])

    prepared(monkeypatch, Choice(2, 2, 1))
    monkeypatch.setattr(Dynamics, "_keep_the_budget", rarer)
    train(tiny("full", corpus, tmp_path / "run", train=SETTINGS))
    found = rows(tmp_path / "run", "dynamics")
    assert [x["step"] for x in found if x["what"] == "update"] == (
        [x["step"] for x in found if x["what"] == "weight"]
    )
    assert {x["step"] for x in found} == {4, 6, 8, 9, 12}


def test_watching_changes_no_weight_and_no_other_row(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(monkeypatch, Choice(2, 3, 1))
    for name, observe in (("watched", "dynamics"), ("plain", "none")):
        config = tiny("relora", corpus, tmp_path / name, train={**SETTINGS, "observe": observe})
        train(config)
    assert differences(newest(tmp_path / "watched"), newest(tmp_path / "plain")) == []
    kept = [x for x in untimed(tmp_path / "watched") if x["event"] != "dynamics"]
    assert kept == untimed(tmp_path / "plain")


@pytest.mark.parametrize("event, at", [("checkpoint", 2), ("step", 5), ("dynamics", 6),
                                       ("checkpoint", 8)])  # fmt: skip
def test_a_resume_continues_one_series(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str, at: int
) -> None:
    """Killed at a phase boundary, before a measurement, within one, and before the next one."""
    prepared(monkeypatch, Choice(2, 3, 2))
    train(tiny("relora", corpus, tmp_path / "whole", train=SETTINGS))
    parted = tmp_path / "parted"
    with pytest.raises(Killed):
        train(tiny("relora", corpus, parted, train=SETTINGS), kill_at(event, at))
    prepared(monkeypatch, Choice(9, 1, 1))  # not asked: the choice is stored
    resume(parted)
    assert stored(parted) == [Choice(2, 3, 2)]
    assert untimed(tmp_path / "whole") == untimed(parted)
    assert {x["step"] for x in rows(parted, "dynamics")} == {3, 6, 9, 12}
    assert differences(newest(tmp_path / "whole"), newest(parted)) == []


def test_what_takes_more_than_the_budget_is_not_measured_again(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choices are stored, and a run that was killed and resumed obeys them again."""
    monkeypatch.setattr("peptrain.analysis.live.choose", lambda *given: Choice(2, 2, 2))
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    costly = {**SETTINGS, "observe_budget": 1e-6}
    train(tiny("full", corpus, whole, train=costly))
    assert stored(whole) == [Choice(2, 2, 2), Choice(4, 0, 2)]
    assert {x["step"] for x in rows(whole, "dynamics")} == {4}
    with pytest.raises(Killed):
        train(tiny("full", corpus, parted, train=costly), kill_at("step", 5))
    monkeypatch.setattr("peptrain.analysis.live.choose", lambda *given: pytest.fail("again"))
    shutil.rmtree(parted / "checkpoints" / "step-00000004")  # to measure step 4 a second time
    resume(parted)
    assert stored(parted) == stored(whole)
    assert untimed(parted) == untimed(whole)


@pytest.mark.parametrize("took, every", [(0.9, 20), (1.1, 30), (4.0, 90), (60.0, 0)])
def test_a_dearer_measurement_makes_them_rarer(tmp_path: Path, took: float, every: int) -> None:
    """At step 100 of 1000, of 1 s each: 50.5 s are allowed and 6 s spent. 900 steps are left."""
    with world("cpu") as here:
        tool = Dynamics(tmp_path, here, steps=1000, log_every=10, budget=0.05)
        first = Choice(20, 20, 1)
        tool._choices, tool._mark = [first], (20, 30.0)
        tool._keep_the_budget(first, 100, 110.0, spent=6.0, took=took)
    assert tool._choices == [first, *([] if every == 20 else [Choice(100, every, 1)])]
    allowed = 0.05 * 1010 - 6.0 - took
    assert every == 0 or took * (900 // every) <= allowed


def test_a_damaged_choice_is_named(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Killed):
        train(tiny("full", corpus, run, train=SETTINGS), kill_at("checkpoint", 4))
    (stored, *_) = json.loads((run / FILE).read_text())
    changed = json.dumps([stored | {"every": stored["every"] + 1}])
    wrong = ("[]", "[null]", '[{"after": 2}]', '[{"after": 2, "every": -1, "stride": 1}]', "{")
    for text in (*wrong, changed):
        (run / FILE).write_text(text)
        with pytest.raises(CheckpointError, match=r"observe\.json: damaged .* delete it"):
            resume(run)


@pytest.mark.parametrize("budget", [0.0, -1.0, 1.5, math.nan])
def test_a_budget_is_a_share(corpus: Path, budget: float) -> None:
    with pytest.raises(ConfigError, match=r"train\.observe_budget: must be above 0 and at most 1"):
        tiny("full", corpus, train={"observe_budget": budget})


def test_a_method_without_dense_weights_is_not_observed(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny("lowrank", corpus, train={"observe": "dynamics"})
    monkeypatch.setattr(LowRank, "has_dense_equivalent", False)
    with pytest.raises(
        ConfigError, match=r"train\.observe: must be none for lowrank, which has no"
    ):
        resolved(config, world_size=1, on_gpu=False)


def test_the_newest_row_is_found_behind_many_others(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.record({"event": "step", "step": 1, "loss": 2.5})
    for layer in range(2000):
        run.record({"event": "dynamics", "step": 1, "layer": layer})
    assert run.metrics_file.stat().st_size > 4 * NEWEST
    found = run.newest("step")
    assert found is not None and found["loss"] == 2.5
    assert run.newest("end") is None


TWO_RANKS = """
import sys
from pathlib import Path
from support import tiny
import peptrain.analysis.live as live
from peptrain.training.loop import train

live.choose = lambda *given: live.Choice(2, 3, 2)
settings = {"observe": "dynamics", "observe_budget": 1.0, "device": "cpu", "micro_batch": 1}
live.Dynamics._keep_the_budget = lambda *given: None
train(tiny("relora", Path(sys.argv[1]), Path(sys.argv[2]), train=settings))
"""


@pytest.mark.slow
def test_two_ranks_measure_what_one_does(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ranks.py").write_text(TWO_RANKS)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run(
        [*run, str(tmp_path / "ranks.py"), str(corpus), str(tmp_path / "two")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
        timeout=900,
    )
    prepared(monkeypatch, Choice(2, 3, 2))
    one: dict[str, Any] = {**SETTINGS, "steps": STEPS, "micro_batch": 1}
    train(tiny("relora", corpus, tmp_path / "one", train=one))
    alone, both = (rows(tmp_path / name, "dynamics") for name in ("one", "two"))
    assert len(alone) == len(both) == 2 * 14
    for x, y in zip(alone, both, strict=True):
        assert (x["step"], x["layer"], x["module"]) == (y["step"], y["layer"], y["module"])
        assert x["frobenius"] == pytest.approx(y["frobenius"], rel=1e-9)
