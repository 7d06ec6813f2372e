"""Muon in full training: its steps, its defaults, what it shares with AdamW, what it refuses."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from byhand import seeded
from oracles import muon as oracle
from support import rows, tiny, tiny_method
from torch import nn

from peptrain.adaptation import adapt
from peptrain.cli.app import main
from peptrain.config import RunConfig, load, resolved
from peptrain.distributed import owners
from peptrain.errors import CheckpointError, ConfigError
from peptrain.estimation.estimate import estimate
from peptrain.methods import METHODS
from peptrain.methods.full import Full
from peptrain.ops.newton_schulz import COEFFICIENTS
from peptrain.optim.adamw import OptimConfig, adamw, learning_rates, state_bytes
from peptrain.optim.muon import MuonOptimizer, Scale
from peptrain.testing import MODEL, QWEN, Bench, bench
from peptrain.training.loop import resume, train
from peptrain.tuning.settle import tuned

MUON = {"kind": "muon"}
CORPUS = Path("unused")
ADAM: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
SHAPES = [(12, 20), (20, 12), (12, 20), (8, 8)]


def settled(name: str = "full", **optim: Any) -> OptimConfig:
    config: RunConfig[Any] = tiny(tiny_method(name), CORPUS, optim=MUON | optim)
    return resolved(config, world_size=1, on_gpu=False).optim


def matrices(dtype: torch.dtype) -> tuple[list[nn.Parameter], list[list[torch.Tensor]]]:
    """Matrices of three shapes, and their gradients in five steps."""
    draw = seeded()
    params = [nn.Parameter((0.1 * torch.randn(s, generator=draw)).to(dtype)) for s in SHAPES]
    grads = [[torch.randn(s, generator=draw).to(dtype) for s in SHAPES] for _ in range(5)]
    return params, grads


def walked(optimizer: torch.optim.Optimizer, params: Any, grads: Any) -> list[torch.Tensor]:
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("scale", ["spectral", "moonlight"])
@pytest.mark.parametrize("momentum, decay", [(0.95, 0.0), (0.0, 0.0), (0.5, 0.1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_its_steps_are_those_of_the_oracle(
    scale: Scale, momentum: float, decay: float, dtype: torch.dtype
) -> None:
    params, grads = matrices(dtype)
    start = [p.detach().clone() for p in params]
    groups = [{"params": params, "matrices": True, "weight_decay": decay}]
    optimizer = MuonOptimizer(groups, momentum=momentum, scale=scale, **ADAM)
    found = walked(optimizer, params, grads)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2}[dtype]
    for i, W in enumerate(start):
        wanted = oracle.trajectory(
            *(W, [step[i] for step in grads], COEFFICIENTS),
            lr=0.1, momentum=momentum, decay=decay, scale=scale,
        )  # fmt: skip
        torch.testing.assert_close(found[i].double(), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "scale, theirs", [("spectral", "original"), ("moonlight", "match_rms_adamw")]
)
def test_with_torchs_coefficients_it_is_torchs_muon_to_bf16_rounding(
    scale: Scale, theirs: str
) -> None:
    """torch computes in bf16, and we in the dtype of the weights on a CPU."""
    jordan = (3.4445, -4.7750, 2.0315)
    ours, grads = matrices(torch.float32)
    other = [nn.Parameter(p.detach().clone()) for p in ours]
    start = [p.detach().clone() for p in ours]
    groups = [{"params": ours, "matrices": True, "weight_decay": 0.1}]
    here = MuonOptimizer(groups, momentum=0.9, scale=scale, coefficients=[jordan] * 5, **ADAM)
    there = torch.optim.Muon(other, 0.1, 0.1, 0.9, ns_coefficients=jordan, adjust_lr_fn=theirs)
    found, wanted = walked(here, ours, grads[:1]), walked(there, other, grads[:1])
    for a, b, W in zip(found, wanted, start, strict=True):
        assert (a - b).norm() < 2e-2 * (b - W).norm()


def test_unset_settings_are_muons_own_and_adamws_for_the_rest() -> None:
    found = settled()
    own = (found.lr, found.embedding_lr, found.head_lr, found.momentum, found.muon_scale)
    assert own == (1e-2, 5e-3, None, 0.95, "spectral")
    assert (found.beta1, found.beta2, found.eps, found.clip) == (0.9, 0.999, 1e-8, 1.0)
    assert settled(lr=0.5, muon_scale="moonlight").lr == 0.5
    lower = tuned(OptimConfig(kind="muon"), Full)
    assert (lower.lr, lower.embedding_lr) == pytest.approx((1e-3, 5e-4))


@pytest.mark.parametrize("name", [n for n in METHODS if n in ("loro", "galore")])
def test_a_method_with_its_own_optimizer_refuses_muon_by_name(name: str) -> None:
    with pytest.raises(ConfigError) as refused:
        settled(name)
    assert str(refused.value) == f"optim.kind: must be adamw for {name} (got 'muon')"


@pytest.mark.parametrize(
    "given, said",
    [
        ({"muon_scale": "spectral"}, "optim.muon_scale: must be unset with optim.kind adamw"),
        ({"kind": "sgd", "muon_scale": "moonlight"}, "optim.muon_scale: must be unset with optim"),
        (MUON | {"momentum": -0.1}, "optim.momentum: must be in [0, 1) (got -0.1)"),
        (MUON | {"momentum": 1.0}, "optim.momentum: must be in [0, 1) (got 1.0)"),
        (MUON | {"lr": -1.0}, "optim.lr: must be a finite number >= 0 (got -1.0)"),
        (MUON | {"weight_decay": -1.0}, "optim.weight_decay: must be a finite number >= 0"),
        (MUON | {"embedding_lr": -1.0}, "optim.embedding_lr: must be a finite number >= 0"),
    ],
)
def test_a_setting_that_it_can_not_take_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        settled(**({"kind": "adamw"} | given))
    assert str(refused.value).startswith(said)


def test_no_newton_schulz_steps_and_an_impossible_momentum_are_refused() -> None:
    W = [{"params": [nn.Parameter(torch.ones(2, 2))], "matrices": True}]
    with pytest.raises(ConfigError, match="coefficients: must be one polynomial or more"):
        MuonOptimizer(W, momentum=0.9, coefficients=(), **ADAM)
    with pytest.raises(ConfigError, match="with c other than 0"):
        MuonOptimizer(W, momentum=0.9, coefficients=[(1.5, -0.5, 0.0)], **ADAM)
    with pytest.raises(ConfigError, match=r"momentum: must be in \[0, 1\)"):
        MuonOptimizer(W, momentum=-0.9, **ADAM)


def rates(one: Bench) -> dict[str, tuple[bool, float]]:
    names = {p: name for name, p in one.model.named_parameters()}
    groups = one.optimizer.param_groups
    return {names[p]: (g["matrices"], g["lr"]) for g in groups for p in g["params"]}


def test_the_matrices_of_the_layers_are_muons_and_all_else_is_adamws() -> None:
    one = bench(Full(), model=QWEN, optim=MUON | {"head_lr": 2e-3, "weight_decay": 0.1})
    found = rates(one)
    assert found.keys() == {name for name, _ in one.model.named_parameters()}
    for name, (by_muon, lr) in found.items():
        inside = name.endswith("_proj.weight")
        assert by_muon == inside
        assert lr == (1e-2 if inside else 2e-3 if name.startswith("lm_head") else 5e-3), name
    decays = [g["weight_decay"] for g in one.optimizer.param_groups]
    assert decays == [0.1, 0.0, 0.1]
    assert learning_rates(one.optimizer) == {"lr": 1e-2, "lr_embedding": 5e-3, "lr_head": 2e-3}
    tied = rates(bench(Full(), model={"tied": True}, optim=MUON))
    assert tied["model.embed_tokens.weight"] == (False, 5e-3)


def test_all_else_moves_as_by_adamw() -> None:
    """With the matrices at rest and the same rates."""
    one = bench(Full(), optim=MUON | {"lr": 0.0, "embedding_lr": 1e-2})
    other = bench(Full(), optim={"lr": 0.0, "embedding_lr": 1e-2})
    assert type(other.optimizer) is type(adamw(other.model, other.config.optim))
    for each in (one, other):
        each.train(3)
    there = dict(other.model.named_parameters())
    assert all(torch.equal(p, there[n]) for n, p in one.model.named_parameters())


def test_a_model_without_dense_matrices_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^optim\.kind: must be adamw, since no dense matrix"):
        frozen = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        frozen[0].requires_grad_(False)
        adapt(frozen, Full(), steps=2, optim=OptimConfig(kind="muon"))
    without = nn.Sequential(nn.Linear(4, 4, bias=False))
    adapted = adapt(without, Full(), steps=2, optim=OptimConfig(kind="muon"))
    assert [len(g["params"]) for g in adapted.optimizer.param_groups] == [1]


def test_its_share_alone_is_computed_by_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both shares together are what one process computes."""
    alone, grads = matrices(torch.float64)
    wanted = walked(made(alone), alone, grads[:1])
    start, _ = matrices(torch.float64)
    for rank in (0, 1):
        params, _ = matrices(torch.float64)
        sent: list[int] = []
        monkeypatch.setattr(
            owners.Owners, "send_", lambda self, items, sent=sent: sent.extend(self.own)
        )
        with owners.sharing(rank, 2):
            found = walked(made(params), params, grads[:1])
        assert 0 < len(sent) < len(SHAPES)
        for i in range(len(SHAPES)):
            same = torch.allclose(found[i], wanted[i], rtol=0, atol=1e-12)
            assert same == (i in sent) and not torch.equal(found[i], start[i])


def made(params: list[nn.Parameter]) -> MuonOptimizer:
    return MuonOptimizer([{"params": params, "matrices": True}], momentum=0.9, **ADAM)


@pytest.mark.slow
def test_the_estimate_has_its_bytes_and_its_products(corpus: Path) -> None:
    """One moment for matrices, two for the rest; Newton-Schulz is an event of every step."""
    here = {"device": "cpu"}
    (phase,) = estimate(tiny(Full(), corpus, optim=MUON, train=here)).phases
    found = bench(Full(), model={}, optim=MUON)
    found.train()
    assert phase.state_bytes == state_bytes(found.optimizer)
    (other,) = estimate(tiny(Full(), corpus, train=here)).phases
    assert phase.state_bytes < other.state_bytes
    assert [e.what for e in phase.events] == ["optimizer step"] and not other.events
    by_muon = [p for p in found.model.parameters() if "momentum" in found.optimizer.state[p]]
    sides = [(min(p.shape), max(p.shape)) for p in by_muon]
    assert phase.events[0].flops == sum(5 * (4 * s * s * b + 2 * s**3) for s, b in sides)


def test_a_run_has_its_settings_and_a_resume_must_agree_in_them(
    corpus: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(tiny(Full(), corpus, run, optim=MUON))
    found = load(run / "config.toml").optim
    assert (found.kind, found.momentum, found.muon_scale) == ("muon", 0.95, "spectral")
    assert {(r["lr"], r["lr_embedding"], r["lr_head"]) for r in rows(run)} == {(1e-2, 5e-3, 5e-3)}
    text = (run / "config.toml").read_text()
    for old, new, key in (
        ('"spectral"', '"moonlight"', "muon_scale"),
        ("momentum = 0.95", "momentum = 0.9", "momentum"),
    ):
        assert old in text
        (run / "config.toml").write_text(text.replace(old, new))
        with pytest.raises(CheckpointError, match=rf"optim\.{key}: the checkpoint"):
            resume(run)


def test_the_command_has_muons_defaults_and_its_run_says_so(corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sizes = [f"--model.{k.replace('_', '-')}={v}" for k, v in MODEL.items()]
    shape = ["--train.steps=2", "--train.batch-size=2", "--train.seq-len=16", "--train.device=cpu"]
    command = ["train", "full", "--optim.kind", "muon", f"--data.path={corpus}", f"--run={run}"]
    assert main([*command, *sizes, *shape]) == 0
    found = load(run / "config.toml").optim
    assert found == settled()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed"])
def test_it_trains_in_every_precision(precision: str, corpus: Path, tmp_path: Path) -> None:
    given = {"precision": precision, "steps": 12}
    config = tiny(Full(), corpus, tmp_path / "run", optim=MUON)
    train(replace(config, train=replace(config.train, **given)))
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.3
