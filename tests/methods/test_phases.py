"""A method in phases: the model is rebuilt from its dense weights, and training goes on.

support.Toy is such a method: full training, then W + B A with W frozen.
"""

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from support import AddedLinear, Killed, Toy, kill_at, rows, tiny, train_state_at

import peptrain.methods
from peptrain.config import load
from peptrain.errors import ConfigError
from peptrain.methods import METHODS, Full
from peptrain.models.sites import reparametrized
from peptrain.runs.build import phase_at, rebuild
from peptrain.runs.checkpoint import Checkpoint, read
from peptrain.runs.directory import RunDir
from peptrain.testing import STEPS, differences, losses, newest, same
from peptrain.training.loop import resume, train

WARM = 4
KEPT = {"checkpoint_every": 1, "keep": 99}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, Toy.name, Toy)


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 4 steps and 4, with a checkpoint of every step."""
    run = tmp_path_factory.mktemp("phases") / "whole"
    train(tiny(Toy(rank=2, warm=WARM), corpus, run, train=KEPT))
    return run


def at(run: Path, step: int) -> Checkpoint:
    return read(RunDir(run).checkpoints / f"step-{step:08d}")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(48).view(3, 16)).logits


def test_the_function_is_unchanged_at_the_boundary(whole: Path) -> None:
    config, saved = load(RunDir(whole).config_file), at(whole, WARM)
    assert saved.phase == 0 and at(whole, WARM + 1).phase == 1
    before, after = (rebuild(config, saved, phase) for phase in (0, 1))
    assert not list(reparametrized(before)) and len(list(reparametrized(after))) == 14
    torch.testing.assert_close(logits(after), logits(before), rtol=0, atol=1e-12)


def test_going_back_to_dense_weights_keeps_the_function(whole: Path) -> None:
    config, saved = load(RunDir(whole).config_file), at(whole, STEPS)
    before, after = (rebuild(config, saved, phase) for phase in (1, 2))
    assert not list(reparametrized(after))
    # 1e-7 is what Hugging Face's norms lose by computing in fp32.
    torch.testing.assert_close(logits(after), logits(before), rtol=0, atol=1e-6)


def test_moments_and_clocks_stay_with_the_parameters_that_keep_their_name(
    whole: Path, tmp_path: Path
) -> None:
    train_state, saved = train_state_at(whole, WARM, tmp_path / "run"), at(whole, WARM)
    assert (train_state.phase, train_state.step, train_state.end) == (1, WARM, STEPS)
    model, state = train_state.model, train_state.optimizer.state
    stay = {n: p for n, p in model.named_parameters() if n in saved.model and p.requires_grad}
    assert {n.split(".")[-2] for n in stay} == {
        "embed_tokens", "input_layernorm", "post_attention_layernorm", "norm", "lm_head"
    }  # fmt: skip
    for n, p in stay.items():
        assert state[p]["step"].item() == WARM
        assert all(same(state[p][k], saved.optimizer[f"{n}/{k}"]) for k in state[p])
        assert state[p]["exp_avg"].any() and state[p]["exp_avg_sq"].any()
    assert set(state) == set(stay.values())


def test_what_the_new_phase_freezes_leaves_the_optimizer(whole: Path, tmp_path: Path) -> None:
    train_state = train_state_at(whole, WARM, tmp_path / "run")
    held = {id(p) for group in train_state.optimizer.param_groups for p in group["params"]}
    layers = list(reparametrized(train_state.model))
    for layer in layers:
        assert isinstance(layer, AddedLinear)
        assert id(layer.weight) not in held and not layer.weight.requires_grad
        assert id(layer.A) in held and id(layer.B) in held
    assert held == {id(p) for p in train_state.model.parameters() if p.requires_grad}
    frozen = [f"{layer.site}.weight" for layer in layers]
    boundary, end = at(whole, WARM).model, at(whole, STEPS).model
    assert all(same(end[n], boundary[n]) for n in frozen)
    assert any(not same(end[n], boundary[n]) for n in end.keys() & boundary.keys())


def test_the_record_runs_through_the_boundary(whole: Path, corpus: Path, tmp_path: Path) -> None:
    train(tiny(Full(), corpus, tmp_path / "full", optim={"lr": 1e-3}))
    full, toy = losses(tmp_path / "full"), losses(whole)
    assert [step for step, _ in toy] == list(range(1, STEPS + 1))
    # The loss of the first step after the boundary is that of the weights before it.
    for (_, one), (_, other) in zip(full[: WARM + 1], toy[: WARM + 1], strict=True):
        assert one == pytest.approx(other, abs=1e-12)
    assert full[WARM + 1 :] != toy[WARM + 1 :]
    assert [row["tokens"] for row in rows(whole)] == [64 * n for n in range(1, STEPS + 1)]


def test_after_step_is_called_between_steps_only(whole: Path) -> None:
    called = [row["step"] for row in rows(whole) if "after_step" in row]
    assert called == [step for step in range(1, STEPS) if step != WARM]


class Reporting(Toy):
    only_reports = True


def test_an_after_step_that_only_reports_is_called_at_every_step(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, Toy.name, Reporting)
    train(tiny(Reporting(rank=2, warm=WARM), corpus, tmp_path / "run"))
    called = [row["step"] for row in rows(tmp_path / "run") if "after_step" in row]
    assert called == list(range(1, STEPS + 1))


def test_an_evaluation_that_is_due_at_the_boundary_takes_place(
    corpus: Path, tmp_path: Path
) -> None:
    often = {"eval_every": 2, "eval_tokens": 64}
    train(tiny(Toy(rank=2, warm=WARM), corpus, tmp_path / "run", train=often))
    assert [row["step"] for row in rows(tmp_path / "run", "eval")] == [2, 4, 6]


def test_a_checkpoint_lies_at_the_boundary_whatever_the_interval(
    corpus: Path, tmp_path: Path
) -> None:
    never = {"checkpoint_every": 0, "keep": 9}
    train(tiny(Toy(rank=2, warm=3), corpus, tmp_path / "run", train=never))
    assert [row["step"] for row in rows(tmp_path / "run", "checkpoint")] == [3, STEPS]


@pytest.mark.parametrize("event", ["step", "checkpoint"])
@pytest.mark.parametrize("step", [WARM - 1, WARM, WARM + 1])
def test_a_kill_near_the_boundary_costs_nothing(
    event: str, step: int, whole: Path, corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Killed):
        train(tiny(Toy(rank=2, warm=WARM), corpus, run, train=KEPT), kill_at(event, step))
    assert newest(run).step == step - (event == "step")
    resume(run)
    for n in range(1, STEPS + 1):
        assert differences(at(run, n), at(whole, n)) == []
    assert losses(run) == losses(whole)


@pytest.mark.parametrize("step", [1, 2, 4, 5])
def test_three_phases_and_a_kill_in_any_of_them(step: int, corpus: Path, tmp_path: Path) -> None:
    toy, runs = Toy(rank=2, warm=2, cool=5), [tmp_path / "whole", tmp_path / "killed"]
    train(tiny(toy, corpus, runs[0], train=KEPT))
    with pytest.raises(Killed):
        train(tiny(toy, corpus, runs[1], train=KEPT), kill_at("checkpoint", step))
    resume(runs[1])
    assert differences(*(newest(run) for run in runs)) == []
    end = newest(runs[0])
    assert end.phase == 2 and not any(n.endswith((".A", ".B")) for n in end.model)
    clocks = {n: v.item() for n, v in end.optimizer.items() if n.endswith("/step")}
    kept = {n for n in clocks if "embed" in n or "norm" in n or "lm_head" in n}
    assert all(clocks[n] == (STEPS if n in kept else STEPS - 5) for n in clocks)


@pytest.mark.parametrize("warm, phases", [(0, {1}), (STEPS, {0}), (STEPS + 5, {0})])
def test_a_boundary_at_an_end_of_the_run_or_past_it(
    warm: int, phases: set[int], corpus: Path, tmp_path: Path
) -> None:
    config = tiny(Toy(rank=2, warm=warm), corpus, tmp_path / "run", train=KEPT)
    assert {phase_at(config, step)[0] for step in range(STEPS)} == phases
    train(config)
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, STEPS + 1))
    assert {at(tmp_path / "run", n).phase for n in range(1, STEPS + 1)} == phases
    before = newest(tmp_path / "run")
    resume(tmp_path / "run")
    assert differences(newest(tmp_path / "run"), before) == []


def test_a_method_of_ones_own_trains_unregistered_and_resumes_registered(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(METHODS, Toy.name)
    run = tmp_path / "run"
    with pytest.raises(Killed):
        train(tiny(Toy(rank=2), corpus, run, train=KEPT), kill_at("checkpoint", 2))
    with pytest.raises(ConfigError, match=r"method\.name: unknown method 'toy'"):
        resume(run)
    with pytest.raises(ConfigError, match=r"set peptrain\.METHODS\[name\] to its class"):
        resume(run)
    entry = EntryPoint(Toy.name, "support:Toy", "peptrain.methods")
    monkeypatch.setattr(peptrain.methods, "entry_points", lambda group: [entry])
    assert resume(run).run == run and newest(run).step == STEPS


def test_the_record_says_what_trains_in_each_phase(
    whole: Path, corpus: Path, tmp_path: Path
) -> None:
    (row,) = rows(whole, "phase")
    assert (row["step"], row["phase"]) == (WARM, 1)
    assert 0 < row["trainable"] < row["parameters"]
    result = train(tiny(Toy(rank=2, warm=WARM), corpus, tmp_path / "run"))
    full = train(tiny(Full(), corpus, tmp_path / "full"))
    assert result.trainable == row["trainable"] < full.trainable
    assert result.state_bytes == full.state_bytes, "the warm start's moments are the most"
