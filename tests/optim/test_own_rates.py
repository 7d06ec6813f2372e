"""Learning rates of their own for embeddings and head: groups, steps, rows, resumes, refusals."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import rows, tiny, tiny_method
from torch import nn
from torch.optim import Optimizer

from peptrain import testing
from peptrain.adaptation import adapt
from peptrain.comparison.grid import expand
from peptrain.config import RunConfig, load
from peptrain.errors import CheckpointError, ConfigError
from peptrain.estimation.estimate import estimate
from peptrain.methods import METHODS
from peptrain.methods.full import Full
from peptrain.methods.lora import LoRA
from peptrain.optim.adamw import OptimConfig, learning_rates, set_lr, state_bytes
from peptrain.testing import QWEN, Bench, bench, differences, newest
from peptrain.training.loop import resume, train

RATES: dict[str, Any] = {"embedding_lr": 5e-3, "head_lr": 2e-3}
EVERY = {"checkpoint_every": 2, "keep": 9}
every_method = pytest.mark.parametrize("name", METHODS)
one_rate = [n for n, cls in METHODS.items() if cls.optim_defaults.embedding_lr is None]
"""The methods without a default of their own for embeddings."""
every_optimizer = pytest.mark.parametrize(
    "name, kind",
    [(n, kind) for n in METHODS for kind in ("adamw", "sgd") if kind in METHODS[n].optim_kinds],
)


def rates(one: Bench) -> dict[str, float]:
    """The rate of every trained parameter, by name."""
    names = {p: name for name, p in one.model.named_parameters()}
    return {names[p]: g["lr"] for g in one.optimizer.param_groups for p in g["params"]}


@pytest.mark.slow
@every_method
@pytest.mark.parametrize("law", testing.LAWS, ids=lambda law: law.__name__)
def test_a_method_keeps_the_laws_with_rates_of_their_own(
    name: str, law: testing.Law, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tied = law is testing.the_dense_twin_has_the_same_logits  # one of its models has no own head
    given = RATES | ({"head_lr": None} if tied else {})
    monkeypatch.setattr(testing, "OptimConfig", partial(OptimConfig, **given))
    law(tiny_method(name), corpus)


@every_optimizer
def test_each_parameter_has_the_rate_of_its_kind(name: str, kind: str) -> None:
    optim = {"kind": kind, "lr": 1e-3, **RATES, "weight_decay": 0.1}
    one = bench(tiny_method(name), model=QWEN, optim=optim)
    found = rates(one)
    assert set(found) == {n for n, p in one.model.named_parameters() if p.requires_grad}
    for path, lr in found.items():
        small = path.endswith("bias") or "norm" in path or "embed" in path
        wanted = 5e-3 if small else 2e-3 if path.startswith("lm_head") else 1e-3
        assert lr == wanted, path
    decays = {g.get("name"): g["weight_decay"] for g in one.optimizer.param_groups}
    assert (decays["embedding"], decays["head"]) == (0.0, 0.1)


@pytest.mark.parametrize("name, kind", [*((n, "adamw") for n in one_rate), ("full", "sgd")])
def test_at_the_same_rates_every_step_is_the_one_without(name: str, kind: str) -> None:
    """LORO and GaLore step their matrices apart from the rest, which this takes part in."""
    optim = {"kind": kind, "lr": 1e-3, "weight_decay": 0.1}
    same = {"embedding_lr": 1e-3, "head_lr": 1e-3}
    one, other = (bench(tiny_method(name), optim=optim | more) for more in ({}, same))
    for each in (one, other):
        each.train(4)
    there = dict(other.model.named_parameters())
    assert all(torch.equal(p, there[n]) for n, p in one.model.named_parameters())


@every_method
def test_a_rate_of_0_leaves_its_parameters_alone_and_moves_the_others(name: str) -> None:
    one = bench(tiny_method(name), optim={"lr": 1e-3, "embedding_lr": 0.0, "head_lr": 1e-3})
    before = {n: p.clone() for n, p in one.model.named_parameters()}
    one.train(2)  # a merge at step 3 resets factors
    now = dict(one.model.named_parameters())
    for path, lr in rates(one).items():
        assert torch.equal(now[path], before[path]) == (lr == 0.0), path


@pytest.mark.parametrize("name", one_rate)
def test_without_them_the_groups_are_as_ever(name: str) -> None:
    one = bench(tiny_method(name))
    assert not [g for g in one.optimizer.param_groups if "name" in g]
    assert {g["lr"] for g in one.optimizer.param_groups} == {one.config.optim.lr}


def test_the_head_follows_the_embeddings_unless_it_has_a_rate() -> None:
    found = rates(bench(Full(), optim={"embedding_lr": 5e-3}))
    assert found["lm_head.weight"] == found["model.embed_tokens.weight"] == 5e-3
    found = rates(bench(Full(), optim={"head_lr": 2e-3}))
    assert (found["lm_head.weight"], found["model.embed_tokens.weight"]) == (2e-3, 1e-3)


def test_a_tied_head_has_the_embeddings_rate_and_no_other() -> None:
    tied = {"tied": True}
    assert rates(bench(Full(), model=tied, optim={"embedding_lr": 5e-3}))[
        "model.embed_tokens.weight"
    ] == pytest.approx(5e-3)
    with pytest.raises(ConfigError) as refused:
        bench(Full(), model=tied, optim={"head_lr": 5e-3})
    assert str(refused.value) == (
        "optim.head_lr: must be unset where the head is tied to the embeddings, which have"
        " optim.embedding_lr (got 0.005)"
    )


def test_a_rate_without_parameters_is_refused_before_anything_is_written(
    corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    frozen = {"train": "norm", "warm_start_steps": 0}
    with pytest.raises(ConfigError) as refused:
        train(tiny(tiny_method("lora", **frozen), corpus, run, optim={"head_lr": 5e-3}))
    said = "optim.head_lr: must be unset, as no head is trained in a group of its own (got 0.005)"
    assert str(refused.value) == said and not run.exists()
    train(tiny(tiny_method("lora", **frozen), corpus, run, optim={"embedding_lr": 5e-3}))
    assert rows(run)[0]["lr_embedding"] == 5e-3  # the norms


def test_a_rate_of_embeddings_that_are_frozen_is_refused_unless_it_is_the_methods_own(
    corpus: Path, tmp_path: Path
) -> None:
    """spectron has one by default, which a user who freezes embeddings has not asked for."""
    frozen, run = tiny_method("spectron", train_rest=False), tmp_path / "run"
    with pytest.raises(ConfigError, match=r"^optim\.embedding_lr: must be unset, as no embedding"):
        train(tiny(frozen, corpus, run, optim={"embedding_lr": 1e-3}))
    assert not run.exists()
    train(tiny(frozen, corpus, run))
    assert "lr_embedding" not in rows(run)[0]


@pytest.mark.parametrize("key", RATES)
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^optim\.{key}: must be a finite number >= 0"):
        OptimConfig(**{key: value})


def test_schedules_multiply_each_rate_and_a_warm_start_has_them_too(
    corpus: Path, tmp_path: Path
) -> None:
    """method.warm_start_lr replaces optim.lr, whose group it names."""
    optim = {"lr": 1e-2, **RATES}
    ramp = {"kind": "constant", "warmup": 4}
    method = LoRA(rank=2, warm_start_steps=4, warm_start_lr=4e-3, restart_warmup=0)
    train(tiny(method, corpus, tmp_path / "run", optim=optim, schedule=ramp))
    found = [(r["lr"], r["lr_embedding"], r["lr_head"]) for r in rows(tmp_path / "run")]
    for step, row in enumerate(found):
        m = min(step / 4, 1.0)
        assert row == pytest.approx((m * (4e-3 if step < 4 else 1e-2), m * 5e-3, m * 2e-3))


@pytest.mark.parametrize("name", ["full", "loro", "galore"])
def test_lr_in_a_row_is_that_of_the_matrices(name: str) -> None:
    one = bench(tiny_method(name), optim={"lr": 1e-3, **RATES})
    set_lr(one.optimizer, 0.5)
    wanted = {"lr": 5e-4, "lr_embedding": 2.5e-3, "lr_head": 1e-3}
    assert learning_rates(one.optimizer) == pytest.approx(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "loro"])
def test_the_estimate_has_the_same_bytes(name: str, corpus: Path) -> None:
    method, here = tiny_method(name), {"device": "cpu"}
    sizes = [
        [phase.state_bytes for phase in estimate(tiny(method, corpus, optim=o, train=here)).phases]
        for o in ({}, RATES)
    ]
    assert sizes[0] == sizes[1]
    found = bench(method, model={}, optim=RATES)
    found.train()
    assert sizes[1][-1] == state_bytes(found.optimizer)


def test_a_grid_varies_them_and_labels_say_so() -> None:
    block = {"method.name": "full", "optim.embedding_lr": [1e-3, 5e-3], "train.steps": 4}
    found = expand({"grid": [block]}).runs
    assert [run.config.optim.embedding_lr for run in found] == [1e-3, 5e-3]
    assert [dict(run.settings)["optim.embedding_lr"] for run in found] == [1e-3, 5e-3]


# --- resumes and branches


@pytest.fixture(scope="module")
def trunks(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of full with each of the rates, and with none."""
    folder, found = tmp_path_factory.mktemp("trunks"), {}
    for name, optim in {"none": {}, "embedding_lr": {"embedding_lr": 5e-3}, "both": RATES}.items():
        found[name] = folder / name
        train(tiny("full", corpus, found[name], optim=optim, train=EVERY))
    return found


def branch(trunk: Path, run: Path, **optim: Any) -> RunConfig[Any]:
    config = load(trunk / "config.toml")
    changed = replace(config.optim, **optim)
    return replace(config, continue_from=Path(f"{trunk}@4"), run=run, optim=changed)


@pytest.mark.parametrize(
    "trunk, key, value, then",
    [
        ("none", "embedding_lr", 1e-3, None),
        ("none", "head_lr", 1e-3, None),
        ("embedding_lr", "head_lr", 1e-3, None),
        ("both", "head_lr", None, 2e-3),
        ("both", "embedding_lr", None, 5e-3),
    ],
)
def test_a_branch_may_not_set_or_unset_one(
    trunk: str, key: str, value: Any, then: Any, trunks: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as refused:
        train(branch(trunks[trunk], tmp_path / "run", **{key: value}))
    said = f"optim.{key}: the checkpoint of step 4 was written with {then!r}, but the configuration"
    assert str(refused.value).startswith(f"{said} has {value!r}; its value may change")
    assert "--init-from" in str(refused.value) and not (tmp_path / "run").exists()


def test_a_branch_may_change_their_values(trunks: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(branch(trunks["both"], run, embedding_lr=1e-3, head_lr=4e-3))
    assert {(r["lr_embedding"], r["lr_head"]) for r in rows(run)} == {(1e-3, 4e-3)}
    train(branch(trunks["both"], tmp_path / "same"))
    assert differences(newest(tmp_path / "same"), newest(trunks["both"])) == []


def edited(run: Path, old: str, new: str) -> None:
    text = (run / "config.toml").read_text()
    assert old in text
    (run / "config.toml").write_text(text.replace(old, new))


def test_an_edited_config_is_refused_with_the_repair_that_works(
    corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(tiny("full", corpus, run, optim={"embedding_lr": 5e-3}))
    edited(run, "embedding_lr = 0.005", "embedding_lr = 0.001")
    changed = r"optim\.embedding_lr: .* 0\.005, .* 0\.001; .*--optim\.embedding-lr 0\.001"
    with pytest.raises(CheckpointError, match=changed):
        resume(run)
    edited(run, "embedding_lr = 0.001\n", "")
    removed = r"optim\.embedding_lr: .* 0\.005, .* None; .*restore"
    with pytest.raises(CheckpointError, match=removed):
        resume(run)


def test_a_checkpoint_without_the_setting_is_one_of_a_run_without_it(
    trunks: dict[str, Path], tmp_path: Path
) -> None:
    """It has the groups and the identity of versions that did not know the rates."""
    saved = newest(trunks["none"])
    assert len(saved.groups) == 2
    assert not [key for key in saved.identity if "embedding" in key or "head_lr" in key]


# --- without our trainer


def test_adapt_has_them_and_a_state_of_other_groups_is_refused() -> None:
    def made(**optim: float) -> Any:
        torch.manual_seed(0)
        model = nn.ModuleDict({"embedding": nn.Embedding(8, 6), "mlp": nn.Linear(6, 6)})
        optimizer = OptimConfig(lr=1e-3, **optim)
        return adapt(nn.Sequential(model), Full(), steps=4, optim=optimizer)

    one, other = made(embedding_lr=5e-3), made()
    for p in one.model.parameters():
        p.grad = torch.ones_like(p)
    assert one.step()["lr_embedding"] == 5e-3
    made(embedding_lr=1e-3).load_state_dict(one.state_dict())
    with pytest.raises(ConfigError, match=r"optim\.embedding_lr and optim\.head_lr"):
        other.load_state_dict(one.state_dict())


def test_an_optimizer_of_another_package_that_ignores_them_is_refused(
    corpus: Path, tmp_path: Path
) -> None:
    class Ignores(Full):
        def optimizer(self, model: Any, sites: Any, optim: OptimConfig, phase: int) -> Optimizer:
            return torch.optim.SGD(model.parameters(), optim.lr or 0)

    with pytest.raises(ConfigError, match=r"optim\.embedding_lr: must be unset, as no embedding"):
        train(tiny(Ignores(), corpus, tmp_path / "run", optim={"embedding_lr": 1e-3}))
