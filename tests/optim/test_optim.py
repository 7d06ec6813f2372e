"""Who forgets what and when: resets, weight decay, and LORO's optimizer and its clocks."""

import copy
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from byhand import back, made, moments, seeded, snapshot, walk, zero_gradients
from oracles import algebra
from support import tiny_method
from torch import Tensor, nn
from torch.linalg import svdvals
from torch.optim import AdamW

from peptrain.errors import ConfigError
from peptrain.methods import METHODS
from peptrain.methods.bpt import BPTLinear
from peptrain.methods.loro import LORO
from peptrain.methods.lowrank import LowRankLinear
from peptrain.models.sites import reparametrized
from peptrain.optim.adamw import OptimConfig, adamw, keep_mask, reset_moments
from peptrain.optim.loro import LOROOptimizer, LORORule
from peptrain.rng import Rng

D, R, BETAS = 16, 2, (0.9, 0.999)
"""Hidden size and rank of the tiny model."""


# --- reset_moments on the AdamW that training uses


def one_parameter(*shape: int, weight_decay: float = 0.0) -> tuple[nn.Parameter, AdamW]:
    """A parameter with a past: five steps of random gradients."""
    p = nn.Parameter(torch.randn(*shape, dtype=torch.float64, generator=seeded()))
    optimizer = AdamW([p], 0.01, BETAS, 1e-12, weight_decay=weight_decay, fused=True)
    for seed in range(5):
        p.grad = torch.randn(*shape, dtype=torch.float64, generator=seeded(seed))
        optimizer.step()
    return p, optimizer


def test_after_a_full_reset_adam_starts_like_new() -> None:
    """Moments zeroed and the step kept would give 3.16 at k = 1, rising to 6.57 (trap 4)."""
    p, optimizer = one_parameter(3, 4)
    reset_moments(optimizer, p, "zero", 1.0, seeded())
    p.grad = torch.ones_like(p)
    for _ in range(5):
        before = p.detach().clone()
        optimizer.step()
        torch.testing.assert_close(before - p.detach(), torch.full_like(p, 0.01), rtol=1e-9, atol=0)


def test_a_reset_is_in_place() -> None:
    """A popped state would be missing from a checkpoint, a new tensor from a sharded one."""
    for mode in ("zero", "magnitude", "random"):
        p, optimizer = one_parameter(3, 4)
        before = dict(optimizer.state[p])
        reset_moments(optimizer, p, mode, 0.5, seeded())  # type: ignore[arg-type]
        after = optimizer.state[p]
        assert after.keys() == before.keys() and all(after[k] is before[k] for k in before)
        assert float(after["step"]) == 0


def test_a_zero_parameter_stays_0_through_a_step_without_gradients() -> None:
    for mode, still in (("zero", True), ("keep", False)):
        p, optimizer = one_parameter(3, 4, weight_decay=0.1)
        with torch.no_grad():
            p.zero_()
        reset_moments(optimizer, p, mode, 1.0, seeded())  # type: ignore[arg-type]
        p.grad = torch.zeros_like(p)
        optimizer.step()
        assert bool((p == 0).all()) is still


@pytest.mark.parametrize("mode", ["magnitude", "random"])
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.99, 0.999, 1.0])
@pytest.mark.parametrize("values", ["distinct", "ties", "one value", "zeros"])
def test_pruning_removes_exactly_the_fraction_asked(
    mode: str, fraction: float, values: str
) -> None:
    p, optimizer = one_parameter(50, 40)
    state = optimizer.state[p]
    if values == "ties":
        state["exp_avg"].copy_((state["exp_avg"] * 30).round().abs() + 1)
    elif values != "distinct":
        state["exp_avg"].fill_(float(values == "one value"))
    m, v = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    reset_moments(optimizer, p, mode, fraction, seeded(3))  # type: ignore[arg-type]
    new_m, new_v = state["exp_avg"], state["exp_avg_sq"]
    gone = new_v == 0  # v is nowhere 0 before
    assert int(gone.sum()) == round(fraction * 2000)
    # One mask: an m that outlives its v would move by m / eps.
    assert bool((new_v[new_m != 0] != 0).all()) and bool((new_m[gone] == 0).all())
    assert torch.equal(new_m[~gone], m[~gone]) and torch.equal(new_v[~gone], v[~gone])
    if mode == "magnitude" and 0 < fraction < 1:
        assert float(m.abs()[gone].max()) <= float(m.abs()[~gone].min())


def test_a_random_prune_depends_on_its_generator_alone() -> None:
    m = torch.ones(30, 20)
    one, same, other = (keep_mask(m, "random", 0.5, seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_pruning_is_not_limited_to_what_quantile_can_take() -> None:
    """torch.quantile refuses more than 2^24 elements (trap 5)."""
    m = torch.ones(2**24 + 8, dtype=torch.bfloat16)
    mask = keep_mask(m, "magnitude", 0.25, seeded())
    assert int((mask == 0).sum()) == 2**22 + 2


@pytest.mark.parametrize("mode", ["magnitude", "random", "zero"])
def test_the_step_count_restarts_or_is_kept_with_the_moments(mode: str) -> None:
    """At a constant gradient kept moments with their count move by the learning rate, and with a
    restarted one by 0.32, 0.15, 0.22 and 0.43 of it. Zeroed ones are right after a restart."""
    one = torch.ones((), dtype=torch.float64)
    for step, right in (("restart", [0.32, 0.15, 0.22, 0.43]), ("keep", [1.0] * 4)):
        p, optimizer = one_parameter(5, 8)
        state = optimizer.state[p]
        state["step"].fill_(10_000)
        for key in ("exp_avg", "exp_avg_sq"):
            state[key].fill_(1.0)
        reset_moments(optimizer, p, mode, 0.5, seeded(), step=step)  # type: ignore[arg-type]
        kept, count = state["exp_avg"] != 0, 10_000 if step == "keep" else 0
        assert torch.equal(kept, state["exp_avg_sq"] != 0)
        assert int(kept.sum()) == (0 if mode == "zero" else 20)
        assert float(state["step"]) == count
        moments = {True: (one, one), False: (0 * one, 0 * one)}
        for k in range(1, 201):
            before = p.detach().clone()
            p.grad = torch.ones_like(p)
            optimizer.step()
            moved = before - p.detach()
            for is_kept, (m, v) in moments.items():
                update, *moments[is_kept] = algebra.adam_update(
                    0 * one, one, m, v, count + k, 0.01, BETAS, 1e-8
                )
                assert torch.allclose(moved[kept == is_kept], -update.to(p.dtype), rtol=1e-4)
            if mode != "zero" and k in (1, 12, 50, 200):
                found = float(moved[kept].mean()) / 0.01
                assert found == pytest.approx(right[(1, 12, 50, 200).index(k)], abs=0.01)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 0.99, 0.999, 1.0])
@pytest.mark.parametrize("n", [1, 10, 101, 2000])
def test_pico_compat_prunes_what_is_not_above_the_quantile(n: int, fraction: float) -> None:
    p, optimizer = one_parameter(n)
    state = optimizer.state[p]
    m, v = torch.randperm(n, generator=seeded(1)) + 1.0, torch.randperm(n, generator=seeded(2)) + 1
    state["exp_avg"].copy_(-m)
    state["exp_avg_sq"].copy_(v)
    reset_moments(optimizer, p, "magnitude", fraction, seeded(), pico_compat=True)
    for given, left in ((m, state["exp_avg"]), (v.double(), state["exp_avg_sq"])):
        threshold = torch.quantile(given.double(), fraction)
        assert torch.equal(left != 0, given > threshold)
        assert int((left == 0).sum()) == math.floor(fraction * (n - 1)) + 1


def test_keep_leaves_everything_and_a_reset_before_the_first_step_is_nothing() -> None:
    p, optimizer = one_parameter(3, 4)
    before = {k: t.clone() for k, t in optimizer.state[p].items()}
    reset_moments(optimizer, p, "keep", 0.9, seeded())
    assert all(torch.equal(before[k], t) for k, t in optimizer.state[p].items())
    fresh = AdamW([p], 0.01)
    reset_moments(fresh, p, "zero", 1.0, seeded())
    assert not fresh.state.get(p)


# --- a merge of BPT


@pytest.mark.parametrize("reset", ["zero", "magnitude", "random", "keep"])
def test_a_merge_resets_the_moments_of_u_and_v_alone(reset: str) -> None:
    model, optimizer, config = made(tiny_method("bpt", reset=reset, reset_fraction=0.5))
    walk(model, optimizer, 3)
    before, weights = moments(model, optimizer), snapshot(model)
    assert not config.method.after_step(model, optimizer, 2, Rng(0))  # not due
    assert torch.equal(moments(model, optimizer)[next(iter(before))], before[next(iter(before))])
    config.method.after_step(model, optimizer, 3, Rng(0))
    after = moments(model, optimizer)
    assert after.keys() == before.keys()
    factors = {key for key in before if key.split("/")[0].endswith((".U", ".V"))}
    assert len(factors) == 3 * 2 * 14  # exp_avg, exp_avg_sq and step of U and V at 14 sites
    for key in before.keys() - factors:
        assert torch.equal(before[key], after[key]), key
    for key in factors:
        touched = float((after[key] == 0).double().mean())
        wanted = {"zero": 1.0, "keep": 0.0}.get(reset, 1.0 if key.endswith("/step") else 0.5)
        assert touched == pytest.approx(wanted, abs=0.01), key
    for name, p in model.named_parameters():
        merged = name.endswith((".U", ".V")) or (name.endswith("proj.weight"))
        assert torch.equal(p.detach(), weights[name]) is not merged, name


def test_after_a_merge_a_step_without_gradients_moves_nothing_but_what_was_not_reset() -> None:
    model, optimizer, config = made(tiny_method("bpt"))
    walk(model, optimizer, 3)
    config.method.after_step(model, optimizer, 3, Rng(0))
    before = snapshot(model)
    zero_gradients(model)
    optimizer.step()
    for layer in reparametrized(model):
        assert isinstance(layer, BPTLinear)
        assert not layer.V.any() and torch.equal(layer.U.detach(), before[f"{layer.site}.U"])
        assert not torch.equal(layer.a.detach(), before[f"{layer.site}.a"])  # its momentum lives


# --- weight decay


@pytest.mark.parametrize("qwen", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_decay_falls_on_matrices_only(name: str, qwen: bool) -> None:
    """Never on embeddings, norms, biases, diagonals, whose neutral value is not 0, nor on a frozen
    base (trap 8). One step without gradients shows decay alone."""
    family = {"family": "qwen2", "tied": True} if qwen else {}
    lr, decay = 0.1, 0.5
    head = {} if qwen else {"head_lr": lr}  # where it may have a rate of its own
    optim = {"lr": lr, "weight_decay": decay} | head
    model, optimizer, _ = made(tiny_method(name), model=family, optim=optim)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += 0.5  # biases start at 0, which decay would not move
            elif not p.any():
                p += 0.25  # V
    before = snapshot(model)
    zero_gradients(model)
    optimizer.step()
    shrunk = set()
    for key, p in model.named_parameters():
        if torch.equal(p.detach(), before[key]):
            continue
        shrunk.add(key)
        torch.testing.assert_close(p.detach(), before[key] * (1 - lr * decay), rtol=1e-12, atol=0)
    own = {
        "full": ("weight",),
        "galore": ("weight",),
        "bpt": ("U", "V"),
        "sltrain": ("B", "A", "values"),
        "vera": (),
        "hyperadapt": (),
    }
    letters = own.get(name, ("B", "A"))
    layers = [x for x in dict(model.named_modules()) if x.endswith("_proj")]
    expected = {f"{x}.{y}" for x in layers for y in letters}
    assert len(layers) == 14
    assert shrunk == expected | (set() if qwen else {"lm_head.weight"})
    kinds = {key.rpartition(".")[2] for key in before} - {"weight"} - set(letters)
    kept = {"bpt": {"a", "b"}, "hyperadapt": {"a", "b"}, "dora": {"m"}}
    kept["vera"] = {"lambda_d", "lambda_b", "A", "B"}  # A and B are frozen
    assert kinds == ({"bias"} if qwen else set()) | kept.get(name, set())


def test_only_what_is_trainable_is_in_the_optimizer_and_once() -> None:
    for name in METHODS:
        for tied in (False, True):
            model, optimizer, _ = made(tiny_method(name), model={"tied": tied})
            held = [p for g in optimizer.param_groups for p in g["params"]]
            assert len({id(p) for p in held}) == len(held)
            assert {id(p) for p in held} == {id(p) for p in model.parameters() if p.requires_grad}


def test_adamw_is_the_textbook_one() -> None:
    layer = nn.Linear(3, 2, dtype=torch.float64)
    optim = OptimConfig(lr=0.01, beta1=0.8, beta2=0.95, eps=1e-3, weight_decay=0.0)
    optimizer = adamw(layer, optim)
    state = {p: (p.detach().clone(), p.detach() * 0, p.detach() * 0) for p in layer.parameters()}
    for k in range(1, 6):
        for seed, (p, (q, m, v)) in enumerate(state.items()):
            g = torch.randn(p.shape, dtype=torch.float64, generator=seeded(10 * k + seed))
            p.grad = g
            state[p] = algebra.adam_update(q, g, m, v, k, 0.01, (0.8, 0.95), 1e-3)
        optimizer.step()
        for p, (q, _, _) in state.items():
            torch.testing.assert_close(p.detach(), q, rtol=0, atol=1e-14)


# --- LORO's optimizer


def loro(**given: Any) -> LORO:
    method = tiny_method("loro", **({"exact_every": 0} | given))
    assert isinstance(method, LORO)
    return method


def loro_made(lr: float = 0.01, **given: Any) -> tuple[nn.Module, LOROOptimizer]:
    model, optimizer, _ = made(loro(**given), optim={"lr": lr})
    assert isinstance(optimizer, LOROOptimizer)
    return model, optimizer


def pairs(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    for layer in reparametrized(model):
        assert isinstance(layer, LowRankLinear)
        yield layer.site, layer.B, layer.A


def gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad.clone()


SCALES: list[tuple[str, Callable[[int, int], float]]] = [
    ("hidden", lambda n, m: R / D),
    ("rows", lambda n, m: R / n),
    ("min", lambda n, m: R / min(n, m)),
    ("0.3", lambda n, m: 0.3),
]


@pytest.mark.parametrize("scale, c", SCALES)
def test_approximate_steps_are_loros_adam(scale: str, c: Callable[[int, int], float]) -> None:
    """c = r/d on the factors, d the model's width for gate and down too; 1 elsewhere."""
    model, optimizer = loro_made(scale=scale)
    factor = {}
    for site, B, A in pairs(model):
        factor |= {f"{site}.B": c(B.shape[0], A.shape[1]), f"{site}.A": c(B.shape[0], A.shape[1])}
    assert len(factor) == 28 and any(".mlp.down_proj" in name for name in factor)
    state = {name: (q, q * 0, q * 0) for name, q in snapshot(model).items()}
    for k in range(1, 5):
        back(model, k)
        for name, p in model.named_parameters():
            q, m, v = state[name]
            lr = 0.01 * factor.get(name, 1.0)
            state[name] = algebra.adam_update(q, gradient(p), m, v, k, lr, BETAS, 1e-6, "loro")
        optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), state[name][0], rtol=0, atol=1e-13, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_fused_step_is_the_formula(dtype: torch.dtype) -> None:
    """p = (1 - lr decay) p - lr_p c D at any k, c and decay: the rate goes into no other term."""
    at = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 0.01}[dtype]
    rule = loro_made()[1].rule
    for seed in range(30):
        chance = random.Random(seed)
        lr, eps, decay = 10 ** chance.uniform(-4, -1), 10 ** chance.uniform(-9, -2), seed % 3 * 0.3
        betas = (chance.uniform(0, 0.95), chance.uniform(0.5, 0.999))
        cs = [c for c in (chance.uniform(0.01, 2), 0.25, chance.uniform(0.01, 2)) for _ in "BA"]
        shapes = [(chance.randint(1, 9), chance.randint(1, 9)) for _ in cs]
        params = [nn.Parameter(torch.randn(*s, generator=seeded(seed)).to(dtype)) for s in shapes]
        group = {"params": params, "factors": True, "scales": cs, "weight_decay": decay}
        optimizer = LOROOptimizer([group], rule, lr=lr, betas=betas, eps=eps)
        optimizer.param_groups[0]["age"] = age = chance.choice([0, 1, 7, 300, 10**5])
        for p in params:
            p.grad = torch.randn(p.shape, generator=seeded(seed + 1)).to(dtype)
            optimizer.state[p] = {"exp_avg": 0.3 * p.grad.sin(), "exp_avg_sq": p.grad.cos() ** 2}
        before = [
            [t.detach().double().clone() for t in (p, gradient(p), *state.values())]
            for p, state in optimizer.state.items()
        ]
        optimizer.step()
        for p, c, (q, g, m, v) in zip(params, cs, before, strict=True):
            q, m, v = algebra.adam_update(
                q * (1 - lr * decay), g, m, v, age + 1, lr * c, betas, eps, "loro"
            )
            for found, right in zip((p, *optimizer.state[p].values()), (q, m, v), strict=True):
                assert found.dtype == dtype
                torch.testing.assert_close(found.detach().double(), right, rtol=at, atol=at)
            assert optimizer.state[p].keys() == {"exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("direction", ["adam", "raw"])
def test_every_k_th_step_is_exact_without_c(direction: str) -> None:
    K, lr = 3, 0.01
    model, optimizer = loro_made(lr, exact_every=K, refresh="none", direction=direction)
    for step in range(1, 2 * K + 1):
        back(model, step)
        before, past = snapshot(model), moments(model, optimizer)
        grads = {name: gradient(p) for name, p in model.named_parameters()}
        optimizer.step()
        for site, B, A in pairs(model):
            names = [f"{site}.B", f"{site}.A"]
            found = B.detach() @ A.detach()
            zero = torch.zeros((), dtype=torch.float64)
            updated = [
                algebra.adam_update(
                    before[x], grads[x], past.get(f"{x}/exp_avg", zero),
                    past.get(f"{x}/exp_avg_sq", zero), step, lr * R / D, BETAS, 1e-6, "loro",
                )
                for x in names
            ]  # fmt: skip
            if step % K:
                approximate = updated[0][0] @ updated[1][0]
                torch.testing.assert_close(found, approximate, rtol=0, atol=1e-13)
                continue
            lr_p = algebra.loro_rate(lr, step, BETAS)
            D_B, D_A = (
                algebra.loro_direction(m, v, 1e-6) if direction == "adam" else grads[x]
                for x, (_, m, v) in zip(names, updated, strict=True)
            )
            W = algebra.loro_exact_directions(before[names[0]], before[names[1]], D_B, D_A, lr_p)
            torch.testing.assert_close(found, W, rtol=0, atol=1e-12)
            sigma = svdvals(W)[:R]
            torch.testing.assert_close(svdvals(B.detach()).square(), sigma, rtol=0, atol=1e-12)
            torch.testing.assert_close(svdvals(A.detach()).square(), sigma, rtol=0, atol=1e-12)
    assert int(optimizer.damped) == 0


@pytest.mark.parametrize("refresh", ["all", "none"])
@pytest.mark.parametrize("retraction", ["riemannian", "svd"])
@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
def test_columns_beyond_the_rank_of_the_product_become_0_and_stay(
    precision: str, retraction: str, refresh: str
) -> None:
    """Also if the moments from before the exact step are kept."""
    model, optimizer, _ = made(
        loro(exact_every=3, refresh=refresh, retraction=retraction, rank=20, include="q,k,v,o"),
        train={"precision": precision}, optim={"lr": 0.01},
    )  # fmt: skip
    ranks = {site: min(B.shape[0], A.shape[1]) for site, B, A in pairs(model)}
    assert min(ranks.values()) < 20
    for step in range(1, 9):
        walk(model, optimizer, 1, start=step)
        for site, B, A in pairs(model):
            k = ranks[site]
            surplus = torch.cat([B[:, k:].flatten(), A[k:].flatten()])
            assert not surplus.any() if step >= 3 else surplus.numel() == 0 or surplus.any()
            assert bool(B.detach()[:, :k].any(0).all())


@pytest.mark.parametrize("cap", [None, 0.3])
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_an_exact_step_reports_how_far_it_moves_and_may_be_limited(
    precision: str, cap: float | None
) -> None:
    """The ratio is the worst pair's, those above a half are counted for a warning, and nothing is
    reported of other steps or of the ablation without an exact step."""
    given = {"refresh": "none", "exact_every": 1, "rank": 15, "include": "q,k"}
    model, optimizer, config = made(
        loro(exact_cap=cap, **given), train={"precision": precision}, optim={"lr": 0.1}
    )
    back(model, 0)
    before = snapshot(model)
    grads = {name: gradient(p).double() for name, p in model.named_parameters()}
    optimizer.step()
    ratios = []
    for site, B, A in pairs(model):
        b, a = f"{site}.B", f"{site}.A"
        D_B, D_A = (
            algebra.loro_direction(0.1 * grads[x], 0.001 * grads[x] ** 2, 1e-6) for x in (b, a)
        )
        old = before[b].double(), before[a].double(), D_B, D_A
        W, rate = old[0] @ old[1], algebra.loro_rate(0.1, 1, BETAS)
        if cap:
            rate = algebra.loro_capped_rate(*old, rate, cap)
        new = algebra.loro_exact_directions(*old, rate)
        found = B.detach().double() @ A.detach().double()
        torch.testing.assert_close(found, new, rtol=1e-5, atol=1e-6)
        ratios.append(float(torch.linalg.norm(new - W) / torch.linalg.norm(W)))
    metrics = config.method.after_step(model, optimizer, 1, Rng(0))
    assert float(metrics["exact_step_ratio"]) == pytest.approx(max(ratios), rel=1e-5)
    large = sum(ratio > 0.5 for ratio in ratios)
    assert int(metrics["pairs_with_exact_step_ratio_above_half_warning"]) == large
    assert large if cap is None else max(ratios) == pytest.approx(cap, rel=0.01)
    for other in (loro(exact_every=2), loro(exact_every=1, retraction="svd")):
        model, optimizer, config = made(other)
        walk(model, optimizer, 1)
        assert "exact_step_ratio" not in config.method.after_step(model, optimizer, 1, Rng(0))


@pytest.mark.parametrize("cap", [0.0, -1.0, math.inf, math.nan])
def test_a_cap_is_a_finite_number_above_0(cap: float) -> None:
    with pytest.raises(ConfigError, match=r"method\.exact_cap: must be a finite number > 0 \(got"):
        LORO(rank=2, exact_cap=cap)


def test_a_cap_of_steps_that_are_never_taken_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.exact_cap: must be unset with retraction svd"):
        LORO(rank=2, exact_cap=0.5, retraction="svd")


@pytest.mark.parametrize("refresh", ["all", "factors", "none"])
def test_a_refresh_zeroes_what_it_names(refresh: str) -> None:
    model, optimizer = loro_made(exact_every=3, refresh=refresh)
    walk(model, optimizer, 3)
    names = {name: name.endswith((".B", ".A")) for name, _ in model.named_parameters()}
    for key, value in moments(model, optimizer).items():
        is_factor = names[key.split("/")[0]]
        zeroed = refresh == "all" or (refresh == "factors" and is_factor)
        assert (not value.any()) is zeroed, key
    for group in optimizer.param_groups:
        zeroed = refresh == "all" or (refresh == "factors" and group["factors"])
        assert group["age"] == (0 if zeroed else 3) and group["clock"] == 3


def test_refreshes_have_a_clock_of_their_own() -> None:
    model, optimizer = loro_made(exact_every=4, refresh_every=2)
    balanced, ages = [], []
    for step in range(1, 9):
        walk(model, optimizer, 1, start=step)
        ages.append(optimizer.param_groups[0]["age"])
        _, B, A = next(pairs(model))
        gap = svdvals(B.detach()) - svdvals(A.detach())
        balanced.append(float(gap.abs().max()) < 1e-12)
    assert ages == [1, 0] * 4
    assert [i + 1 for i, flag in enumerate(balanced) if flag] == [4, 8]


def test_after_a_refresh_a_constant_gradient_moves_by_the_learning_rate() -> None:
    """|update| / (lr c) = 1 at every k: moments and their clock are reset together (trap 4)."""
    model, optimizer = loro_made(exact_every=3, refresh="all")
    walk(model, optimizer, 3)
    for group in optimizer.param_groups:
        group["eps"] = 0.0
    optimizer.rule = replace(optimizer.rule, exact_every=0, refresh_every=0)
    for _ in range(5):
        before = snapshot(model)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        for name, p in model.named_parameters():
            c = R / D if name.endswith((".B", ".A")) else 1.0
            moved = (before[name] - p.detach()) / (0.01 * c)
            torch.testing.assert_close(moved, torch.ones_like(p), rtol=0, atol=1e-9)


def test_a_step_at_no_learning_rate_moves_nothing_and_counts() -> None:
    """Restarts have real steps with lr 0: k and the clock of exact steps go on."""
    model, optimizer = loro_made(exact_every=3, refresh="none")
    for step in range(1, 7):
        before = {site: (B @ A).detach() for site, B, A in pairs(model)}
        still = snapshot(model)
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        walk(model, optimizer, 1, start=step)
        assert all(g["clock"] == g["age"] == step for g in optimizer.param_groups)
        for name, p in model.named_parameters():
            if not name.endswith((".B", ".A")) or step % 3:
                assert torch.equal(p.detach(), still[name])
        for site, B, A in pairs(model):  # an exact step rebalances the factors of the same W
            torch.testing.assert_close((B @ A).detach(), before[site], rtol=0, atol=1e-14)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    before, past = snapshot(model), moments(model, optimizer)
    back(model, 7)
    name, p = next(iter(model.named_parameters()))
    expected, _, _ = algebra.adam_update(
        before[name], gradient(p), past[f"{name}/exp_avg"], past[f"{name}/exp_avg_sq"], 7, 0.01,
        BETAS, 1e-6, "loro",
    )  # fmt: skip
    optimizer.step()
    torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-14)


def test_a_state_dict_holds_the_clocks() -> None:
    """Also when the fresh optimizer made its state by a step of lr 0, as torch's DCP does."""
    model, optimizer = loro_made(exact_every=3, refresh_every=2)
    walk(model, optimizer, 5)
    everyone = [(model, optimizer)]
    for steps_before_loading in (0, 1):
        copied, fresh = loro_made(exact_every=3, refresh_every=2)
        if steps_before_loading:
            zero_gradients(copied)
            for group in fresh.param_groups:
                group["lr"] = 0.0
            fresh.step()
        copied.load_state_dict(model.state_dict())
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert [(g["clock"], g["age"], g["lr"]) for g in fresh.param_groups] == [(5, 1, 0.01)] * 3
        everyone.append((copied, fresh))
    for each in everyone:
        walk(*each, 4, start=5)
    one, *others = (snapshot(each) for each, _ in everyone)
    assert all(torch.equal(one[name], other[name]) for other in others for name in one)


def test_with_bf16_factors_the_exact_step_is_computed_in_fp32() -> None:
    """The one error is the rounding of the new factors to bf16."""
    model, optimizer, _ = made(
        loro(exact_every=1, refresh="none"), train={"precision": "bf16"}, optim={"lr": 0.01}
    )
    back(model, 0)
    before = {name: p.detach().double() for name, p in model.named_parameters()}
    grads = {name: gradient(p).double() for name, p in model.named_parameters()}
    optimizer.step()
    lr_p = algebra.loro_rate(0.01, 1, BETAS)
    for site, B, A in pairs(model):
        assert B.dtype == A.dtype == torch.bfloat16
        D_B, D_A = (
            algebra.loro_direction(0.1 * g, 0.001 * g**2, 1e-6)
            for g in (grads[f"{site}.B"], grads[f"{site}.A"])
        )
        W = algebra.loro_exact_directions(before[f"{site}.B"], before[f"{site}.A"], D_B, D_A, lr_p)
        error = float(torch.linalg.norm(B.detach().double() @ A.detach().double() - W))
        assert error < 0.005 * float(torch.linalg.norm(W))
        sigma = svdvals(W)[:R].sqrt()
        torch.testing.assert_close(svdvals(B.detach().double()), sigma, rtol=0.005, atol=0)


@pytest.mark.parametrize("exact_every", [0, 1])
def test_the_preconditioned_ablation(exact_every: int) -> None:
    """Raw gradients at the plain lr, no c; its exact step is the ordinary one."""
    model, optimizer = loro_made(update="precond", precond_eps=1e-3, exact_every=exact_every)
    back(model, 0)
    before = snapshot(model)
    grads = {name: gradient(p) for name, p in model.named_parameters()}
    optimizer.step()
    for site, B, A in pairs(model):
        b, a = f"{site}.B", f"{site}.A"
        if not exact_every:
            expected = algebra.precond_step(before[b], before[a], grads[b], grads[a], 0.01, 1e-3)
            torch.testing.assert_close((B.detach(), A.detach()), expected, rtol=0, atol=1e-12)
            continue
        lr_p = algebra.loro_rate(0.01, 1, BETAS)
        D_B, D_A = (
            algebra.loro_direction(0.1 * grads[x], 0.001 * grads[x] ** 2, 1e-6) for x in (b, a)
        )
        W = algebra.loro_exact_directions(before[b], before[a], D_B, D_A, lr_p)
        torch.testing.assert_close(B.detach() @ A.detach(), W, rtol=0, atol=1e-12)


@pytest.mark.parametrize("update", ["adam", "precond"])
def test_the_svd_ablation_rebalances_an_approximate_step(update: str) -> None:
    plain, without = loro_made(update=update, refresh="none")
    model, optimizer = loro_made(update=update, refresh="none", exact_every=3, retraction="svd")
    for start in range(3):
        for each in ((plain, without), (model, optimizer)):
            walk(*each, 1, start=start)
    for (_, B, A), (_, B0, A0) in zip(pairs(model), pairs(plain), strict=True):
        W = (B0 @ A0).detach()
        torch.testing.assert_close((B @ A).detach(), W, rtol=0, atol=1e-13)
        sigma = svdvals(W)[:R]
        torch.testing.assert_close(svdvals(B.detach()).square(), sigma, rtol=0, atol=1e-13)
        torch.testing.assert_close(svdvals(A.detach()).square(), sigma, rtol=0, atol=1e-13)
        assert not torch.allclose(svdvals(B0.detach()).square(), sigma, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
def test_a_singular_factor_is_reported_and_does_no_harm(precision: str) -> None:
    model, optimizer, config = made(
        loro(exact_every=1, refresh="none"), train={"precision": precision}, optim={"lr": 0.01}
    )
    _, B, _ = next(pairs(model))
    with torch.no_grad():
        B[:, 1] = 2 * B[:, 0]
    before = snapshot(model)
    walk(model, optimizer, 1)
    metrics = config.method.after_step(model, optimizer, 1, Rng(0))
    assert (
        float(metrics["singular_factor_pairs_warning"]) == 1 and float(metrics["exact_steps"]) == 1
    )
    for name, p in model.named_parameters():
        assert bool(p.isfinite().all()), name
        # Adam's directions over balanced factors move W by about lr; a lost direction may not
        # multiply that by 1 / eps.
        assert float((p.detach() - before[name]).abs().max()) < 10, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_that_is_no_number_ends_an_exact_step_as_nan(dtype: torch.dtype) -> None:
    """And not as an error of the SVD's: the trainer says at which step a run diverged."""
    rule = LORORule(1, 0, "riemannian", "adam", "adam", 0.0, "none")
    pairs = [
        torch.randn(s, generator=seeded()).to(dtype).requires_grad_() for s in ((6, 2), (2, 5))
    ]
    group = {"params": pairs, "factors": True, "scales": [0.5, 0.5]}
    optimizer = LOROOptimizer([group], rule, lr=0.1, betas=(0.9, 0.999), eps=1e-6)
    for p in pairs:
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    assert all(p.isnan().all() for p in pairs)
