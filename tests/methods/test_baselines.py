"""DoRA, VeRA and HyperAdapt: their equations in float64, and the traps of each."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from byhand import back, configured, made, seeded
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import algebra
from support import tiny, tiny_method
from torch import Tensor, nn
from torch.testing import assert_close

from peptrain.methods import VeRA
from peptrain.methods.dora import DoRA, DoRALinear
from peptrain.methods.hyperadapt import HyperAdaptLinear
from peptrain.methods.vera import VeRALinear, frozen_pair
from peptrain.models.sites import ReparamLinear, Site, reparametrized
from peptrain.rng import Rng
from peptrain.runs.build import build
from peptrain.testing import newest
from peptrain.training.loop import train

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)
sizes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 6))
NAMES = ("dora", "vera", "hyperadapt")
every_baseline = pytest.mark.parametrize("name", NAMES)
QWEN = {"family": "qwen2", "kv_heads": 1}


def site(n: int, m: int, *, bias: bool = True, dtype: torch.dtype = torch.float64) -> Site:
    W = torch.randn(n, m, generator=seeded(5)).to(dtype)
    parent = nn.ModuleDict({"layer": nn.Linear(m, n, bias=bias, dtype=dtype)})
    parent["layer"].weight = nn.Parameter(W)
    return Site("layer", parent, m)


def fresh(name: str, at: Site, r: int, **given: Any) -> ReparamLinear:
    """One layer as it is installed; VeRA's pair is larger than the layer."""
    if name == "dora":
        made = DoRALinear(at, r, given.get("alpha", 3.0), given.get("dropout", 0.0), Rng(0))
        made.train_scale()
        return made
    if name == "vera":
        n, m = at.shape
        larger = site(n + 3, m + 2, dtype=at.linear.weight.dtype)
        return VeRALinear(at, *frozen_pair([at, larger], r, Rng(0)))
    return HyperAdaptLinear(at)


def alone(name: str, n: int, m: int, r: int, **given: Any) -> Any:
    """One layer with random numbers on all that trains."""
    kept = {k: given.pop(k) for k in ("alpha", "dropout") if k in given}
    layer = fresh(name, site(n, m, **given), r, **kept)
    with torch.no_grad():
        for p in layer.parameters():
            if p.requires_grad:
                p += torch.randn(p.shape, generator=seeded(p.numel())).to(p.dtype)
    return layer


def effective(name: str, layer: Any) -> Tensor:
    """By the oracle."""
    p = {k: v.detach() for k, v in layer.named_parameters()}
    W = p["weight"]
    if name == "dora":
        return algebra.dora_effective(W, p["B"], p["A"], p["s"], p["m"])[0]
    if name == "vera":
        return algebra.vera_effective(W, p["A"], p["B"], p["lambda_d"], p["lambda_b"])
    return algebra.hyperadapt_effective(W, p["a"], p["b"])


def gradients(name: str, layer: Any, G: Tensor) -> dict[str, Tensor]:
    """By the oracle, from the dense gradient."""
    p = {k: v.detach() for k, v in layer.named_parameters()}
    if name == "dora":
        return algebra.dora_gradients(G, p["weight"], p["B"], p["A"], p["s"].item(), p["m"])
    if name == "vera":
        return algebra.vera_gradients(G, p["A"], p["B"], p["lambda_d"], p["lambda_b"])
    return algebra.hyperadapt_gradients(G, p["weight"], p["a"], p["b"])


@every_baseline
@EXAMPLES
@given(sizes, st.booleans(), st.sampled_from([(), (3,), (2, 3)]))
def test_forward_and_gradients_are_those_of_the_equations(
    name: str, size: tuple[int, int, int], bias: bool, batch: tuple[int, ...]
) -> None:
    n, m, r = size
    layer = alone(name, n, m, r, bias=bias)
    W_eff = effective(name, layer)
    near = {"rtol": 1e-9, "atol": 1e-10}
    assert_close(layer.effective_weight().detach(), W_eff, **near)
    x = torch.randn(*batch, m, generator=seeded(2), dtype=torch.float64).requires_grad_()
    y = layer(x)
    assert_close(y, x @ W_eff.T + (layer.bias if bias else 0), **near)
    dy = torch.randn(y.shape, generator=seeded(3), dtype=torch.float64)
    y.backward(dy)
    assert x.grad is not None
    assert_close(x.grad, dy @ W_eff, **near)
    rows, drows = x.detach().reshape(-1, m), dy.reshape(-1, n)
    wanted = gradients(name, layer, drows.T @ rows) | ({"bias": drows.sum(0)} if bias else {})
    found = {k: p.grad for k, p in layer.named_parameters() if p.requires_grad}
    assert found.keys() == wanted.keys()
    for key, g in wanted.items():
        assert_close(found[key], g, **near, msg=lambda said, key=key: f"{key}: {said}")
    assert all(p.grad is None for p in layer.parameters() if not p.requires_grad)


@every_baseline
def test_at_the_start_the_weight_is_the_frozen_one(name: str) -> None:
    layer = fresh(name, site(7, 5), 3)
    W = site(7, 5).linear.weight
    assert torch.equal(layer.get_parameter("weight"), W)
    assert_close(layer.effective_weight(), W, rtol=0, atol=1e-15)


@every_baseline
def test_what_is_kept_for_the_backward_pass_is_as_long_as_the_tokens(name: str) -> None:
    """Never a matrix of the weight's size but the weight itself."""
    n, m, tokens = 96, 80, 4
    layer = alone(name, n, m, 2, dtype=torch.float32)
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: list[tuple[int, ...]] = []

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept.append(tuple(t.shape))
        return t

    x = torch.randn(tokens, m, generator=seeded(2)).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x).sum().backward()
    assert kept and max(torch.Size(shape).numel() for shape in kept) <= tokens * n


def relative(found: Tensor, right: Tensor) -> float:
    return ((found.detach().double() - right.detach()).norm() / right.detach().norm()).item()


@every_baseline
@pytest.mark.parametrize("autocast", [True, False])
def test_in_bf16_the_vectors_stay_fp32(name: str, autocast: bool) -> None:
    exact = alone(name, 48, 32, 4)
    low = alone(name, 48, 32, 4, dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.no_grad():
        for p, q in zip(low.parameters(), exact.parameters(), strict=True):
            p.copy_(q)
    x = torch.randn(6, 32, generator=seeded(2), dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = low(x.float() if autocast else x.bfloat16())
    assert y.dtype == torch.bfloat16
    wanted = exact(x)
    assert relative(y, wanted) < 0.015
    y.float().square().sum().backward()
    wanted.square().sum().backward()
    for (key, p), q in zip(low.named_parameters(), exact.parameters(), strict=True):
        vector = key in ("m", "s", "a", "b", "lambda_d", "lambda_b")
        assert p.dtype == (torch.float32 if vector or autocast else torch.bfloat16), key
        if p.requires_grad:
            assert p.grad.dtype == p.dtype
            assert relative(p.grad, q.grad) < 0.03, key


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "name, key", [("dora", "m"), *(("hyperadapt", k) for k in "ab"),
                  *(("vera", f"lambda_{k}") for k in "db")],
)  # fmt: skip
def test_the_vectors_are_applied_unrounded(name: str, key: str, autocast: bool) -> None:
    """With I for every other matrix nothing else is rounded: y is the one rounding of a product."""
    layer: Any = fresh(name, site(64, 64, bias=False, dtype=torch.float32), 64)
    eye, near_1 = torch.eye(64), 1 + 0.1 * torch.randn(64, generator=seeded(4))
    with torch.no_grad():
        layer.weight.copy_(torch.zeros(64, 64) if name == "vera" else eye)
        if name == "vera":
            layer.A[:, :64], layer.B[:64] = eye, eye
            layer.lambda_d.fill_(1)
            layer.lambda_b.fill_(1)
        layer.get_parameter(key).copy_(near_1)
    x = torch.randn(7, 64, generator=seeded(2)).bfloat16()
    if not autocast:
        for p in layer.parameters():
            p.data = p.data.bfloat16() if p.ndim == 2 else p.data
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    assert torch.equal(y, (x.float() * near_1).bfloat16())


# --- dora


def test_doras_magnitudes_are_the_lengths_of_the_rows() -> None:
    start = fresh("dora", site(9, 7), 3)
    W = site(9, 7).linear.weight.detach()
    assert_close(start.get_parameter("m").detach(), W.square().sum(1).sqrt(), rtol=0, atol=1e-14)
    layer = alone("dora", 9, 7, 3)
    lengths = layer.effective_weight().norm(dim=1)
    assert_close(lengths, layer.m.abs(), rtol=0, atol=1e-13)


def test_doras_norm_gets_no_gradient() -> None:
    """With one, the gradient of W + s B A would be orthogonal to it, row by row; it is not."""
    layer = alone("dora", 9, 7, 7)
    x = torch.randn(20, 7, generator=seeded(2), dtype=torch.float64)
    v = layer.weight + layer.s * layer.B @ layer.A
    whole = x @ (layer.m[:, None] * v / v.norm(dim=1, keepdim=True)).T + layer.bias
    invertible = torch.linalg.inv(layer.A.detach()).T
    along = []
    for y in (layer(x), whole):
        (dB,) = torch.autograd.grad(y.pow(3).sum(), layer.B, retain_graph=True)
        along.append((dB @ invertible * v.detach()).sum(1).abs())
    assert (along[0] > 1e-3).all() and (along[1] < 1e-9).all()


def test_a_row_that_is_zero_stays_zero_and_finite() -> None:
    at = site(4, 5, bias=False)
    with torch.no_grad():
        at.linear.weight[1] = 0
    layer = fresh("dora", at, 2)
    assert isinstance(layer, DoRALinear)
    x = torch.randn(3, 5, generator=seeded(2), dtype=torch.float64)
    y = layer(x)
    y.square().sum().backward()
    assert layer.A.grad is not None and layer.B.grad is not None and layer.m.grad is not None
    assert y.isfinite().all() and not y[:, 1].any() and not layer.effective_weight()[1].any()
    assert layer.B.grad.isfinite().all() and not layer.B.grad[1].any() and layer.B.grad[0].any()
    assert layer.m.grad.isfinite().all() and not layer.m.grad[1].any()


def test_dropout_is_of_the_input_of_a_and_the_norms_have_none() -> None:
    layer = alone("dora", 6, 5, 3, dropout=0.5)
    x = torch.randn(8, 5, generator=seeded(2), dtype=torch.float64)
    W_eff, N = algebra.dora_effective(
        *(p.detach() for p in (layer.weight, layer.B, layer.A, layer.s, layer.m))
    )
    torch.manual_seed(7)
    found = layer.train()(x)
    torch.manual_seed(7)
    low = layer.s * F.dropout(x, 0.5) @ layer.A.T @ layer.B.T
    assert_close(found, layer.m / N * (x @ layer.weight.T + low) + layer.bias)
    assert not torch.allclose(found, layer.eval()(x))
    assert_close(layer(x), x @ W_eff.T + layer.bias)
    (B,) = torch.autograd.grad(found.sum(), layer.B)
    ones = torch.ones(8, 6, dtype=torch.float64)
    torch.manual_seed(7)
    G = ones.T @ F.dropout(x, 0.5)
    wanted = layer.s * torch.diag(layer.m / N) @ G @ layer.A.T
    assert_close(B, wanted)


def test_the_magnitudes_are_those_of_the_weight_after_a_warm_start(
    corpus: Path, tmp_path: Path
) -> None:
    config = tiny("dora", corpus, tmp_path / "run", train={"checkpoint_every": 1, "keep": 99})
    train(replace(config, method=tiny_method("dora", warm_start_steps=8 - 1)))
    saved = newest(tmp_path / "run")  # one step after the switch, at AdamW's pace
    for key in (k for k in saved.model if k.endswith(".m")):
        W = saved.model[key.removesuffix("m") + "weight"]
        assert_close(saved.model[key], W.norm(dim=1), rtol=0, atol=1.01e-3)


# --- vera


def vera_layers(model: nn.Module) -> list[VeRALinear]:
    return [layer for layer in reparametrized(model) if isinstance(layer, VeRALinear)]


def test_one_pair_is_shared_by_all_layers_and_slices_fit() -> None:
    model, _, _ = made(VeRA(rank=5), model=QWEN)
    layers = vera_layers(model)
    first = layers[0]
    assert len(layers) == 14
    assert all(layer.A is first.A and layer.B is first.B for layer in layers)
    assert first.A.shape == (5, 24) and first.B.shape == (24, 5)
    assert not first.A.requires_grad and not first.B.requires_grad
    names = [n for n, _ in model.named_parameters()]
    assert [n for n in names if n.endswith((".A", ".B"))] == [f"{first.site}.A", f"{first.site}.B"]
    model.to(torch.float32)
    assert all(layer.A is first.A and layer.B is first.B for layer in layers)


def test_the_pair_is_kaiming_uniform_and_only_of_the_seed() -> None:
    small, wide = site(300, 40), site(20, 500)
    A, B = frozen_pair([small, wide], 60, Rng(3))
    assert A.shape == (60, 500) and B.shape == (300, 60)
    assert not torch.equal(A.flatten().sign()[:999], B.flatten().sign()[:999])
    for p, fan_in in ((A, 500), (B, 60)):
        bound = (6 / fan_in) ** 0.5
        assert p.abs().max() <= bound and p.abs().max() > 0.99 * bound
        assert p.mean().abs() < 0.02 * bound
        assert p.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    again, other = (frozen_pair([wide, small], 60, Rng(seed)) for seed in (3, 4))
    assert torch.equal(again[0], A) and torch.equal(again[1], B)
    assert not torch.equal(other[0], A) and not torch.equal(other[1], B)


def test_a_runs_pair_is_that_of_its_seed() -> None:
    pairs = []
    for seed in (0, 0, 1):
        config = configured(VeRA(rank=3), train={"seed": seed})
        first, *_ = vera_layers(build(config, 0))
        pairs.append((first.A, first.B))
    same = [all(map(torch.equal, pairs[0], pair)) for pair in pairs]
    assert same == [True, True, False]


def test_a_checkpoint_has_the_pair_once(corpus: Path, tmp_path: Path) -> None:
    train(tiny(VeRA(rank=3), corpus, tmp_path / "run", train={"steps": 1}))
    saved = newest(tmp_path / "run")
    pair = [p.shape for n, p in saved.model.items() if n.endswith((".A", ".B"))]
    assert pair == [(3, 24), (24, 3)]
    assert not [n for n in saved.optimizer if "/" in n and n.split("/")[0].endswith((".A", ".B"))]


def test_lambda_b_moves_first_and_lambda_d_after_it() -> None:
    model, optimizer, _ = made(VeRA(rank=3))
    for step, alive in ((0, False), (1, True)):
        back(model, step)
        for layer in vera_layers(model):
            assert layer.lambda_b.grad is not None and layer.lambda_d.grad is not None
            assert layer.lambda_b.grad.any()
            assert bool(layer.lambda_d.grad.any()) is alive
            if not step:
                assert (layer.lambda_d == 0.1).all() and not layer.lambda_b.any()
        optimizer.step()


def test_a_pair_of_any_rank_is_worth_it() -> None:
    model, _, _ = made(VeRA(rank=1000))
    assert len(vera_layers(model)) == 14


# --- their place among the others


def test_they_train_with_bpts_schedule_and_clip_and_no_decay() -> None:
    for name, lr in (("dora", 1e-3), ("vera", 2e-3), ("hyperadapt", 2e-3)):
        config = configured(tiny_method(name), schedule={"kind": None, "warmup": None})
        optim, schedule = config.optim, config.schedule
        assert (optim.lr, optim.weight_decay, optim.clip) == (lr, 0, 1)
        assert (schedule.kind, schedule.floor) == ("wsd", 0)


def test_the_default_ranks() -> None:
    assert configured(VeRA()).method.rank == 128
    assert configured(DoRA()).method.rank == 4, "a quarter of 16"
