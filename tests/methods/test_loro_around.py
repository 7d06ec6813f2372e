"""LORO around a frozen W: W + lambda B A, with LORO's steps on B and A alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from byhand import back, made, snapshot, walk
from oracles import algebra
from support import tiny, tiny_method
from torch import nn

from peptrain import testing
from peptrain.adaptation import adapt
from peptrain.analysis.analyze import analyze
from peptrain.errors import ConfigError, Unsupported
from peptrain.estimation.estimate import estimate
from peptrain.exporting.export import export
from peptrain.methods.lora import LoRALinear, fresh_A
from peptrain.methods.loro import LORO
from peptrain.models.dense import dense_state, load_dense
from peptrain.models.sites import reparametrized
from peptrain.rng import Rng
from peptrain.runs.build import open_run, plain_model
from peptrain.testing import MODEL, QWEN, close, startable
from peptrain.training.loop import train

R = 2


def around(**given: Any) -> LORO:
    method = tiny_method("loro", **({"around": "frozen"} | given))
    assert isinstance(method, LORO)
    return method


def layers(model: nn.Module) -> list[LoRALinear]:
    found = [layer for layer in reparametrized(model) if isinstance(layer, LoRALinear)]
    assert found
    return found


@pytest.mark.parametrize("law", testing.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("over_rank", [False, True])
def test_it_keeps_the_laws_of_a_method(law: testing.Law, over_rank: bool, corpus: Path) -> None:
    law(around(alpha=3.0, alpha_over_rank=over_rank), corpus)


@pytest.mark.parametrize("over_rank, scale", [(False, 12.0), (True, 6.0)])
def test_the_dense_equivalent_is_w_plus_lambda_b_a(over_rank: bool, scale: float) -> None:
    model, optimizer, _ = made(around(alpha=12.0, alpha_over_rank=over_rank), model=QWEN)
    start = snapshot(model)
    walk(model, optimizer, 4)
    dense = dense_state(model)
    for layer in layers(model):
        assert torch.equal(layer.weight, start[f"{layer.site}.weight"]) and layer.B.any()
        close(dense[f"{layer.site}.weight"], layer.weight + scale * layer.B @ layer.A, 1e-14)


def test_it_starts_at_the_given_model_to_the_bit(corpus: Path, tmp_path: Path) -> None:
    """With A as lora draws it."""
    config = tiny(around(), corpus, tmp_path / "run", train={"keep_at": "0"})
    train(startable(config))
    opened = open_run(Path(f"{tmp_path / 'run'}@0"))
    for layer in layers(opened.model):
        r, m = layer.A.shape
        drawn = fresh_A(layer.site, 0, r, m, Rng(0), layer.A)
        assert torch.equal(layer.A, drawn) and not layer.B.any()
    with torch.no_grad():
        given, found = (
            m.eval()(input_ids=testing.ids(0)).logits for m in (plain_model(config), opened.model)
        )
    assert torch.equal(given, found)


@pytest.mark.parametrize("over_rank, scale", [(False, 5.0), (True, 2.5)])
def test_the_exact_step_is_the_riemannian_one_of_the_product(over_rank: bool, scale: float) -> None:
    """From the dense gradient of the loss by B A, which is lambda times that by W_eff."""
    lr, k = 0.02, 3
    method = around(
        alpha=5.0, alpha_over_rank=over_rank, exact_every=k, refresh="none", direction="raw"
    )
    model, optimizer, config = made(method, optim={"lr": lr})
    walk(model, optimizer, k - 1)
    dense = plain_model(config)
    load_dense(dense, dense_state(model))
    for each in (model, dense):
        back(each, k)
    old = [(layer.B.detach().clone(), layer.A.detach().clone()) for layer in layers(model)]
    optimizer.step()
    metrics = config.method.after_step(model, optimizer, k, Rng(0))
    assert int(metrics["singular_factor_pairs_warning"]) == 0
    beta1, beta2 = optimizer.param_groups[-1]["betas"]
    lr_p = lr * (1 - beta2**k) ** 0.5 / (1 - beta1**k)
    for layer, (B, A) in zip(layers(model), old, strict=True):
        G = dense.get_parameter(f"{layer.site}.weight").grad
        assert G is not None
        wanted = algebra.loro_exact_raw(B, A, scale * G, lr_p)
        size = float((wanted - B @ A).abs().max())
        close(layer.B.detach() @ layer.A.detach(), wanted, 1e-5 * size)  # norms compute in fp32


@pytest.mark.parametrize("precision, tolerance", [("fp64", 1e-12), ("fp32", 1e-4)])
def test_an_exact_step_from_b_a_of_0_is_a_step_of_b(precision: str, tolerance: float) -> None:
    """The first step, with K = 1: B is singular, and its pseudo-inverse 0."""
    method = around(exact_every=1, refresh="none", direction="raw")
    model, optimizer, config = made(method, train={"precision": precision}, optim={"lr": 0.02})
    back(model, 1)
    beta1, beta2 = optimizer.param_groups[-1]["betas"]
    lr_p = 0.02 * (1 - beta2) ** 0.5 / (1 - beta1)
    wanted = []
    for layer in layers(model):
        assert layer.B.grad is not None and layer.A.grad is not None
        assert not layer.B.any() and layer.B.grad.any() and not layer.A.grad.any()
        given = (layer.B.detach(), layer.A.detach(), layer.B.grad, layer.A.grad)
        B, A, G_B, G_A = (p.clone().double() for p in given)
        wanted.append(-lr_p * G_B @ torch.linalg.pinv(A).T)
        close(wanted[-1], algebra.loro_exact_directions(B, A, G_B, G_A, lr_p), 1e-12)
    optimizer.step()
    for layer, W in zip(layers(model), wanted, strict=True):
        found = layer.B.detach().double() @ layer.A.detach().double()
        close(found, W, tolerance * float(W.abs().max()))
    metrics = config.method.after_step(model, optimizer, 1, Rng(0))
    assert float(metrics["singular_factor_pairs_warning"]) == len(wanted)
    walk(model, optimizer, 2, start=2)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("given", [{}, {"retraction": "svd"}, {"update": "precond"}])
def test_a_first_step_at_no_learning_rate_leaves_it_trainable(given: dict[str, Any]) -> None:
    """A warm-up begins with one. Balanced factors of B A = 0 would both be 0, for ever."""
    model, optimizer, _ = made(around(exact_every=1, refresh="none", **given), optim={"lr": 0.02})
    drawn = [layer.A.detach().clone() for layer in layers(model)]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    walk(model, optimizer, 1)
    for layer, A in zip(layers(model), drawn, strict=True):
        assert not layer.B.any() and torch.equal(layer.A, A)
    for group in optimizer.param_groups:
        group["lr"] = 0.02
    walk(model, optimizer, 2, start=1)
    assert all((layer.B @ layer.A).any() for layer in layers(model))


def test_a_w_that_nobody_trained_is_refused(corpus: Path, tmp_path: Path) -> None:
    config = tiny(around(), corpus, tmp_path / "run")
    for command in (train, estimate):
        with pytest.raises(ConfigError, match=r"method\.around: frozen needs .* --init-from"):
            command(config)  # type: ignore[operator]
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    with pytest.raises(ConfigError, match=r"method\.around: frozen needs .* without fresh=True"):
        adapt(model, around(), steps=4, fresh=True)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    y = model(x)
    adapt(model, around(), steps=4)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("given, message", [
    ({"around": "none", "alpha": 8.0}, "alpha: is of method.around frozen only (got 8.0 with"),
    ({"around": "none", "alpha_over_rank": True}, "alpha_over_rank: is of method.around frozen"),
    ({"init": "orthogonal"}, "init: is of method.around none only (got orthogonal with frozen)"),
    ({"alpha": 0.0}, "alpha: must be a finite number > 0"),
    ({"exact_every": 1, "exact_cap": 0.5}, "exact_every: must be 0, or > 1, with"),
])  # fmt: skip
def test_settings_without_an_effect_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        around(**given)
    assert str(refused.value).startswith(f"method.{message}")


def test_fused_kernels_leave_it_as_it_is() -> None:
    """Those of W = B A would leave W out."""
    pytest.importorskip("triton")
    model, _, config = made(around())
    kinds = [type(module) for module in model.modules()]
    config.method.fuse(model)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.slow
def test_it_is_estimated_analyzed_and_exported_dense_alone(corpus: Path, tmp_path: Path) -> None:
    method = around(targets="q,k", train="norm")
    config = startable(tiny(method, corpus, tmp_path / "run"))
    d, L = MODEL["hidden_size"], MODEL["layers"]
    (phase,) = estimate(config).phases
    assert phase.trainable_parameters == L * 2 * R * 2 * d + (2 * L + 1) * d
    assert train(config).trainable == phase.trainable_parameters
    with pytest.raises(
        Unsupported,
        match=r"--form factorised: loro with method\.around: frozen keeps W"
        r" beside its factors, so that these alone are no model; use --form dense",
    ):
        export(tmp_path / "run", tmp_path / "small", "factorised")
    export(tmp_path / "run", tmp_path / "dense")
    assert json.loads((tmp_path / "dense/config.json").read_text())["hidden_size"] == d
    assert analyze([tmp_path / "run"])
