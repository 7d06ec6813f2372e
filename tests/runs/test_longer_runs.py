"""What may change when a run goes on, and what a run is told that will not do what it seems to."""

import re
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Killed, kill_at, rows, step_numbers, tiny, tiny_method, untimed

from peptrain.config import RunConfig, load, resolved
from peptrain.distributed.watchdog import Watchdog
from peptrain.distributed.world import World
from peptrain.errors import CheckpointError, ConfigError
from peptrain.methods import BPT, METHODS, LoRA, ReLoRA
from peptrain.methods.targets import TargetedMethod
from peptrain.models.hf import ModelConfig
from peptrain.optim.schedule import ScheduleConfig
from peptrain.runs.build import open_run
from peptrain.runs.directory import RunDir
from peptrain.runs.ends import ends, lengthen
from peptrain.runs.init_from import initial_weights, with_inherited_model
from peptrain.testing import EVENT, STEPS, differences, newest
from peptrain.training import loop
from peptrain.training.loop import resume, train
from peptrain.training.state import restore

MERGES_LAST = 2 * EVENT
"""The end of a run whose last step is that of a merge, if it goes on."""


def edit(run: Path, old: str, new: str) -> None:
    file = RunDir(run).config_file
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


@pytest.mark.parametrize("name", METHODS)
def test_a_finished_run_that_is_given_more_steps_is_a_longer_run(
    name: str, corpus: Path, tmp_path: Path
) -> None:
    """At a constant rate it continues from its end. What is due there, between two steps, is made
    up for."""
    method = tiny_method(name)
    if isinstance(method, LoRA):
        method = replace(method, restart_warmup=2)
    for run, steps in (("longer", STEPS), ("extended", MERGES_LAST)):
        train(tiny(method, corpus, tmp_path / run, train={"steps": steps}))
    resume(tmp_path / "extended", steps=STEPS)
    assert differences(newest(tmp_path / "extended"), newest(tmp_path / "longer")) == []
    assert load(tmp_path / "extended" / "config.toml").train.steps == STEPS


def test_what_is_made_up_for_may_not_wait_forever_for_another_process(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes share it out, so each waits for the others."""
    dog, limits = Watchdog(), []
    train(tiny("bpt", corpus, tmp_path / "run", train={"steps": EVENT}))
    saved = newest(tmp_path / "run")
    monkeypatch.setattr(BPT, "after_step", lambda *given: limits.append(dog._limit) or {})
    config = load(tmp_path / "run" / "config.toml")
    longer = replace(config, train=replace(config.train, steps=STEPS))
    restore(longer, saved, World(0, 1, torch.device("cpu"), watchdog=dog, slow=700.0))
    assert limits == [700.0]


WSD = {"kind": "wsd", "decay": 2, "warmup": 1}
PLANNED, LONGER = 6, 11
EVERY = {"eval_every": 4, "checkpoint_every": 3, "keep": 1, "log_every": 2}
BEFORE_DECAY = 3
"""The last checkpoint at or before step PLANNED - 2, where the decay begins."""


def wsd(name: str, corpus: Path, run: Path, steps: int = PLANNED, **train_: Any) -> RunConfig:
    method = tiny_method(name)
    return tiny(method, corpus, run, schedule=WSD, train={**EVERY, "steps": steps, **train_})


def is_longer(run: Path, other: Path) -> bool:
    """Whether both have the same weights, moments, rows and settings."""
    return (
        differences(newest(run), newest(other)) == []
        and untimed(run) == untimed(other)
        and load(RunDir(run).config_file) == load(RunDir(other).config_file)
    )


@pytest.fixture
def planned(corpus: Path, tmp_path: Path) -> Path:
    """A finished run of PLANNED steps, `planned`, and beside it one of LONGER steps, `longer`."""
    for run, steps in (("planned", PLANNED), ("longer", LONGER)):
        train(wsd("relora", corpus, tmp_path / run, steps))
    return tmp_path / "planned"


@pytest.mark.parametrize("name", METHODS)
def test_with_wsd_a_run_becomes_longer_from_before_its_decay(
    name: str, corpus: Path, tmp_path: Path
) -> None:
    for run, steps in (("planned", PLANNED), ("longer", LONGER)):
        train(wsd(name, corpus, tmp_path / run, steps))
    run = tmp_path / "planned"
    assert step_numbers(run) == [BEFORE_DECAY, PLANNED]  # keep is 1
    taken_back = newest(run)
    resume(run, steps=LONGER)
    assert is_longer(run, tmp_path / "longer")
    assert differences(open_run(Path(f"{run}@{PLANNED}")).saved, taken_back) == []


def test_what_is_taken_back_stays_in_ends(planned: Path) -> None:
    config, before = load(RunDir(planned).config_file), untimed(planned)
    resume(planned, steps=LONGER)
    end = planned / "ends" / str(PLANNED)
    assert load(end / "config.toml") == config
    assert untimed(end) == [
        row for row in before if row["step"] > BEFORE_DECAY or row["event"] == "end"
    ]
    opened = open_run(Path(f"{planned}@{PLANNED}"))
    assert (opened.saved.step, opened.config.train.steps) == (PLANNED, PLANNED)
    assert open_run(planned).config.train.steps == LONGER


def test_a_run_becomes_longer_more_than_once(planned: Path, tmp_path: Path) -> None:
    resume(planned, steps=LONGER - 2)
    resume(planned, steps=LONGER)
    assert is_longer(planned, tmp_path / "longer")
    assert sorted(path.name for path in (planned / "ends").iterdir()) == ["6", "9"]
    for step in (PLANNED, LONGER - 2, LONGER):
        opened = open_run(Path(f"{planned}@{step}"))
        assert (opened.saved.step, opened.config.train.steps) == (step, step)


def test_a_longer_run_replays_from_its_configuration(planned: Path, tmp_path: Path) -> None:
    resume(planned, steps=LONGER)
    train(replace(load(RunDir(planned).config_file), run=tmp_path / "replayed"))
    assert is_longer(tmp_path / "replayed", planned)


def test_killed_anywhere_in_the_move_the_longer_run_is_resumed(
    planned: Path, tmp_path: Path
) -> None:
    """Before each of its changes to files, and by the same command again or without the steps."""
    number = 0
    while True:
        run = tmp_path / f"killed-{number}"
        shutil.copytree(planned, run)
        with pytest.MonkeyPatch.context() as patch:
            calls = count()

            def struck(original: Any) -> Any:
                def call(*args: Any, **given: Any) -> Any:
                    if next(calls) == number:  # noqa: B023
                        raise Killed
                    return original(*args, **given)

                return call

            for name in ("replace", "mkdir"):
                patch.setattr(Path, name, struck(getattr(Path, name)))
            try:
                with RunDir(run).lock():
                    lengthen(RunDir(run), LONGER, None)
            except Killed:
                pass
            if next(calls) <= number:
                break
        begun = (run / "longer.json").exists()
        resume(run, steps=None if begun and number % 2 else LONGER)
        assert is_longer(run, tmp_path / "longer"), number
        assert newest_end(run) == PLANNED
        number += 1
    assert number > 6


def newest_end(run: Path) -> int:
    return ends(RunDir(run))[-1].step


@pytest.mark.parametrize("step", range(BEFORE_DECAY + 1, LONGER + 1))
def test_killed_at_any_step_of_the_way_it_becomes_the_same_longer_run(
    step: int, planned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = loop.advance, count(BEFORE_DECAY + 1)

    def struck(*args: Any) -> Any:
        if next(calls) == step:
            raise Killed
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "advance", struck)
        resume(planned, steps=LONGER)
    resume(planned)
    assert is_longer(planned, tmp_path / "longer")


@pytest.mark.slow
def test_an_interrupted_run_becomes_longer_too(corpus: Path, tmp_path: Path) -> None:
    train(wsd("loro", corpus, tmp_path / "longer", LONGER))
    with pytest.raises(Killed):
        train(wsd("loro", corpus, tmp_path / "run"), kill_at("checkpoint", BEFORE_DECAY))
    resume(tmp_path / "run", steps=LONGER)
    assert is_longer(tmp_path / "run", tmp_path / "longer")


@pytest.mark.parametrize("kind", ["cosine", pytest.param("linear", marks=pytest.mark.slow)])
def test_other_schedules_need_the_one_that_follows(kind: str, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = wsd("full", corpus, run)
    train(replace(config, schedule=ScheduleConfig(kind=kind, warmup=1, floor=0.1)))  # type: ignore[arg-type]
    before = (run / "config.toml").read_text()
    with pytest.raises(ConfigError, match=r"train\.steps: with .* differ from step \d on; give"):
        resume(run, steps=LONGER)
    assert (run / "config.toml").read_text() == before and not (run / "ends").exists()
    resume(run, steps=LONGER, schedule=ScheduleConfig(kind="constant"))
    rates = [row["lr"] for row in rows(run)]
    steps = [row["step"] for row in rows(run)]
    after = [rate for step, rate in zip(steps, rates, strict=True) if step > PLANNED]
    assert steps[-1] == LONGER and {*after} == {load(run / "config.toml").optim.lr}
    assert rates[steps.index(PLANNED)] < after[0]
    assert open_run(Path(f"{run}@{PLANNED}")).config.schedule.kind == kind
    resume(run, steps=LONGER, schedule=ScheduleConfig(kind="constant"))  # the same again


def test_a_run_is_not_made_shorter(planned: Path) -> None:
    for steps in (PLANNED - 1, 1):
        with pytest.raises(ConfigError, match=r"train\.steps: must be more than the run's 6 \(got"):
            resume(planned, steps=steps)
    with pytest.raises(ConfigError, match="another schedule"):
        resume(planned, schedule=ScheduleConfig(kind="cosine"))
    with pytest.raises(ConfigError, match=r"schedule\.warmup: must be less"):
        resume(planned, steps=LONGER, schedule=ScheduleConfig(warmup=LONGER))
    assert not (planned / "ends").exists() and not (planned / "longer.json").exists()


def test_without_a_checkpoint_before_the_decay_the_schedule_must_be_given(planned: Path) -> None:
    shutil.rmtree(planned / "checkpoints" / f"step-{BEFORE_DECAY:08d}")
    with pytest.raises(ConfigError, match="no checkpoint before it was kept; give the schedule"):
        resume(planned, steps=LONGER)
    resume(planned, steps=LONGER, schedule=ScheduleConfig(decay=3))
    assert newest(planned).step == LONGER and newest_end(planned) == PLANNED


def test_a_damaged_record_of_a_longer_run_is_named(planned: Path) -> None:
    resume(planned, steps=LONGER)
    record = planned / "ends" / str(PLANNED) / "longer.json"
    record.write_text(record.read_text().replace('"start": 3', '"start": 5'))
    for use in (open_run, resume):
        with pytest.raises(CheckpointError, match=r"longer\.json: damaged \(does not match"):
            use(planned)


EDITS = {
    "steps = 6": ("steps = 9", "train.steps", "resume RUN --train.steps 9"),
    "lr = 0.002": ("lr = 0.001", "optim.lr", "--continue-from RUN@6 --optim.lr 0.001"),
    "decay = 2": ("decay = 1", "schedule.decay", "--continue-from RUN@6 --schedule.decay 1"),
    "restart_warmup = 1": (
        "restart_warmup = 0",
        "method.restart_warmup",
        "--method.restart-warmup",
    ),
}


@pytest.mark.parametrize("old", EDITS)
def test_an_edited_configuration_is_refused_with_the_repair(
    old: str, corpus: Path, tmp_path: Path
) -> None:
    """What the weights depend on. Afterwards config.toml would no longer repeat the run."""
    run = tmp_path / "run"
    method = replace(tiny_method("bpt"), restart_warmup=1)
    train(tiny(method, corpus, run, schedule=WSD, train={**EVERY, "steps": PLANNED}))
    new, key, repair = EDITS[old]
    edit(run, f"\n{old}\n", f"\n{new}\n")
    for use in (open_run, resume):
        with pytest.raises(CheckpointError, match=rf"^{re.escape(key)}: .* restore it") as caught:
            use(run)
        assert repair.replace("RUN", str(run)) in str(caught.value)


def test_an_edited_run_is_not_made_longer_and_nothing_moves(planned: Path) -> None:
    rate = load(planned / "config.toml").optim.lr
    edit(planned, f"\nlr = {rate}\n", "\nlr = 0.25\n")
    before = {path: path.stat().st_mtime_ns for path in planned.rglob("*")}
    with pytest.raises(CheckpointError, match=r"^optim\.lr: "):
        resume(planned, steps=LONGER)
    left = {path: path.stat().st_mtime_ns for path in planned.rglob("*") if path != planned}
    assert left == {path: time for path, time in before.items() if path != planned}
    edit(planned, "\nlr = 0.25\n", f"\nlr = {rate}\n")
    resume(planned, steps=LONGER)
    assert newest(planned).step == LONGER


def test_settings_that_change_no_weight_may_change(
    planned: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(planned, "\nkeep = 1\n", "\nkeep = 4\n")
    resume(planned)
    assert "train.keep from 1 to 4" in caplog.text


def test_what_the_weights_depend_on_may_not(corpus: Path, tmp_path: Path) -> None:
    train(tiny("relora", corpus, tmp_path / "run"))
    edit(tmp_path / "run", "alpha = 32.0\n", "alpha = 16.0\n")
    with pytest.raises(CheckpointError, match=r"method\.alpha"):
        resume(tmp_path / "run")


@pytest.mark.parametrize("event", ["checkpoint", "step"])
def test_the_record_names_the_switch_once_wherever_it_was_killed(
    event: str, corpus: Path, tmp_path: Path
) -> None:
    config = tiny("relora", corpus, tmp_path / "run", train={"checkpoint_every": 1})
    with pytest.raises(Killed):
        train(config, kill_at(event, 2 if event == "checkpoint" else 3))
    resume(tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run", "phase")] == [2]


def said(caplog: pytest.LogCaptureFixture, *parts: str) -> bool:
    return any(all(part in message for part in parts) for message in caplog.messages)


def test_merges_that_never_come_are_warned_of(
    caplog: pytest.LogCaptureFixture, corpus: Path
) -> None:
    for warm, every, warned in ((0, 8, True), (5, 4, True), (3, 4, False), (0, 0, False)):
        caplog.clear()
        ReLoRA(rank=2, warm_start_steps=warm, merge_every=every).phases(STEPS)
        assert said(caplog, "method.merge_every", "nothing merges") is warned, (warm, every)


def test_a_rewarmup_that_never_ends_is_warned_of(
    caplog: pytest.LogCaptureFixture, corpus: Path, tmp_path: Path
) -> None:
    for rewarm, warned in ((2, False), (3, True)):
        caplog.clear()
        method = ReLoRA(rank=2, warm_start_steps=0, merge_every=3, restart_warmup=rewarm)
        train(tiny(method, corpus, tmp_path / str(rewarm)))
        assert said(caplog, "restart_warmup: 3", "every 3") is warned


def test_freezing_random_embeddings_is_warned_of(
    caplog: pytest.LogCaptureFixture, corpus: Path
) -> None:
    for name, cls in METHODS.items():
        if issubclass(cls, TargetedMethod):
            caplog.clear()
            with_inherited_model(tiny(tiny_method(name, train_rest=False), corpus))
            assert said(caplog, "method.train_rest", "--init-from")
            caplog.clear()
            with_inherited_model(tiny(tiny_method(name, train="norm"), corpus))
            assert said(caplog, "method.train: norm", "--init-from")
            caplog.clear()
            with_inherited_model(tiny(name, corpus))
            assert not caplog.messages


@pytest.mark.parametrize("key, value", [("heads", 4), ("kv_heads", 1), ("family", "olmo2")])
def test_weights_that_fit_another_function_are_refused(
    key: str, value: Any, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Other heads may have the same shapes; the weights would be another model without a word."""
    train(tiny("full", corpus, tmp_path / "source", train={"steps": 1}))
    given = tiny("full", corpus, tmp_path / "run", model={key: value})
    with pytest.raises(ConfigError, match=r"init_from: .* leave out all model settings"):
        train(replace(given, init_from=tmp_path / "source"))
    assert not (tmp_path / "run").exists()


def test_a_preset_that_is_given_is_not_overruled(corpus: Path, tmp_path: Path) -> None:
    train(tiny("full", corpus, tmp_path / "source", train={"steps": 1}))
    named = replace(
        tiny("full", corpus), init_from=tmp_path / "source", model=ModelConfig(preset="tiny")
    )
    config = resolved(with_inherited_model(named), world_size=1, on_gpu=False)
    with pytest.raises(ConfigError, match="init_from"):
        initial_weights(config)
    alone = replace(named, model=ModelConfig())
    assert with_inherited_model(alone).model.hidden_size == 16
    train(replace(alone, run=tmp_path / "run"))
    assert load(RunDir(tmp_path / "run").config_file).model.preset == "tiny"
