"""LoRA's and ReLoRA's layer, merge and resets, one trap of the literature after the other."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from byhand import back, made, moments, seeded, snapshot, walk, zero_gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny_method
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.testing import assert_close

from peptrain.methods.base import Method
from peptrain.methods.lora import LoRA, LoRALinear, fresh_A
from peptrain.models.sites import Site, reparametrized
from peptrain.optim.adamw import OptimConfig
from peptrain.rng import Rng
from peptrain.testing import EVENT

EXAMPLES = settings(max_examples=100, deadline=None, derandomize=True)
QWEN = {"family": "qwen2", "kv_heads": 1}
"""Biases, and matrices of three more shapes."""
NOTHING = nn.Module()
"""A model without adapted layers: the clocks alone."""


def layers(model: nn.Module) -> Iterator[LoRALinear]:
    for layer in reparametrized(model):
        assert isinstance(layer, LoRALinear)
        yield layer


def relora(**given: Any) -> Method:
    return tiny_method("relora", **given)


def alone(n: int, m: int, r: int, *, alpha: float, bias: bool = True, dtype: Any = torch.float64,
          dropout: float = 0.0) -> LoRALinear:  # fmt: skip
    """One layer at the site "layer"."""
    parent = nn.ModuleDict({"layer": nn.Linear(m, n, bias=bias, dtype=dtype)})
    return LoRALinear(Site("layer", parent, m), r, alpha, dropout, Rng(0))


@torch.no_grad()
def scramble(layer: LoRALinear, seed: int = 1) -> LoRALinear:
    for p in layer.parameters():
        if p.requires_grad:
            p += torch.randn(p.shape, generator=seeded(seed), dtype=p.dtype)
    return layer


# --- 1: adapters that are dead from the start


def assert_alive(model: nn.Module, optimizer: Optimizer) -> None:
    """One of the two factors has a gradient at once, and after two steps both have moved."""
    before = snapshot(model)
    back(model, 7)
    for layer in layers(model):
        assert layer.A.grad is not None and layer.B.grad is not None
        assert bool(layer.B.grad.any()) and not layer.A.grad.any(), layer.site
    optimizer.step()
    walk(model, optimizer, 1, start=8)
    for name, p in model.named_parameters():
        assert not p.requires_grad or not torch.equal(p, before[name]), name


@pytest.mark.parametrize("train_scale", [False, True])
def test_adapters_live_at_the_start_and_after_a_merge(train_scale: bool) -> None:
    model, optimizer, config = made(relora(train_scale=train_scale))
    assert_alive(model, optimizer)
    config.method.after_step(model, optimizer, EVENT, Rng(0))
    assert_alive(model, optimizer)


@pytest.mark.parametrize("when", ["start", "merge"])
def test_both_factors_at_zero_as_released_are_a_saddle(when: str) -> None:
    model, optimizer, config = made(relora())
    if when == "merge":
        walk(model, optimizer, 2)
        config.method.after_step(model, optimizer, EVENT, Rng(0))
    with torch.no_grad():
        for layer in layers(model):
            layer.A.zero_()
    with pytest.raises(AssertionError):
        assert_alive(model, optimizer)
    walk(model, optimizer, 5)
    assert not any(bool(layer.A.any() or layer.B.any()) for layer in layers(model))


# --- 2: a merge that changes the function

sizes = st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8))


@EXAMPLES
@given(sizes, st.floats(0.1, 100), st.booleans(), st.booleans(), st.integers(1, 10**6))
def test_a_merge_keeps_the_function_and_a_second_one_does_nothing(
    size: tuple[int, int, int], alpha: float, bias: bool, train_scale: bool, step: int
) -> None:
    n, m, r = size
    layer = alone(n, m, r, alpha=alpha, bias=bias)
    if train_scale:
        layer.train_scale()
    scramble(layer)
    x = torch.randn(3, 5, m, generator=seeded(2), dtype=torch.float64)
    before, W = layer(x), layer.weight.clone()
    layer.merge(step, Rng(0))
    size_of = max(1.0, before.abs().max().item())
    assert_close(layer(x), before, rtol=0, atol=1e-13 * size_of)
    assert not layer.B.any() and not torch.equal(layer.weight, W)
    merged = layer.weight.clone()
    layer.merge(step + 1, Rng(0))
    assert torch.equal(layer.weight, merged)


def test_a_merge_at_s_2_is_exact_to_1e_12_and_adds_s_b_a() -> None:
    layer = scramble(alone(48, 20, 4, alpha=8.0))
    W, B, A, bias = (p.detach().clone() for p in (layer.weight, layer.B, layer.A, layer.bias))
    x = torch.randn(64, 20, generator=seeded(2), dtype=torch.float64)
    before = layer(x)
    assert_close(before, F.linear(x, W + 2 * B @ A, bias), rtol=0, atol=1e-12)
    layer.merge(3, Rng(0))
    assert (layer(x) - before).abs().max() < 1e-12
    assert_close(layer.weight.detach(), W + 2 * B @ A, rtol=0, atol=1e-14)
    assert torch.equal(layer.bias, bias)


def test_a_merge_into_bf16_rounds_up_or_down_and_not_always_to_the_nearest() -> None:
    layer = alone(64, 48, 4, alpha=8.0, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.B.copy_(0.005 * torch.randn(64, 4, generator=seeded()))
    exact = layer.effective_weight().detach()
    assert exact.dtype == torch.float32
    layer.merge(3, Rng(0))
    merged = layer.weight.float()
    ulp = exact.abs().log2().floor().exp2() * 2**-7
    assert bool(((merged - exact).abs() < ulp).all())
    assert not torch.equal(layer.weight, exact.to(torch.bfloat16))
    bias = ((merged - exact) / ulp).mean().item()
    assert abs(bias) < 0.03  # 3072 draws of deviation below 0.5: 0.009


def test_the_rounding_of_a_merge_has_the_address_of_its_site_and_step() -> None:
    merged = []
    for site, step in (("one", 3), ("one", 3), ("two", 3), ("one", 6)):
        layer = alone(16, 12, 4, alpha=8.0, dtype=torch.bfloat16)
        with torch.no_grad():
            layer.weight.fill_(0.5)
            layer.A.fill_(1.0)
            layer.B.fill_(1e-4)
        layer.site = site
        layer.merge(step, Rng(0))
        merged.append(layer.weight.clone())
    assert [torch.equal(merged[0], W) for W in merged] == [True, True, False, False]


def test_a_fresh_a_is_kaiming_and_has_the_address_of_its_site_and_step() -> None:
    like = torch.zeros((), dtype=torch.float64)
    A = fresh_A("one", 3, 50, 400, Rng(0), like)
    assert A.dtype == torch.float64 and A.shape == (50, 400)
    assert A.abs().max() <= 1 / 20 and A.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.01)
    again = [fresh_A(*at, 50, 400, rng, like) for at, rng in [
        (("one", 3), Rng(0)), (("one", 6), Rng(0)), (("two", 3), Rng(0)), (("one", 3), Rng(1))
    ]]  # fmt: skip
    assert [torch.equal(A, other) for other in again] == [True, False, False, False]


def test_a_merge_draws_a_for_each_layer_anew() -> None:
    model, optimizer, config = made(relora())
    drawn = []
    for step in (EVENT, 2 * EVENT):
        walk(model, optimizer, 1)
        config.method.after_step(model, optimizer, step, Rng(0))
        for layer in layers(model):
            r, m = layer.A.shape
            assert torch.equal(layer.A, fresh_A(layer.site, step, r, m, Rng(0), layer.A))
            drawn.append(layer.A[0, :16].tolist())
    assert len({tuple(a) for a in drawn}) == 2 * 14


def test_a_trained_scale_returns_to_alpha_over_r() -> None:
    model, optimizer, config = made(relora(train_scale=True, alpha=6.0))
    walk(model, optimizer, 3)
    scales = [layer.s for layer in layers(model)]
    assert all(s is not None and s.shape == (1,) and s.item() != 3.0 for s in scales)
    config.method.after_step(model, optimizer, EVENT, Rng(0))
    assert all(s is not None and s.item() == 3.0 for s in scales)


def test_a_trained_scale_is_at_least_fp32() -> None:
    layer = alone(6, 4, 2, alpha=3.0, dtype=torch.bfloat16)
    layer.train_scale()
    assert layer.s is not None and layer.s.dtype == torch.float32 and layer.s.item() == 1.5


def test_a_start_at_zero_is_a_saddle_until_the_first_merge() -> None:
    """As in the released code; what is not adapted learns meanwhile."""
    model, optimizer, config = made(relora(start="zero", warm_start_steps=0))
    before = snapshot(model)
    walk(model, optimizer, 3)
    for layer in layers(model):
        assert not layer.A.any() and not layer.B.any()
    head = "lm_head.weight"
    assert not torch.equal(model.get_parameter(head), before[head])
    config.method.after_step(model, optimizer, EVENT, Rng(0))
    assert_alive(model, optimizer)


def test_a_merge_without_s_adds_b_a_and_changes_the_function() -> None:
    """As in the small-model study's code: of s B A the part (s - 1) B A is lost."""
    layer = scramble(alone(5, 7, 2, alpha=6.0, bias=False))
    W, B, A = (p.detach().clone() for p in (layer.weight, layer.B, layer.A))
    before = layer.effective_weight().detach()
    layer.merge(1, Rng(0), scaled=False)
    assert_close(layer.weight, W + B @ A, rtol=0, atol=1e-12)
    assert_close(before - layer.effective_weight(), 2 * B @ A, rtol=0, atol=1e-12)
    assert not layer.B.any()


@pytest.mark.parametrize("scaled, s", [(True, 3.0), (False, 1.0)])
def test_the_setting_says_whether_merges_are_scaled(scaled: bool, s: float) -> None:
    model, optimizer, config = made(relora(merge_scaled=scaled, alpha=6.0, warm_start_steps=0))
    walk(model, optimizer, 3)
    wanted = [m.weight.detach() + s * m.B.detach() @ m.A.detach() for m in layers(model)]
    config.method.after_step(model, optimizer, EVENT, Rng(0))
    for layer, W in zip(layers(model), wanted, strict=True):
        assert_close(layer.weight, W, rtol=0, atol=1e-12)


# --- 3: a reset that is lost (the same after a resume: test_relora_runs.py)


@pytest.mark.parametrize("reset, still", [("zero", True), ("keep", False)])
def test_after_a_merge_a_step_without_gradients_leaves_b_at_0(reset: str, still: bool) -> None:
    model, optimizer, config = made(relora(reset=reset))
    walk(model, optimizer, 3)
    config.method.after_step(model, optimizer, EVENT, Rng(0))
    before = snapshot(model)
    zero_gradients(model)
    optimizer.step()
    for layer in layers(model):
        assert bool(layer.B.any()) is not still
        assert torch.equal(layer.A, before[f"{layer.site}.A"]) is still
    head = "lm_head.weight"  # its momentum lives
    assert not torch.equal(model.get_parameter(head), before[head])


# --- 4: moments zeroed and the step kept, or the reverse


def updates(reset_to: dict[str, Any], steps: int, past: float) -> list[float]:
    """|update| / lr of the factors under a gradient of 1, after a reset at an age of `past`."""
    model, optimizer, config = made(relora(**reset_to), optim={"lr": 1e-2, "eps": 1e-14})
    walk(model, optimizer, 3)
    for state in optimizer.state.values():
        state["step"].fill_(past)
    config.method.after_step(model, optimizer, EVENT, Rng(0))
    found = []
    for _ in range(steps):
        before = snapshot(model)
        for p in model.parameters():
            p.grad = torch.ones_like(p) if p.requires_grad else None
        optimizer.step()
        moved = [
            (before[f"{layer.site}.{x}"] - getattr(layer, x).detach()) / 1e-2
            for layer in layers(model)
            for x in "AB"
        ]
        flat = torch.cat([x.flatten() for x in moved])
        assert_close(flat, flat[:1].expand_as(flat), rtol=1e-6, atol=0)
        found.append(flat[0].item())
    return found


def test_after_a_reset_a_constant_gradient_moves_by_exactly_the_learning_rate() -> None:
    found = updates({}, 5, past=3)
    assert [found[k - 1] for k in (1, 2, 5)] == pytest.approx([1.0] * 3, rel=1e-9)


def test_pico_compat_keeps_the_step_and_moves_by_up_to_6_57_times_as_much() -> None:
    """The published numbers hold at a great age."""
    found = updates({"pico_compat": True}, 12, past=1e6)
    assert found[0] == pytest.approx(3.16, abs=5e-3) and found[11] == pytest.approx(6.57, abs=5e-3)


# --- 5: pruning


def pruned(**given: Any) -> list[tuple[Tensor, Tensor, float]]:
    """(m, v, step) of every factor after a partial reset; before it none of them is 0."""
    model, optimizer, config = made(relora(**given))
    walk(model, optimizer, 3)
    states = [optimizer.state[p] for layer in layers(model) for p in (layer.A, layer.B)]
    for seed, state in enumerate(states):
        m = torch.randn(state["exp_avg"].shape, generator=seeded(seed), dtype=torch.float64)
        state["exp_avg"].copy_((3 * m).round() + 0.5)  # ties
        state["exp_avg_sq"].copy_(torch.rand(m.shape, generator=seeded(seed)) + 0.1)
    config.method.after_step(model, optimizer, EVENT, Rng(0))
    return [(s["exp_avg"], s["exp_avg_sq"], s["step"].item()) for s in states]


@pytest.mark.parametrize("reset", ["magnitude", "random"])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.99, 1.0])
def test_pruning_removes_exactly_the_fraction_by_one_mask(reset: str, fraction: float) -> None:
    for m, v, step in pruned(reset=reset, reset_fraction=fraction):
        assert int((v == 0).sum()) == round(fraction * v.numel()) == int((m == 0).sum())
        assert torch.equal(m == 0, v == 0) and step == 0


@pytest.mark.parametrize("reset", ["magnitude", "random"])
def test_pico_compat_has_two_masks_and_keeps_the_step(reset: str) -> None:
    found = pruned(reset=reset, reset_fraction=0.5, pico_compat=True)
    for m, v, step in found:
        assert int((v == 0).sum()) == round(0.5 * v.numel()) == int((m == 0).sum())
        assert step == 3
    orphans = sum(int(((m != 0) & (v == 0)).sum()) for m, v, _ in found)
    assert orphans / sum(m.numel() for m, *_ in found) == pytest.approx(0.25, abs=0.05)


def test_random_resets_differ_from_layer_to_layer_and_from_factor_to_factor() -> None:
    found = pruned(reset="random", reset_fraction=0.5, rank=2)
    masks = [tuple((m == 0).flatten()[:32].tolist()) for m, *_ in found]
    assert len(set(masks)) == len(masks)


# --- 7: what an event touches

EVENTS: dict[str, tuple[dict[str, Any], set[str], set[str]]] = {
    "both": ({}, {"A", "B", "s"}, {"A", "B", "s", "weight"}),
    "a merge alone": ({"reset_every": 0}, set(), {"A", "B", "s", "weight"}),
    "a merge that keeps": ({"reset": "keep"}, set(), {"A", "B", "s", "weight"}),
    "a reset alone": ({"merge_every": 0}, {"A", "B", "s"}, set()),
    "a reset of A": ({"reset_factors": "A"}, {"A"}, {"A", "B", "s", "weight"}),
}


@pytest.mark.parametrize("case", EVENTS)
def test_an_event_touches_the_adapters_alone(case: str) -> None:
    """At rank 7 some matrices stay dense; their moments, and those of all the rest, stay."""
    given, forgotten, changed = EVENTS[case]
    model, optimizer, config = made(relora(rank=7, train_scale=True, **given), model=QWEN)
    walk(model, optimizer, 3)
    before, weights = moments(model, optimizer), snapshot(model)
    method = config.method
    assert not method.after_step(model, optimizer, EVENT - 1, Rng(0))
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    method.after_step(model, optimizer, EVENT, Rng(0))
    after = moments(model, optimizer)
    assert after.keys() == before.keys()
    sites = {layer.site for layer in layers(model)}
    assert 0 < len(sites) < 14
    for key, value in before.items():
        site, _, letter = key.partition("/")[0].rpartition(".")
        wanted = value * 0 if site in sites and letter in forgotten else value
        assert torch.equal(after[key], wanted) and (value.any() or "_bias" in key), key
    for name, p in model.named_parameters():
        site, _, letter = name.rpartition(".")
        assert torch.equal(p, weights[name]) is not (site in sites and letter in changed), name


def test_lora_never_merges() -> None:
    assert LoRA().after_step(NOTHING, torch.optim.AdamW([torch.zeros(1)]), 10, Rng(0)) == {}


# --- 8: weight decay (on the factors alone: test_optim.py)


def test_weight_decay_leaves_the_frozen_matrix_and_the_trained_scale_alone() -> None:
    model, optimizer, _ = made(relora(train_scale=True), optim={"lr": 0.1, "weight_decay": 0.5})
    before = snapshot(model)
    zero_gradients(model)
    optimizer.step()
    for layer in layers(model):
        assert torch.equal(layer.weight, before[f"{layer.site}.weight"])
        assert layer.s is not None and torch.equal(layer.s, before[f"{layer.site}.s"])
        assert_close(layer.A.detach(), 0.95 * before[f"{layer.site}.A"], rtol=1e-12, atol=0)


# --- dropout


def test_dropout_is_on_the_input_of_a_in_training_only() -> None:
    layer = scramble(alone(6, 9, 3, alpha=6.0, dropout=0.4))
    x = torch.randn(7, 9, generator=seeded(2), dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    found = layer(x)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.4)
    assert 0 < int((dropped == 0).sum()) < x.numel()
    wanted = F.linear(x, layer.weight, layer.bias) + 2 * dropped @ layer.A.T @ layer.B.T
    assert_close(found, wanted, rtol=0, atol=1e-12)
    layer.eval()
    assert_close(layer(x), F.linear(x, layer.effective_weight(), layer.bias), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_those_of_the_written_out_formula(dropout: float) -> None:
    layer = scramble(alone(6, 9, 3, alpha=6.0, dropout=dropout))
    layer.train_scale()
    x = torch.randn(7, 9, generator=seeded(2), dtype=torch.float64, requires_grad=True)
    trained = {"x": x} | {n: p for n, p in layer.named_parameters() if p.requires_grad}
    torch.manual_seed(5)
    found = torch.autograd.grad(layer(x).square().sum(), list(trained.values()))
    torch.manual_seed(5)
    dropped = F.dropout(x, dropout)
    y = F.linear(x, layer.weight, layer.bias) + layer.s * (dropped @ layer.A.T @ layer.B.T)
    wanted = torch.autograd.grad(y.square().sum(), list(trained.values()))
    assert trained.keys() == {"x", "A", "B", "s", "bias"}
    for name, a, b in zip(trained, found, wanted, strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-10, msg=name)


# --- the switch


@pytest.mark.parametrize("name", ["lora", "relora", "dora"])
def test_each_phase_has_its_own_learning_rate(name: str) -> None:
    method = tiny_method(name, warm_start_steps=2, warm_start_lr=0.3)
    optim = OptimConfig(lr=0.7, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0)
    model = nn.Linear(2, 2)
    rates = [method.optimizer(model, [], optim, phase).param_groups[0]["lr"] for phase in (0, 1)]
    assert rates == [0.3, 0.7]
    cold = replace(method, warm_start_steps=0)  # type: ignore[type-var]
    assert cold.optimizer(model, [], optim, 0).param_groups[0]["lr"] == 0.7
