"""A new run that continues another one: branching."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import Killed, kill_at, rows, step_numbers, tiny, tiny_method, untimed

from peptrain.config import RunConfig, load
from peptrain.errors import CheckpointError, ConfigError
from peptrain.methods import METHODS
from peptrain.optim.adamw import OptimConfig
from peptrain.runs.build import open_run
from peptrain.runs.directory import RunDir
from peptrain.testing import STEPS, differences, newest, small_corpus
from peptrain.training.loop import resume, train

MIDDLE = 4
EVERY = {"checkpoint_every": 2, "keep": 9, "log_every": 1}


def branch(trunk: Path, run: Path, step: int | None = MIDDLE, **changes: Any) -> RunConfig:
    point = trunk if step is None else Path(f"{trunk}@{step}")
    return replace(load(RunDir(trunk).config_file), continue_from=point, run=run, **changes)


@pytest.mark.parametrize("name", METHODS)
def test_with_the_same_settings_a_branch_becomes_the_same_run(
    name: str, corpus: Path, tmp_path: Path
) -> None:
    """Weights, moments and clocks; its rows begin after the step."""
    trunk, run = tmp_path / "trunk", tmp_path / "branch"
    train(tiny(name, corpus, trunk, train=EVERY))
    train(branch(trunk, run))
    assert differences(newest(run), newest(trunk)) == []
    later = [row for row in untimed(trunk) if row["step"] > MIDDLE]
    assert untimed(run) == later
    assert newest(run).state_bytes == newest(trunk).state_bytes


@pytest.fixture(scope="module")
def trunk(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("trunk") / "run"
    train(tiny("relora", corpus, run, train=EVERY))
    return run


def test_a_branch_is_a_run_of_its_own(
    trunk: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The rows of the trunk are not missed in it."""
    before = {path: path.stat().st_mtime_ns for path in trunk.rglob("*")}
    train(branch(trunk, tmp_path / "a", optim=OptimConfig(lr=1e-4)))
    assert {path: path.stat().st_mtime_ns for path in trunk.rglob("*")} == before
    assert "missing" not in caplog.text
    assert step_numbers(tmp_path / "a") == [4, 6, 8]
    assert [row["step"] for row in rows(tmp_path / "a")] == [5, 6, 7, 8]
    assert {row["lr"] for row in rows(tmp_path / "a")[1:]} == {1e-4}
    assert open_run(tmp_path / "a").config.optim.lr == 1e-4
    assert open_run(Path(f"{tmp_path / 'a'}@4")).config.optim.lr == 1e-4


def test_a_branch_resumes_and_replays(trunk: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    given = {"optim": OptimConfig(lr=1e-4)}
    train(branch(trunk, whole, **given))
    with pytest.raises(Killed):
        train(branch(trunk, killed, **given), kill_at("step", MIDDLE + 1))
    resume(killed)
    train(replace(load(RunDir(whole).config_file), run=tmp_path / "again"))
    for run in (killed, tmp_path / "again"):
        assert differences(newest(run), newest(whole)) == []
        assert untimed(run) == untimed(whole)


def test_the_step_of_the_latest_checkpoint_is_recorded(trunk: Path, tmp_path: Path) -> None:
    config = branch(trunk, tmp_path / "run", step=None)
    train(replace(config, train=replace(config.train, steps=STEPS + 2)))
    assert load(tmp_path / "run" / "config.toml").continue_from == Path(f"{trunk}@{STEPS}")
    assert [row["step"] for row in rows(tmp_path / "run")] == [9, 10]


def test_a_branch_longer_than_the_trunk_is_a_longer_run(
    trunk: Path, corpus: Path, tmp_path: Path
) -> None:
    """At a constant rate. What is due at the trunk's last step is made up for."""
    more = {**EVERY, "steps": STEPS + 3}
    train(tiny("relora", corpus, tmp_path / "whole", train=more))
    config = branch(trunk, tmp_path / "run", step=STEPS)
    train(replace(config, train=replace(config.train, steps=STEPS + 3)))
    assert differences(newest(tmp_path / "run"), newest(tmp_path / "whole")) == []


@pytest.mark.parametrize(
    "section, values, key",
    [
        ("method", {"rank": 3}, "method.rank"),
        ("train", {"batch_size": 2, "micro_batch": 2}, "train.batch_size"),
        ("train", {"seed": 5}, "train.seed"),
        ("model", {"layers": 3}, "model.layers"),
    ],
)
def test_what_the_weights_depend_on_is_refused_by_name(
    section: str, values: dict[str, Any], key: str, trunk: Path, tmp_path: Path
) -> None:
    config = branch(trunk, tmp_path / "run")
    changed = replace(config, **{section: replace(getattr(config, section), **values)})
    with pytest.raises(CheckpointError, match=rf"^{key}: .*leave it as it was; .*--init-from"):
        train(changed)
    assert not (tmp_path / "run").exists()


def test_another_corpus_is_refused(trunk: Path, tmp_path: Path) -> None:
    config = branch(trunk, tmp_path / "run")
    other = replace(config, data=replace(config.data, path=small_corpus(tmp_path, words=5000)))
    with pytest.raises(CheckpointError, match=r"^data: "):
        train(other)


def test_another_method_is_pointed_to_the_weights(trunk: Path, tmp_path: Path) -> None:
    config = replace(branch(trunk, tmp_path / "run"), method=tiny_method("loro"))
    with pytest.raises(ConfigError, match=r"only relora can continue it; .* --init-from .*@4"):
        train(config)


def test_no_steps_left_is_refused(trunk: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.steps: must be > 8, the step to continue from"):
        train(branch(trunk, tmp_path / "run", step=STEPS))


@pytest.mark.parametrize("key", ["init_from", "match_trainable"])
def test_two_sources_of_weights_are_refused(key: str, trunk: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: .* can't be combined with continue_from"):
        train(branch(trunk, tmp_path / "run", **{key: trunk}))


def test_a_run_without_checkpoints_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        train(tiny("full", corpus, tmp_path / "empty"), kill_at("start", 0))
    with pytest.raises(ConfigError, match="contains no checkpoint yet"):
        train(branch(tmp_path / "empty", tmp_path / "run", step=None))
