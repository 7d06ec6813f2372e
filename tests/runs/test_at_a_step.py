"""Checkpoints of chosen steps: kept by train.keep_at, read as RUN@STEP."""

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import Killed, kill_at, rows, step_numbers, tiny, untimed

from peptrain import evaluate, export
from peptrain.cli.app import main
from peptrain.errors import CheckpointError, ConfigError
from peptrain.methods import METHODS
from peptrain.models.dense import dense_state
from peptrain.runs import select
from peptrain.runs.build import open_run
from peptrain.runs.checkpoint import Keep, available
from peptrain.runs.directory import RunDir
from peptrain.runs.init_from import initial_weights
from peptrain.runs.select import at, chosen, may_vanish
from peptrain.sections import TrainConfig
from peptrain.testing import STEPS, differences, newest
from peptrain.training.loop import resume, train


def test_a_step_is_split_off_unless_the_path_exists(tmp_path: Path) -> None:
    assert at(tmp_path / "run@12") == (tmp_path / "run", 12)
    assert at(Path("a@1@20")) == (Path("a@1"), 20)
    for whole in ("run", "run@", "run@x", "@3", "run@1234567890"):
        assert at(Path(whole)) == (Path(whole), None)
    (tmp_path / "run@12").mkdir()
    assert at(tmp_path / "run@12") == (tmp_path / "run@12", None)


def test_which_checkpoints_are_kept() -> None:
    steps = [0, 2, 4, 6, 8, 10]
    assert Keep(2).of(steps) == {8, 10}
    assert Keep(1, TrainConfig(keep_at="0, 6,7").keeps).of(steps) == {0, 6, 10}
    assert Keep(1, stable=7).of(steps) == {6, 10}
    assert Keep(1, stable=6).of(steps) == {6, 10}
    assert Keep(1, stable=1).of(steps) == {0, 10}
    assert Keep(3, stable=-1).of(steps[3:]) == {6, 8, 10}


def test_log_keeps_the_powers_of_two() -> None:
    assert list(filter(TrainConfig(keep_at="log").keeps, range(40))) == [0, 1, 2, 4, 8, 16, 32]
    assert not any(map(TrainConfig().keeps, range(9)))


@pytest.mark.parametrize("given", ["x", "-1", "1,", "1;2", "logs", "0,1,log", "1.5", "1" * 10])
def test_other_steps_to_keep_are_refused(given: str) -> None:
    with pytest.raises(
        ConfigError, match=r"train\.keep_at: must be log, or steps such as 0,1,5000"
    ):
        TrainConfig(keep_at=given)


@pytest.mark.parametrize("given, kept", [("0,3,5", [0, 3, 5, 8]), ("log", [0, 1, 2, 4, 8])])
def test_the_steps_to_keep_are_saved_and_kept(
    given: str, kept: list[int], corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = {"checkpoint_every": 7, "keep": 1, "keep_at": given}
    train(tiny("bpt", corpus, run, train=settings))
    assert step_numbers(run) == kept
    assert [row["step"] for row in rows(run, "checkpoint")] == sorted({*kept, 7})


def test_what_the_training_deletes_is_skipped_unless_it_was_asked_for(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tiny("full", corpus, run := tmp_path / "run", train={"keep_at": "0,3", "keep": 1}))
    measured = []
    for one in chosen(run, "all"):
        with may_vanish(one):
            evaluate(one)
            measured.append(at(one)[1])
        shutil.rmtree(run / "checkpoints" / "step-00000003", ignore_errors=True)
    assert measured == [0, 8] and f"{run}@3: deleted by the training meanwhile" in caplog.text
    with pytest.raises(CheckpointError, match=r"@3: no checkpoint"), may_vanish(one, False):
        evaluate(Path(f"{run}@3"))
    (run / "checkpoints" / "step-00000000" / "state.json").write_text("")
    with pytest.raises(CheckpointError, match="is damaged"), may_vanish(there := Path(f"{run}@0")):
        evaluate(there)


def test_a_checkpoint_that_is_being_deleted_is_no_damaged_one(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, real = [], shutil.rmtree

    def looking(path: Any, *rest: Any, **given: Any) -> None:
        if "step-" in Path(path).name and Path(path, "state.json").exists():
            seen.append([p.name for p in available(tmp_path / "run" / "checkpoints")])
        real(path, *rest, **given)

    monkeypatch.setattr(shutil, "rmtree", looking)
    train(tiny("full", corpus, tmp_path / "run", train={"checkpoint_every": 4, "keep": 1}))
    assert seen == [["step-00000008"]]
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000008"]


def test_nothing_that_could_be_read_is_an_error(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(tiny("full", corpus, run := tmp_path / "run"))
    monkeypatch.setattr(select, "available", lambda directory: [])
    monkeypatch.setattr(select, "chosen", lambda path, step: [Path(f"{path}@8")])
    for command in ("eval", "export --out x"):
        assert main([*command.split(), str(run), "--step=all"]) == 1
        said = capsys.readouterr().err
        assert f"{run}: the training deleted every checkpoint before it was read" in said


@pytest.mark.parametrize("name", METHODS)
def test_a_run_killed_in_its_first_step_resumes_from_step_0(
    name: str, corpus: Path, tmp_path: Path
) -> None:
    settings = {"keep_at": "0", "log_every": 1}
    whole, killed = (tiny(name, corpus, tmp_path / r, train=settings) for r in ("whole", "killed"))
    train(whole)
    with pytest.raises(Killed):
        train(killed, kill_at("step", 1))
    assert step_numbers(tmp_path / "killed") == [0]
    resume(tmp_path / "killed")
    assert differences(newest(tmp_path / "killed"), newest(tmp_path / "whole")) == []
    assert untimed(tmp_path / "killed") == untimed(tmp_path / "whole")


@pytest.fixture(scope="module")
def kept(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("kept") / "run"
    train(tiny("loro", corpus, run, train={"keep": 1, "keep_at": "0,4"}))
    return run


def test_everything_reads_a_run_at_a_step(kept: Path, corpus: Path, tmp_path: Path) -> None:
    early, late = Path(f"{kept}@4"), Path(f"{kept}@{STEPS}")
    assert open_run(early).saved.step == 4
    assert evaluate(late) == evaluate(kept) != evaluate(early)
    export(early, tmp_path / "out")
    config = replace(tiny("full", corpus), init_from=early)
    weights = initial_weights(config)
    assert weights is not None
    own = dense_state(open_run(early).model)
    assert all((weights[name] == own[name]).all() for name in own)


def test_a_step_that_was_not_kept_is_refused_with_those_that_were(kept: Path) -> None:
    with pytest.raises(CheckpointError, match=r"run@3: .* is kept; choose one of 0, 4, 8$"):
        open_run(Path(f"{kept}@3"))


def test_a_damaged_checkpoint_that_was_asked_for_is_an_error(kept: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(kept, run)
    (RunDir(run).checkpoints / "step-00000004" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"step-00000004 is damaged .*; choose another step"):
        open_run(Path(f"{run}@4"))
    assert open_run(run).saved.step == STEPS


@pytest.mark.parametrize(
    "command",
    ["eval {run} --step all", "export {run} --step all --out {out}",
     "eval {run} --step all --data {corpus} --data {copy} --out {out}"],
)  # fmt: skip
def test_of_all_checkpoints_the_damaged_are_named_after_the_others_are_done(
    command: str, kept: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(kept, run)
    (RunDir(run).checkpoints / "step-00000000" / "model.safetensors").write_bytes(b"x")
    shutil.copytree(corpus, tmp_path / "copy")
    places = {"run": run, "corpus": corpus, "copy": tmp_path / "copy", "out": tmp_path / "out"}
    assert main(command.format(**places).split()) == 1
    out, err = capsys.readouterr()
    assert re.fullmatch(
        r"error: \S+step-00000000 is damaged \(.*\); choose another step; the other 2 are done",
        err.splitlines()[-1],
    )
    found = re.findall(r"(?:step |@|/out/)(\d)\b", out)
    assert list(dict.fromkeys(found)) == ["4", "8"]


def test_a_run_is_not_resumed_at_a_step(kept: Path) -> None:
    with pytest.raises(CheckpointError, match=r"run@4: .*latest.* --continue-from .*run@4"):
        resume(Path(f"{kept}@4"))


def test_directories_with_other_names_are_no_checkpoints(kept: Path, tmp_path: Path) -> None:
    odd: Any = RunDir(kept).checkpoints / "step-x"
    odd.mkdir()
    try:
        assert step_numbers(kept) == [0, 4, STEPS]
    finally:
        odd.rmdir()


def test_the_steps_of_a_command(kept: Path) -> None:
    assert chosen(kept, None) == [kept]
    assert chosen(kept, "4") == [Path(f"{kept}@4")]
    assert chosen(kept, "all") == [Path(f"{kept}@{step}") for step in (0, 4, STEPS)]
    for given in ("x", "-1", "", "4,8"):
        with pytest.raises(ConfigError, match=r"^--step: must be a step or all \(got"):
            chosen(kept, given)
    with pytest.raises(ConfigError, match=r"^--step: .*can't be combined with .*@4"):
        chosen(Path(f"{kept}@4"), "8")
    with pytest.raises(CheckpointError, match="not a run"):
        chosen(kept / "nothing", "all")
