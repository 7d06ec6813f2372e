"""LORO with the orthographic retraction: its steps, reports, singular factors, laws and runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from byhand import back, made, seeded, snapshot, walk
from oracles import algebra
from support import rows, tiny, tiny_method
from torch import Tensor, nn

from peptrain import testing
from peptrain.estimation.estimate import estimate
from peptrain.methods.loro import LORO
from peptrain.models.sites import reparametrized
from peptrain.optim.loro import LOROOptimizer, LORORule
from peptrain.rng import Rng
from peptrain.training.loop import train

BETAS = (0.9, 0.999)


def method(**given: Any) -> LORO:
    found = tiny_method("loro", retraction="orthographic", **given)
    assert isinstance(found, LORO)
    return found


def pairs(model: nn.Module) -> list[tuple[str, Any, Any]]:
    found: list[Any] = list(reparametrized(model))
    return [(layer.site, layer.B, layer.A) for layer in found]


def product(B: Tensor, A: Tensor) -> Tensor:
    return B.detach().double() @ A.detach().double()


@pytest.mark.parametrize("law", testing.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("around", ["none", "frozen"])
@pytest.mark.parametrize("exact_every", [1, 3])
def test_it_keeps_the_laws_of_a_method(
    law: testing.Law, around: str, exact_every: int, corpus: Path
) -> None:
    law(method(around=around, exact_every=exact_every, refresh_every=3), corpus)


@pytest.mark.parametrize("direction", ["adam", "raw"])
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_its_exact_steps_are_those_of_the_oracle(direction: str, precision: str) -> None:
    """Every third one, with lr_p and without c; the others are as ever."""
    given = {"refresh": "none", "direction": direction}
    lr = 0.01 if direction == "adam" else 1.0
    sections: dict[str, Any] = {"train": {"precision": precision}, "optim": {"lr": lr}}
    model, optimizer, config = made(method(exact_every=3, **given), **sections)
    for step in range(1, 7):
        back(model, step)
        before = snapshot(model)
        past = {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
        optimizer.step()
        metrics = config.method.after_step(model, optimizer, step, Rng(0))
        assert ("exact_step_ratio" in metrics) == (step % 3 == 0)
        ratios = []
        for site, B, A in pairs(model) if step % 3 == 0 else ():
            directions = []
            for p in (B, A):
                g, old_m, old_v = (x.double() for x in (p.grad, *past[p].values()))
                m, v = 0.9 * old_m + 0.1 * g, 0.999 * old_v + 0.001 * g**2
                directions.append(algebra.loro_direction(m, v, 1e-6) if direction == "adam" else g)
            old = before[f"{site}.B"].double(), before[f"{site}.A"].double()
            rate = algebra.loro_rate(lr, step, BETAS)
            wanted = algebra.loro_orthographic(*old, *directions, rate)
            at = 1e-12 if precision == "fp64" else 1e-5
            torch.testing.assert_close(product(B, A), wanted, rtol=at, atol=at)
            W = old[0] @ old[1]
            assert float((wanted - W).norm()) > 10 * at * float(W.norm())
            ratios.append(float((wanted - W).norm() / W.norm()))
        if ratios:
            assert float(metrics["exact_step_ratio"]) == pytest.approx(max(ratios), rel=1e-4)
            assert int(metrics["singular_factor_pairs_warning"]) == 0


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
def test_a_singular_factor_takes_the_svds_step_and_is_reported(precision: str) -> None:
    sections: dict[str, Any] = {"train": {"precision": precision}, "optim": {"lr": 0.01}}
    found = {}
    for retraction in ("riemannian", "orthographic"):
        given = {"retraction": retraction, "exact_every": 1, "refresh": "none"}
        model, optimizer, config = made(tiny_method("loro", **given), **sections)
        with torch.no_grad():
            _, B, _ = pairs(model)[0]
            B[:, 1] = 2 * B[:, 0]
        walk(model, optimizer, 1)
        metrics = config.method.after_step(model, optimizer, 1, Rng(0))
        assert int(metrics["singular_factor_pairs_warning"]) == 1
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        found[retraction] = [p.detach() for p in pairs(model)[0][1:]]
        others = [p.detach() for p in pairs(model)[1][1:]]
        found[f"{retraction} of another"] = others
    assert all(map(torch.equal, found["riemannian"], found["orthographic"]))
    other = (found[f"{retraction} of another"] for retraction in ("riemannian", "orthographic"))
    assert not all(map(torch.equal, *other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_that_is_no_number_ends_an_exact_step_as_nan(dtype: torch.dtype) -> None:
    rule = LORORule(1, 0, "orthographic", "adam", "adam", 0.0, "none")
    factors = [
        torch.randn(s, generator=seeded()).to(dtype).requires_grad_() for s in ((6, 2), (2, 5))
    ]
    group = {"params": factors, "factors": True, "scales": [0.5, 0.5]}
    optimizer = LOROOptimizer([group], rule, lr=0.1, betas=BETAS, eps=1e-6)
    for p in factors:
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    assert all(p.isnan().all() for p in factors)


@pytest.mark.parametrize("cap", [None, 0.1])
def test_a_step_out_of_its_range_is_the_svds(cap: float | None) -> None:
    """At a rate at which Uᵀ Z V is far from I. With a cap it is within its range."""
    given: dict[str, Any] = {"exact_every": 1, "refresh": "none", "exact_cap": cap, "rank": 8}
    found = {}
    for retraction in ("riemannian", "orthographic"):
        chosen = tiny_method("loro", retraction=retraction, **given)
        model, optimizer, config = made(chosen, optim={"lr": 3.0})
        walk(model, optimizer, 1)
        metrics = config.method.after_step(model, optimizer, 1, Rng(0))
        found[retraction] = [product(B, A) for _, B, A in pairs(model)]
        assert int(metrics["singular_factor_pairs_warning"]) == 0
        if cap:
            assert float(metrics["exact_step_ratio"]) < 1.42 * cap
    same = [torch.equal(a, b) for a, b in zip(*found.values(), strict=True)]
    assert not any(same) if cap else any(same)


@pytest.mark.parametrize("refresh", ["all", "none"])
@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
def test_columns_beyond_the_rank_of_the_product_become_0_and_stay(
    precision: str, refresh: str
) -> None:
    """Such pairs are singular, and take the SVD's step."""
    given = {"exact_every": 3, "refresh": refresh, "rank": 20, "include": "q,k,v,o"}
    sections: dict[str, Any] = {"train": {"precision": precision}, "optim": {"lr": 0.01}}
    model, optimizer, _ = made(method(**given), **sections)
    walk(model, optimizer, 8)
    for _, B, A in pairs(model):
        k = min(B.shape[0], A.shape[1])
        assert not B[:, k:].any() and not A[k:].any() and bool(B.detach()[:, :k].any(0).all())


def test_a_first_step_from_b_of_0_is_the_svds_and_the_next_are_its_own() -> None:
    """Around a frozen W, with K = 1."""
    model, optimizer, config = made(
        method(around="frozen", exact_every=1, refresh="none"), optim={"lr": 0.02}
    )
    counts = []
    for step in range(1, 4):
        back(model, step)
        optimizer.step()
        metrics = config.method.after_step(model, optimizer, step, Rng(0))
        counts.append(int(metrics["singular_factor_pairs_warning"]))
    assert counts == [len(pairs(model)), 0, 0]
    assert all((B @ A).any() for _, B, A in pairs(model))


def test_a_refresh_follows_its_steps_too() -> None:
    model, optimizer, _ = made(method(exact_every=2), optim={"lr": 0.02})
    walk(model, optimizer, 2)
    assert not any(t.any() for s in optimizer.state.values() for t in s.values())
    assert {g["age"] for g in optimizer.param_groups} == {0}


@pytest.mark.slow
def test_a_run_of_exact_steps_alone_learns_as_fast(corpus: Path, tmp_path: Path) -> None:
    """Within a few hundredths of the SVD's; and it makes no eigendecomposition."""
    ends = {}
    for retraction in ("riemannian", "orthographic"):
        given = {"exact_every": 1, "refresh": "none", "rank": 4, "retraction": retraction}
        run = tmp_path / retraction
        train(tiny(tiny_method("loro", **given), corpus, run, train={"steps": 60}))
        ends[retraction] = rows(run)[-1]["loss"]
    assert abs(ends["riemannian"] - ends["orthographic"]) < 0.1
    config = tiny(method(exact_every=2), corpus, train={"device": "cpu"})
    (event,) = estimate(config).phases[0].events
    assert event.decompositions and not {"eigh", "svd"} & set(event.decompositions)
