"""ReLoRA through the trainer: when things happen, kills near them, its ablation, bad settings."""

import itertools
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from byhand import zero_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import algebra
from support import Killed, kill_at, rows, tiny, train_state_at
from torch import nn

from peptrain.config import RunConfig, resolved
from peptrain.errors import ConfigError
from peptrain.eval.run import evaluate
from peptrain.methods.lora import LoRA, LoRALinear
from peptrain.methods.relora import ReLoRA
from peptrain.models.sites import reparametrized
from peptrain.optim.adamw import set_lr
from peptrain.optim.schedule import ScheduleConfig, build
from peptrain.rng import Rng
from peptrain.runs.checkpoint import Checkpoint, read
from peptrain.runs.directory import RunDir
from peptrain.testing import STEPS, differences, losses, newest, same
from peptrain.training.loop import resume, train

EACH = {"checkpoint_every": 1, "keep": 99}


def events(run: Path, name: str) -> dict[int, float]:
    """What metrics.jsonl says of the merges or resets: {step: how many so far}."""
    return {row["step"]: row[name] for row in rows(run) if name in row}


def zeros(run: Path) -> list[int]:
    """The completed steps after which a step at a learning rate of exactly 0 came."""
    return [row["step"] - 1 for row in rows(run) if row["lr"] == 0]


def counted(steps: list[int]) -> dict[int, float]:
    return dict(zip(steps, itertools.count(1), strict=False))


def at(run: Path, step: int) -> Checkpoint:
    return read(RunDir(run).checkpoints / f"step-{step:08d}")


# --- 6: the clocks

CLOCKS = [
    # warm start, merge every, reset every, rows of a micro-batch; merges, resets
    (0, 3, 3, 4, [3, 6], [3, 6]),
    (0, 2, 6, 1, [2, 4, 6], [6]),
    (3, 3, 3, 2, [6], [6]),
    (4, 3, 3, 1, [6], [6]),
    (3, 2, 4, 4, [4, 6], [4]),
    (4, 2, 0, 2, [6], []),
    (1, 0, 2, 4, [], [2, 4, 6]),
    (7, 2, 2, 4, [], []),
]


@pytest.mark.parametrize("warm, merge, reset, micro, merges, resets", CLOCKS)
def test_the_learning_rate_is_0_next_to_the_switch_and_to_each_reset(
    warm: int, merge: int, reset: int, micro: int, merges: list[int], resets: list[int],
    corpus: Path, tmp_path: Path,
) -> None:  # fmt: skip
    method = ReLoRA(
        rank=2, warm_start_steps=warm, merge_every=merge, reset_every=reset, restart_warmup=2
    )
    run = tmp_path / "run"
    train(tiny(method, corpus, run, train=EACH | {"micro_batch": micro}))
    assert [row["step"] for row in rows(run)] == list(range(1, STEPS + 1))
    assert events(run, "merges") == counted(merges)
    assert events(run, "resets") == counted(resets)
    assert zeros(run) == [warm] * (warm > 0) + resets
    # Not only noted: W moves at merges alone (not if B is 0 still), and clocks restart at resets.
    site, moved = "model.layers.1.mlp.down_proj", []
    for step in range(max(warm, 1) + 1, STEPS + 1):
        before, after = at(run, step - 1), at(run, step)
        if not same(before.model[f"{site}.weight"], after.model[f"{site}.weight"]):
            moved.append(step)
        assert (after.optimizer[f"{site}.B/step"].item() == 0) is (step in resets), step
        assert step not in merges or not after.model[f"{site}.B"].any(), step
    assert {*moved} <= {*merges} and moved[-1:] == merges[-1:]
    assert newest(run).phase == int(warm > 0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.data())
def test_merges_resets_and_restarts_never_drift_apart(steps: int, data: st.DataObject) -> None:
    warm = data.draw(st.integers(0, steps - 1))
    merge, reset = data.draw(st.integers(0, steps + 5)), data.draw(st.integers(0, steps + 5))
    method = ReLoRA(warm_start_steps=warm, merge_every=merge, reset_every=reset, restart_warmup=1)
    optimizer = torch.optim.AdamW([torch.zeros(1)])

    def due(every: int) -> list[int]:
        return [t for t in range(1, steps) if every and t % every == 0 and t > warm]

    rows = {t: method.after_step(nn.Module(), optimizer, t, Rng(0)) for t in range(1, steps)}
    assert {t: row["merges"] for t, row in rows.items() if "merges" in row} == counted(due(merge))
    assert {t: row["resets"] for t, row in rows.items() if "resets" in row} == counted(due(reset))
    constant = ScheduleConfig(kind="constant", warmup=0, decay=0, floor=1.0)
    multiplier = method.schedule(build(constant, steps))
    assert [t for t in range(steps) if multiplier(t) == 0] == [warm] * (warm > 0) + due(reset)
    lora = LoRA(warm_start_steps=warm, restart_warmup=1).schedule(build(constant, steps))
    assert [t for t in range(steps) if lora(t) == 0] == [warm] * (warm > 0)
    assert method.phases(steps) == ((warm,) if warm else ())


def test_a_fresh_schedule_warms_up_again_after_the_switch(corpus: Path, tmp_path: Path) -> None:
    method = ReLoRA(rank=2, warm_start_steps=3, warm_start_lr=1.0, warm_start_then="fresh",
                    merge_every=0, restart_warmup=0)  # fmt: skip
    schedule = {"kind": "linear", "warmup": 2, "floor": 0.0}
    train(tiny(method, corpus, tmp_path / "run", schedule=schedule, optim={"lr": 0.01}))
    rates = [row["lr"] for row in rows(tmp_path / "run")]
    assert rates == pytest.approx([0, 0.5, 1.0, 0, 0.005, 0.01, 0.02 / 3, 0.01 / 3])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(2, 60), st.data())
def test_a_warm_start_has_a_warm_up_of_its_own(steps: int, data: st.DataObject) -> None:
    """The start of one cosine, then the rest of another, or all of a shorter one."""
    warm = data.draw(st.integers(1, steps - 1))
    first = data.draw(st.none() | st.integers(0, warm))
    warmup = data.draw(st.integers(0, steps - warm - 1))
    for then in ("continue", "fresh"):
        method = LoRA(warm_start_steps=warm, warm_start_warmup=first, warm_start_then=then,
                      restart_warmup=0)  # fmt: skip
        method.phases(steps)
        config = ScheduleConfig(kind="cosine", warmup=warmup, decay=0, floor=0.1)
        found = method.schedule(build(config, steps))
        before = algebra.warmup_cosine(steps, warmup if first is None else first, 0.1)
        skipped = warm if then == "fresh" else 0
        after = algebra.warmup_cosine(steps - skipped, warmup, 0.1)
        wanted = [before(t) if t < warm else after(t - skipped) for t in range(steps)]
        assert [found(t) for t in range(steps)] == pytest.approx(wanted)


def test_nothing_happens_after_the_last_step(corpus: Path, tmp_path: Path) -> None:
    method = ReLoRA(rank=2, warm_start_steps=0, merge_every=4)
    train(tiny(method, corpus, tmp_path / "run", train={"steps": 8}))
    assert events(tmp_path / "run", "merges") == {4: 1} == events(tmp_path / "run", "resets")
    assert any(x.any() for n, x in newest(tmp_path / "run").model.items() if n.endswith(".B"))


# --- kills, and dropout that is the same after them

WILD = ReLoRA(rank=2, warm_start_steps=2, merge_every=2, reset_every=4, reset="random",
              reset_fraction=0.5, restart_warmup=1, train_scale=True, dropout=0.3)  # fmt: skip


def wild(corpus: Path, run: Path, **sections: Any) -> RunConfig[Any]:
    """The switch at 2, merges at 4 and 6, a partial reset at 4; dropout and accumulation."""
    train = EACH | {"micro_batch": 2} | sections.pop("train", {})
    optim = {"clip": 0.5, "weight_decay": 0.01}
    schedule = {"kind": "cosine", "warmup": 1}
    return tiny(sections.pop("method", WILD), corpus, run, schedule=schedule, optim=optim,
                train=train)  # fmt: skip


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("relora") / "whole"
    train(wild(corpus, run))
    return run


def test_a_run_killed_after_every_step_is_the_whole_one(
    whole: Path, corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Killed):
        train(wild(corpus, run), kill_at("checkpoint", 1))
    for step in range(2, STEPS):
        with pytest.raises(Killed):
            resume(run, kill_at("checkpoint", step))
    resume(run)
    for step in range(1, STEPS + 1):
        assert differences(at(run, step), at(whole, step)) == [], step
    assert losses(run) == losses(whole)
    for name in ("merges", "resets"):
        assert events(run, name) == events(whole, name) != {}


@pytest.mark.parametrize("step", [2, 3, 4, 6])
def test_a_kill_before_the_checkpoint_of_an_event_repeats_it(
    step: int, whole: Path, corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.raises(Killed):
        train(wild(corpus, run), kill_at("step", step))
    assert newest(run).step == step - 1
    resume(run)
    assert differences(newest(run), newest(whole)) == []


def test_after_a_merge_and_a_resume_a_step_without_gradients_leaves_b_at_0(
    corpus: Path, tmp_path: Path
) -> None:
    method = ReLoRA(rank=2, warm_start_steps=2, merge_every=2)
    train(tiny(method, corpus, tmp_path / "run", train=EACH))
    for step, still in ((4, True), (5, False)):
        train_state = train_state_at(tmp_path / "run", step, tmp_path / f"at {step}")
        zero_gradients(train_state.model)
        set_lr(train_state.optimizer, 1.0)
        before = {n: p.detach().clone() for n, p in train_state.model.named_parameters()}
        train_state.optimizer.step()
        for layer in reparametrized(train_state.model):
            assert isinstance(layer, LoRALinear)
            assert torch.equal(layer.B, before[f"{layer.site}.B"]) is still
            assert still is not bool(layer.B.any())


def test_the_switch_keeps_the_moments_of_what_trains_on_and_drops_those_of_w(
    whole: Path, corpus: Path, tmp_path: Path
) -> None:
    saved, train_state = at(whole, 2), train_state_at(whole, 2, tmp_path / "run")
    assert (saved.phase, train_state.phase, train_state.end) == (0, 1, STEPS)
    names = {p: n for n, p in train_state.model.named_parameters()}
    held = {
        f"{names[p]}/{k}": v for p, s in train_state.optimizer.state.items() for k, v in s.items()
    }
    rest = {k for k in saved.optimizer if "_proj." not in k}
    assert held.keys() == rest and len(rest) == 3 * (2 + 2 * 2 + 1)
    assert all(same(held[k], saved.optimizer[k]) for k in rest)
    in_groups = {id(p) for g in train_state.optimizer.param_groups for p in g["params"]}
    for layer in reparametrized(train_state.model):
        assert same(layer.weight.detach(), saved.model[f"{layer.site}.weight"])
        assert id(layer.weight) not in in_groups and id(layer.A) in in_groups
    fresh = ReLoRA(rank=2, warm_start_steps=2, warm_start_then="fresh")
    train(tiny(fresh, corpus, tmp_path / "fresh", train=EACH))
    assert not train_state_at(tmp_path / "fresh", 2, tmp_path / "copy").optimizer.state


def test_dropout_is_a_function_of_the_seed_and_evaluation_has_none(
    whole: Path, corpus: Path, tmp_path: Path
) -> None:
    """Nor do evaluations on the way change the training."""
    often = {"eval_every": 1, "eval_tokens": 64}
    train(wild(corpus, tmp_path / "again", train=often))
    assert differences(newest(tmp_path / "again"), newest(whole)) == []
    assert losses(tmp_path / "again") == losses(whole)
    train(wild(corpus, tmp_path / "other", train={"seed": 1}))
    assert losses(tmp_path / "other") != losses(whole)
    (end,) = rows(whole, "end")
    assert evaluate(whole).loss == pytest.approx(end["held_out_loss"], abs=1e-6)


def test_dropout_begins_with_the_adapters_and_changes_the_training(
    whole: Path, corpus: Path, tmp_path: Path
) -> None:
    values = {f.name: getattr(WILD, f.name) for f in fields(WILD)}
    train(wild(corpus, tmp_path / "dry", method=ReLoRA(**values | {"dropout": 0.0})))
    dry, wet = losses(tmp_path / "dry"), losses(whole)
    assert dry[:3] == wet[:3]  # B is 0 in the first step of the adapters
    assert all(a != b for a, b in zip(dry[4:], wet[4:], strict=True))


def test_recomputed_activations_have_the_same_dropout(
    whole: Path, corpus: Path, tmp_path: Path
) -> None:
    train(wild(corpus, tmp_path / "run", train={"checkpoint_activations": True}))
    for (_, one), (_, other) in zip(losses(tmp_path / "run"), losses(whole), strict=True):
        assert one == pytest.approx(other, abs=1e-10)


# --- ReLoRA's ablation (restarts, resets, the jagged schedule, the warm start) as settings


@pytest.mark.parametrize(
    "restarts, reset, jagged, warm", [*itertools.product(*[(False, True)] * 4)]
)
def test_the_ablation_of_relora_is_settings(
    restarts: bool, reset: bool, jagged: bool, warm: bool, corpus: Path, tmp_path: Path
) -> None:
    method = ReLoRA(
        rank=2,
        merge_every=3 if restarts else 0,
        reset_every=3,
        reset="zero" if reset else "keep",
        restart_warmup=2 if jagged else 0,
        warm_start_steps=2 if warm else 0,
    )
    run = tmp_path / "run"
    train(tiny(method, corpus, run, train={"checkpoint_every": 0}))
    assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))
    assert events(run, "merges") == ({3: 1, 6: 2} if restarts else {})
    assert events(run, "resets") == ({3: 1, 6: 2} if reset else {})
    assert zeros(run) == ([2] * warm + [3, 6] if jagged else [])
    end = newest(run)
    clocks = {v.item() for n, v in end.optimizer.items() if n.endswith((".A/step", ".B/step"))}
    assert clocks == {2 if reset else STEPS - 2 * warm}
    assert end.phase == warm


# --- bad settings


BAD = [
    ({"alpha": 0.0}, "alpha"),
    ({"alpha": -1.0}, "alpha"),
    ({"alpha": float("nan")}, "alpha"),
    ({"dropout": 1.0}, "dropout"),
    ({"dropout": -0.1}, "dropout"),
    ({"rank": 0}, "rank"),
    ({"rank": -2}, "rank"),
    ({"warm_start_steps": -1}, "warm_start_steps"),
    ({"warm_start_lr": -1e-3}, "warm_start_lr"),
    ({"warm_start_warmup": -1}, "warm_start_warmup"),
    ({"restart_warmup": -1}, "restart_warmup"),
    ({"merge_every": -1}, "merge_every"),
    ({"reset_every": -1}, "reset_every"),
    ({"reset_fraction": -0.01}, "reset_fraction"),
    ({"reset_fraction": 1.01}, "reset_fraction"),
]


@pytest.mark.parametrize("given, key", BAD)
def test_impossible_settings_are_named(given: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^method\.{key}: must be .*got {given[key]}\)"):
        ReLoRA(**given)
    if key in {f.name for f in fields(LoRA)}:
        with pytest.raises(ConfigError, match=rf"^method\.{key}: "):
            LoRA(**given)


def test_a_warm_up_longer_than_the_warm_start_is_refused() -> None:
    LoRA(warm_start_steps=3, warm_start_warmup=3).phases(STEPS)
    LoRA(warm_start_steps=0, warm_start_warmup=3).phases(STEPS)  # no warm start, as with its rate
    with pytest.raises(ConfigError, match=r"warm_start_warmup: must be at most .* = 3 \(got 4"):
        LoRA(warm_start_steps=3, warm_start_warmup=4).phases(STEPS)


@pytest.mark.parametrize("cls", [LoRA, ReLoRA])
@pytest.mark.parametrize("warm", [STEPS, STEPS + 1, 10_000])
def test_a_warm_start_as_long_as_the_run_is_refused_before_anything_is_written(
    cls: type[LoRA], warm: int, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"warm_start_steps: must .* = {STEPS} \(got {warm}"):
        train(tiny(cls(rank=2, warm_start_steps=warm), corpus, tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_a_rank_too_large_is_refused_at_the_start_and_not_at_the_switch(
    corpus: Path, tmp_path: Path
) -> None:
    wrong = {"rank: rank 60 saves": {"rank": 60}, "targets: must": {"rank": 2, "targets": "x"}}
    for message, values in wrong.items():
        with pytest.raises(ConfigError, match=rf"^method\.{message}"):
            train(tiny(ReLoRA(warm_start_steps=4, **values), corpus, tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


def test_a_fresh_schedule_that_does_not_fit_is_refused_at_the_start(
    corpus: Path, tmp_path: Path
) -> None:
    method = ReLoRA(rank=2, warm_start_steps=5, warm_start_then="fresh")
    with pytest.raises(ConfigError, match=r"schedule\.warmup: must .*got 4"):
        train(tiny(method, corpus, tmp_path / "run", schedule={"warmup": 4}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["merge_every", "reset_every", "restart_warmup"])
def test_an_interval_longer_than_the_run_is_a_warning(
    key: str, caplog: pytest.LogCaptureFixture
) -> None:
    method = ReLoRA(**{"warm_start_steps": 0, "merge_every": 2, key: STEPS + 1})
    with caplog.at_level("WARNING", "peptrain"):
        resolved(tiny(method, Path()), world_size=1, on_gpu=False)
    assert [r.message for r in caplog.records] == [
        f"method.{key}: {STEPS + 1} is longer than the run of {STEPS} steps"
    ]


def test_resets_come_with_the_merges_unless_told_otherwise() -> None:
    def made(**given: Any) -> ReLoRA:
        return resolved(tiny(ReLoRA(**given), Path()), world_size=1, on_gpu=False).method

    assert made(merge_every=3).reset_every == 3 and made(merge_every=0).reset_every == 0
    assert made(merge_every=3, reset_every=6).reset_every == 6
    assert made().warm_start_steps == STEPS // 4 and made().rank == 4
