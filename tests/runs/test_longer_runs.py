"""What may change when a run goes on, and what a run is told that will not do what it seems to."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import Killed, kill_at, rows, tiny, tiny_method

from peptrain.config import load, resolved
from peptrain.errors import CheckpointError, ConfigError
from peptrain.methods import METHODS, LoRA, ReLoRA
from peptrain.methods.targets import TargetedMethod
from peptrain.models.hf import ModelConfig
from peptrain.runs.directory import RunDir
from peptrain.testing import EVENT, STEPS, differences, newest
from peptrain.training.init_from import initial_weights, with_inherited_model
from peptrain.training.loop import resume, train

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
    """What is due between two steps is made up for, where the run had ended."""
    method = tiny_method(name)
    if isinstance(method, LoRA):
        method = replace(method, restart_warmup=2)
    for run, steps in (("longer", STEPS), ("extended", MERGES_LAST)):
        train(tiny(method, corpus, tmp_path / run, train={"steps": steps}))
    edit(tmp_path / "extended", f"\nsteps = {MERGES_LAST}\n", f"\nsteps = {STEPS}\n")
    resume(tmp_path / "extended")
    assert differences(newest(tmp_path / "extended"), newest(tmp_path / "longer")) == []


@pytest.mark.parametrize("key", ["warm_start_lr", "restart_warmup"])
def test_rates_and_warmups_of_a_method_may_change(key: str, corpus: Path, tmp_path: Path) -> None:
    """A run that diverged in its warm start can be helped."""
    method = ReLoRA(rank=2, warm_start_steps=4, warm_start_lr=0.125, restart_warmup=1)
    with pytest.raises(Killed):
        train(tiny(method, corpus, tmp_path / "run", train={"checkpoint_every": 1}),
              kill_at("checkpoint", 2))  # fmt: skip
    values = {"warm_start_lr": ("0.125", "0.0625"), "restart_warmup": ("1", "2")}
    edit(tmp_path / "run", *(f"{key} = {value}\n" for value in values[key]))
    resume(tmp_path / "run")
    lrs = {row["step"]: row["lr"] for row in rows(tmp_path / "run")}
    assert lrs[2] == 0.125 and lrs[3] == (0.0625 if key == "warm_start_lr" else 0.125)
    assert lrs[5] == 0 and (lrs[6] == 2e-3) == (key == "restart_warmup")


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
