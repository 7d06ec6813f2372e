"""Muon with every method: the dense matrices that it trains, and AdamW on what its layers train."""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support import rows, tiny, tiny_method
from torch import nn

from peptrain import testing
from peptrain.adaptation import adapt
from peptrain.errors import ConfigError
from peptrain.estimation.estimate import estimate
from peptrain.methods import METHODS
from peptrain.methods.base import Method
from peptrain.methods.lora import LoRA
from peptrain.methods.lowrank import LowRank
from peptrain.methods.relora import ReLoRA
from peptrain.models.sites import ReparamLinear, reparametrized
from peptrain.optim.adamw import OptimConfig, adamw, learning_rates, state_bytes
from peptrain.optim.muon import MuonOptimizer
from peptrain.runs.checkpoint import available, read
from peptrain.testing import STEPS, Bench, bench, close
from peptrain.training.loop import train

MUON = {"kind": "muon"}
DENSE = "up"
"""Left dense, in every method."""
MUONS = [name for name in METHODS if "muon" in METHODS[name].optim_kinds]
ADAPTING = [name for name in MUONS if name != "full"]
BY_ADAMW = [name for name in ADAPTING if name != "cola"]
"""Methods whose layers have what only AdamW moves: factors of a W, diagonals."""
adapting = pytest.mark.parametrize("name", ADAPTING)
by_adamw = pytest.mark.parametrize("name", BY_ADAMW)
WARM = STEPS // 2


def partly(name: str, **given: Any) -> Method:
    """The method at small settings, with some matrices left dense."""
    return tiny_method(name, **({} if name == "full" else {"exclude": DENSE}), **given)


def by_muon(one: Bench) -> dict[str, tuple[bool, float]]:
    """Whether Muon moves a trained parameter, and its rate, by name."""
    names = {p: name for name, p in one.model.named_parameters()}
    groups = one.optimizer.param_groups
    return {names[p]: (g["matrices"], g["lr"]) for g in groups for p in g["params"]}


def test_only_methods_with_an_optimizer_of_their_own_have_no_muon() -> None:
    assert set(METHODS) - set(MUONS) == {"loro", "galore", "spectron"}

    class Own(LowRank):
        """It says nothing of muon, so it need not have it."""

        name = "own"

        def optimizer(self, model: Any, sites: Any, optim: OptimConfig, phase: int) -> Any:
            return adamw(model, optim)

    class Heir(Own):
        name = "heir"

    assert Own.optim_kinds == Heir.optim_kinds == ("adamw",)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUONS)
@pytest.mark.parametrize("law", testing.LAWS, ids=lambda law: law.__name__)
def test_a_method_keeps_the_laws_with_muon(
    name: str, law: testing.Law, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(testing, "OptimConfig", partial(OptimConfig, **MUON))
    monkeypatch.setattr(METHODS[name], "optim_kinds", ("muon",))
    law(partly(name), corpus)


@by_adamw
def test_dense_matrices_are_muons_and_what_the_layers_train_is_adamws(name: str) -> None:
    optim = MUON | {"head_lr": 2e-3, "weight_decay": 0.1}
    one = bench(partly(name), optim=optim)
    found = by_muon(one)
    assert set(found) == {n for n, p in one.model.named_parameters() if p.requires_grad}
    for path, given in found.items():
        dense = path.endswith("up_proj.weight")
        rate = 1e-2 if dense else 2e-3 if path.startswith("lm_head") else 5e-3
        assert given == (dense, rate), path
    assert sum(dense for dense, _ in found.values()) == 2
    assert learning_rates(one.optimizer) == {"lr": 1e-2, "lr_embedding": 5e-3, "lr_head": 2e-3}
    plain = bench(partly(name), optim={"weight_decay": 0.1})
    assert decaying(one) == decaying(plain)


def decaying(one: Bench) -> set[str]:
    names = {p: name for name, p in one.model.named_parameters()}
    groups = one.optimizer.param_groups
    return {names[p] for g in groups for p in g["params"] if g["weight_decay"]}


@by_adamw
def test_what_the_layers_train_moves_as_by_adamw(name: str) -> None:
    """With the matrices at rest and one rate for all else, through a merge and a reset."""
    rest = {"lr": 0.0, "embedding_lr": 1e-2}
    one = bench(partly(name), optim=MUON | rest)
    other = bench(partly(name), optim={"lr": 1e-2})
    still = [p for path, p in other.model.named_parameters() if path.endswith("up_proj.weight")]
    for group in other.optimizer.param_groups:
        group["params"] = [p for p in group["params"] if all(p is not W for W in still)]
    for each in (one, other):
        each.train(testing.EVENT + 1)
    there = dict(other.model.named_parameters())
    assert all(torch.equal(p, there[n]) for n, p in one.model.named_parameters())


@adapting
def test_the_matrices_move_by_muon(name: str) -> None:
    """A step of momentum 0 at the rate 1 has singular values near c = 1 or sqrt(n/m)."""
    one = bench(partly(name), optim=MUON | {"lr": 1.0, "momentum": 0.0, "clip": 0.0})
    before = {n: p.clone() for n, p in one.model.named_parameters()}
    one.backward()
    one.optimizer.step()
    moved = {n: p - before[n] for n, p in one.model.named_parameters() if "up_proj.weight" in n}
    assert len(moved) == 2
    for step in moved.values():
        n, m = step.shape
        sizes = torch.linalg.svdvals(step.detach()) / max(1.0, n / m) ** 0.5
        assert 0.8 < sizes[0] < 1.2 and sizes[3] > 0.5


@pytest.mark.parametrize("name", [n for n in BY_ADAMW if n not in ("lora", "relora", "dora")])
def test_a_method_that_leaves_nothing_dense_refuses_muon(
    name: str, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as refused:
        train(tiny(tiny_method(name), corpus, tmp_path / "run", optim=MUON))
    assert str(refused.value) == (
        "optim.kind: must be adamw, since no dense matrix inside the model's layers is trained,"
        " unless method.targets or method.exclude leave some that method.train and train_rest"
        " do not freeze (got 'muon')"
    )
    assert not (tmp_path / "run").exists()


def test_muon_moves_each_factor_of_colas_as_a_matrix_of_its_own() -> None:
    """There is no W = B A, so nothing but the factors can be stepped in spectral norm."""
    one = bench(tiny_method("cola"), optim=MUON | {"lr": 1.0, "momentum": 0.0, "clip": 0.0})
    muons = {path for path, (by, rate) in by_muon(one).items() if by and rate == 1.0}
    assert muons == {f"{layer.site}.{factor}" for layer in one.layers for factor in "BA"}
    before = {n: p.clone() for n, p in one.model.named_parameters()}
    one.backward()
    one.optimizer.step()
    for path in muons:
        step = (one.model.get_parameter(path) - before[path]).detach()
        n, m = step.shape
        sizes = torch.linalg.svdvals(step) / max(1.0, n / m) ** 0.5
        assert 0.8 < sizes[0] < 1.2, path


@pytest.mark.parametrize("name", ["lora", "relora", "dora"])
def test_adapters_need_a_warm_start_or_dense_matrices(name: str) -> None:
    with pytest.raises(ConfigError, match=r"^optim\.kind: must be adamw, since no dense matrix"):
        bench(tiny_method(name, warm_start_steps=0), optim=MUON)
    frozen = {"exclude": DENSE, "train_rest": False, "warm_start_steps": 0}
    with pytest.raises(ConfigError, match=r"^optim\.kind: must be adamw, since no dense matrix"):
        bench(tiny_method(name, **frozen), optim=MUON)
    assert by_muon(bench(tiny_method(name), phase=0, optim=MUON))


@pytest.mark.parametrize("exclude", ["", DENSE])
def test_a_warm_start_is_muons_and_its_adapters_are_adamws(
    exclude: str, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    method = ReLoRA(rank=2, warm_start_steps=WARM, merge_every=3, restart_warmup=0, exclude=exclude)
    optim = MUON | {"lr": 2e-2, "embedding_lr": 4e-3}
    with caplog.at_level(logging.INFO):
        train(tiny(method, corpus, tmp_path / "run", optim=optim))
    found = rows(tmp_path / "run")
    rates = [(r["lr"], r["lr_embedding"], r["lr_head"]) for r in found]
    later = 2e-2 if exclude else 4e-3
    assert rates == [(2e-2, 4e-3, 4e-3)] * WARM + [(later, 4e-3, 4e-3)] * (STEPS - WARM)
    said = [r.message for r in caplog.records if r.message.startswith("muon: no dense matrix")]
    assert len(said) == (0 if exclude else 1)
    assert found[-1]["loss"] < found[0]["loss"]


def test_the_warm_starts_own_rate_is_refused_and_named() -> None:
    for given in ({}, {"warm_start_steps": 0, "exclude": DENSE}):
        bench(tiny_method("lora", **given), phase=0, optim=MUON)
    bench(tiny_method("lora", warm_start_steps=0, exclude=DENSE, warm_start_lr=3e-3), optim=MUON)
    for phase in (0, 1):
        with pytest.raises(ConfigError) as refused:
            bench(tiny_method("lora", warm_start_lr=3e-3), phase=phase, optim=MUON)
        assert str(refused.value) == (
            "method.warm_start_lr: must be left out with optim.kind muon, whose matrices have"
            " optim.lr in every phase (got 0.003)"
        )


def test_momentum_stays_over_a_change_of_phase_where_its_matrix_does(
    corpus: Path, tmp_path: Path
) -> None:
    """Unless the phase starts fresh. The gradients of its first step are the same then."""
    after: dict[str, dict[str, torch.Tensor]] = {}
    for then in ("continue", "fresh"):
        method = LoRA(rank=2, warm_start_steps=WARM, exclude=DENSE, warm_start_then=then)
        kept = {"checkpoint_every": 1, "keep": 99}
        train(tiny(method, corpus, tmp_path / then, optim=MUON, train=kept))
        saved = {c.step: c.optimizer for c in map(read, available(tmp_path / then / "checkpoints"))}
        before, after[then] = saved[WARM], saved[WARM + 1]
    momenta = {key for key in after["fresh"] if key.endswith("/momentum")}
    assert len(momenta) == 2 and all("up_proj" in key for key in momenta)
    assert len([key for key in before if key.endswith("/momentum")]) == 14
    for key in momenta:
        close(after["continue"][key] - after["fresh"][key], 0.95 * before[key], 1e-12)


def test_a_parameter_that_changes_its_optimizer_begins_anew() -> None:
    W = nn.Parameter(torch.ones(2, 3))
    for first, then in ((True, "exp_avg"), (False, "momentum")):
        state: dict[str, Any] = {}
        for matrices in (first, not first):
            optimizer = MuonOptimizer(
                [{"params": [W], "matrices": matrices}],
                momentum=0.9, lr=0.1, betas=(0.9, 0.999), eps=1e-8,
            )  # fmt: skip
            optimizer.state[W].update(state)
            W.grad = torch.ones(2, 3)
            optimizer.step()
            state = optimizer.state[W]
        assert then in state and len(state) == (3 if then == "exp_avg" else 1)


def test_resets_and_merges_leave_the_momentum_alone() -> None:
    one = bench(partly("relora", reset="magnitude", reset_fraction=0.5), optim=MUON)
    one.train(testing.EVENT - 1)
    one.backward()
    one.optimizer.step()
    momenta = {p: s["momentum"].clone() for p, s in one.optimizer.state.items() if "momentum" in s}
    one.after_step(testing.EVENT)
    assert len(momenta) == 2
    for p, M in momenta.items():
        assert torch.equal(one.optimizer.state[p]["momentum"], M)
    for layer in one.layers:
        for factor in (layer.A, layer.B):
            moment = one.optimizer.state[factor]["exp_avg"]
            assert int((moment == 0).sum()) >= moment.numel() // 2


def test_sltrains_values_decay_and_biases_do_not() -> None:
    one = bench(partly("sltrain"), optim=MUON | {"weight_decay": 0.1})
    layers = list(reparametrized(one.model))
    assert layers and all(isinstance(layer, ReparamLinear) for layer in layers)
    decayed = decaying(one)
    assert {f"{layer.site}.values" for layer in layers} <= decayed
    assert not [n for n in decayed if n.endswith("bias")]


def test_adapt_has_muon_for_the_linear_layers_of_any_module() -> None:
    """A classifier with one dense layer beside the adapted one, through a warm start."""
    torch.manual_seed(0)
    layers = nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 3)
    model = nn.Sequential(*layers).double()
    method = LoRA(rank=2, targets="2", warm_start_steps=2, restart_warmup=0)
    training = adapt(model, method, steps=4, optim=OptimConfig(kind="muon"), fresh=True)
    x, y = torch.randn(8, 12, dtype=torch.float64), torch.arange(8) % 3
    counts = []
    for _ in range(4):
        nn.functional.cross_entropy(model(x), y).backward()
        groups = training.optimizer.param_groups
        counts.append(sum(len(g["params"]) for g in groups if g["matrices"]))
        training.step()
    assert counts == [3, 3, 2, 2]
    moments = [s for s in training.optimizer.state.values() if "momentum" in s]
    assert len(moments) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lowrank", "relora"])
def test_the_estimate_has_the_bytes_of_each_phase(name: str, corpus: Path) -> None:
    method = partly(name)
    config = tiny(method, corpus, optim=MUON, train={"device": "cpu"})
    phases = estimate(config).phases
    for number, phase in enumerate(phases):
        one = bench(method, number, model={}, optim=MUON)
        one.train()
        assert phase.state_bytes == state_bytes(one.optimizer)
        assert [e.flops > 0 for e in phase.events if e.what == "optimizer step"] == [True]
    bare = replace(config, method=tiny_method("relora"))
    assert not [e for e in estimate(bare).phases[1].events if e.what == "optimizer step"]
