"""The command's flags for longer runs, branches and single checkpoints."""

import re
from pathlib import Path

import pytest
from support import rows, step_numbers

from peptrain.cli.app import main
from peptrain.config import load
from peptrain.testing import MODEL

MODEL_FLAGS = [f"--model.{key.replace('_', '-')}={value}" for key, value in MODEL.items()]
TINY = [*MODEL_FLAGS, "--train.batch-size=4", "--train.seq-len=16", "--train.log-every=1"]
WSD = ["--method.rank=2", "--schedule.kind=wsd", "--schedule.warmup=1", "--schedule.decay=2"]


@pytest.fixture
def trunk(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six steps by bpt, with the checkpoints 0, 2, 3 and 6."""
    monkeypatch.chdir(tmp_path)
    keep = ["--train.keep-at=0,2", "--train.checkpoint-every=3", "--train.keep=1"]
    line = ["train", "bpt", *TINY, *WSD, *keep, "--train.steps=6", f"--data.path={corpus}"]
    assert main([*line, "--run=trunk"]) == 0
    assert step_numbers(Path("trunk")) == [0, 2, 3, 6]
    return Path("trunk")


def test_resume_makes_a_run_longer(trunk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", "trunk", "--train.steps", "9"]) == 0
    assert load(trunk / "config.toml").train.steps == 9
    assert [row["step"] for row in rows(trunk)] == list(range(1, 10))
    capsys.readouterr()
    assert main(["resume", "trunk", "--train.steps", "7"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: train.steps: must be more than the run's 9 (got 7)")
    assert main(["resume", "trunk", "--train.steps=12", "--schedule.kind=constant"]) == 0
    assert load(trunk / "config.toml").schedule.kind == "constant"
    assert {path.name for path in (trunk / "ends").iterdir()} == {"6", "9"}


def test_a_branch_has_the_settings_of_its_trunk_and_flags_override_them(trunk: Path) -> None:
    given = ["--continue-from=trunk@3", "--train.steps=5", "--optim.lr=0.5", "--run=branch"]
    assert main(["train", *given]) == 0
    theirs, ours = (load(Path(run) / "config.toml") for run in ("trunk", "branch"))
    assert (ours.method, ours.model, ours.schedule) == (
        theirs.method,
        theirs.model,
        theirs.schedule,
    )
    assert (ours.train.steps, ours.optim.lr, theirs.train.steps) == (5, 0.5, 6)
    assert ours.continue_from == Path.cwd() / "trunk@3"
    assert [row["step"] for row in rows(Path("branch"))] == [4, 5]


@pytest.mark.parametrize(
    "line, message",
    [
        (
            "train loro --continue-from trunk",
            r".* is for bpt, but the command says loro; .*init-from",
        ),
        ("train --continue-from trunk@5", r"trunk@5: no checkpoint .* choose one of 0, 2, 3, 6$"),
        ("train --continue-from trunk@3 --method.rank 3", r"method\.rank: .* leave it as it was"),
        ("train --continue-from trunk@3 --train.steps 3", r"train\.steps: must be > 3"),
        ("train --continue-from nothing", "nothing: not a run directory"),
        ("train --continue-from trunk --recipe relora-60m-lora", r".* can't be combined with"),
        ("resume trunk@3", r"trunk@3: a run is resumed from its latest checkpoint"),
        ("eval trunk --step x", "--step: must be a step or all"),
    ],
)
def test_what_can_not_be_continued_is_one_line(
    line: str, message: str, trunk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(line.split()) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.match(message, said.removeprefix("error: ").strip()), said


def test_eval_and_export_take_a_step_or_all(
    trunk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["eval", "trunk", "--step", "all"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "perplexity" in line]
    assert [line.split()[:2] for line in lines[:4]] == [["step", str(n)] for n in (0, 2, 3, 6)]
    for given in (["trunk", "--step", "2"], ["trunk@2"]):
        assert main(["eval", *given]) == 0
        assert capsys.readouterr().out.splitlines()[0] == lines[1]
    assert main(["export", "trunk", "--step", "all", "--out", "out"]) == 0
    assert {path.name for path in Path("out").iterdir()} == {"0", "2", "3", "6"}
