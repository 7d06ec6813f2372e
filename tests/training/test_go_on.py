"""`peptrain train ... --run R --go-on`: the same command starts a run and continues it."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ALONE, Killed, kill_at, rows, tiny, untimed

from peptrain.cli.app import main
from peptrain.config import resolved
from peptrain.distributed.world import World
from peptrain.errors import CheckpointError, ConfigError
from peptrain.methods.bpt import BPT
from peptrain.optim.schedule import ScheduleConfig
from peptrain.testing import STEPS, differences, newest
from peptrain.training.go_on import begun
from peptrain.training.loop import resume, train
from peptrain.training.signals import Agreement, Stop

KEPT = {"checkpoint_every": 2}


@pytest.fixture
def killed(corpus: Path, tmp_path: Path) -> Any:
    """The configuration of a run that was killed after its checkpoint of step 4."""
    config = tiny("bpt", corpus, tmp_path / "run", train=KEPT)
    with pytest.raises(Killed):
        train(config, kill_at("step", 5), go_on=True)
    return config


def test_the_same_call_starts_a_run_and_resumes_it(
    killed: Any, corpus: Path, tmp_path: Path
) -> None:
    seen: list[Any] = []
    train(killed, lambda row: seen.append(dict(row)), go_on=True)
    assert seen[0]["event"] == "start" and seen[0]["step"] == 4
    train(replace(killed, run=tmp_path / "whole"))
    assert differences(newest(killed.run), newest(tmp_path / "whole")) == []
    assert untimed(killed.run) == untimed(tmp_path / "whole")


def test_after_a_restart_it_is_implied(killed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="exists and is never overwritten"):
        train(killed)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with pytest.raises(CheckpointError, match="exists and is never overwritten"):
        train(killed)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train(killed).held_out.tokens > 0
    assert newest(killed.run).step == STEPS


def test_without_a_directory_a_restart_would_begin_again(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="run: --go-on needs --run; give"):
        train(tiny("full", corpus), go_on=True)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    with pytest.raises(ConfigError, match=r"run: a restart needs --run \(this is restart 2\)"):
        train(tiny("full", corpus))


@pytest.mark.parametrize(
    "differs, said",
    [
        ({"train": {"seed": 1}}, "train.seed: 1 here, but .* was started with 0; give the same"),
        ({"train": {"log_to": "tensorboard"}}, "train.log_to: 'tensorboard' here, .* with ''"),
        ({"optim": {"lr": 0.5}}, "optim.lr: 0.5 here, but .* was started with 0.002"),
        ({"train": {"steps": 12}}, "train.steps: 12 here, .*`, which takes --train.steps too$"),
        ({"schedule": {"kind": "linear"}}, "schedule.kind: 'linear' here, .* with 'constant'"),
        ({"model": {"layers": 1}}, "model.layers: 1 here, but .* was started with 2"),
    ],
)
def test_the_first_setting_that_differs_is_named(
    differs: dict[str, Any], said: str, killed: Any, corpus: Path
) -> None:
    sections = {"train": KEPT} | {k: {**KEPT, **v} if k == "train" else v
                                  for k, v in differs.items()}  # fmt: skip
    before = newest(killed.run)
    with pytest.raises(ConfigError, match=said) as refused:
        train(tiny("bpt", corpus, killed.run, **sections), go_on=True)
    assert f"`peptrain resume {killed.run}`" in str(refused.value)
    assert differences(newest(killed.run), before) == []


def test_another_method_and_another_corpus_are_named(
    killed: Any, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"^method.name: 'full' here, but .* with 'bpt'"):
        train(tiny("full", corpus, killed.run, train=KEPT), go_on=True)
    (elsewhere := tmp_path / "elsewhere").symlink_to(corpus.parent)
    train(replace(killed, data=replace(killed.data, path=elsewhere / corpus.name)), go_on=True)
    other = replace(killed, data=replace(killed.data, path=tmp_path))
    with pytest.raises(ConfigError, match=r"data.path: "):
        train(other, go_on=True)


def test_a_longer_run_is_compared_with_what_it_was_started_as(killed: Any) -> None:
    resume(killed.run, steps=12)
    resume(killed.run, steps=14, schedule=ScheduleConfig(kind="constant"))
    with pytest.raises(ConfigError, match=r"train.steps: 14 here, but .* was started with 8"):
        train(replace(killed, train=replace(killed.train, steps=14)), go_on=True)
    train(killed, go_on=True)
    assert rows(killed.run)[-1]["step"] == newest(killed.run).step == 14


def test_what_depends_on_the_machine_may_be_left_unset_on_another_one(
    corpus: Path, tmp_path: Path
) -> None:
    """Resolved for four ranks the micro-batch differs, and on a GPU the precision would."""
    config = tiny("full", corpus, tmp_path / "run", train={**KEPT, "precision": None})
    with pytest.raises(Killed):
        train(config, kill_at("step", 5), go_on=True)
    there = replace(config, train=replace(config.train, precision="bf16-mixed", micro_batch=1))
    wanted = resolved(there, world_size=4, on_gpu=True)
    assert begun(config, wanted, ALONE) is not None
    with pytest.raises(ConfigError, match=r"train.micro_batch: 1 here, but .* with 4"):
        begun(there, wanted, ALONE)


def test_a_setting_that_follows_from_another_one_is_not_named_for_it(
    corpus: Path, tmp_path: Path
) -> None:
    """The rank is a quarter of the hidden size."""
    config = tiny(BPT(merge_every=3), corpus, tmp_path / "run")
    train(config)
    wider = replace(config, model=replace(config.model, hidden_size=32))
    with pytest.raises(ConfigError, match=r"^model.hidden_size: 32 here, but .* with 16"):
        train(wider, go_on=True)


def test_a_finished_run_says_so(
    killed: Any, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(killed, go_on=True)
    config = killed.run / "config.toml"
    capsys.readouterr()
    assert main(["train", "--config", str(config), "--run", str(killed.run), "--go-on"]) == 0
    said = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert f"is finished at step {STEPS} of {STEPS}" in said
    assert main(["train", "--config", str(config), "--run", str(killed.run)]) == 1
    assert "exists and is never overwritten" in re.sub(r"\s+", " ", capsys.readouterr().err)


def test_several_processes_stop_after_the_step_that_follows_a_wish() -> None:
    """The second of two ranks is asked during step 3, another way later."""
    stops = [Stop(), Stop()]
    wishes: list[list[int]] = [[], []]

    class Two(World):
        def largest(self, value: int) -> Callable[[], int]:
            step = len(wishes[self.rank])
            wishes[self.rank].append(value)
            return lambda: max(wishes[0][step], wishes[1][step])

    each = [Agreement(stop, Two(n, 2, torch.device("cpu"))) for n, stop in enumerate(stops)]
    codes = []
    for step in range(1, 6):
        if step == 3:
            stops[1].code = 75
        codes.append([agreement.code() for agreement in each])
    assert codes == [[0, 0], [0, 0], [0, 0], [75, 75], [75, 75]]
