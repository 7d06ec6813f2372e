"""The initialisations of W = B A: what they are drawn from, and what they do to W."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from byhand import made, seeded
from support import tiny_method
from torch import Tensor, nn
from torch.testing import assert_close

from peptrain.errors import ConfigError
from peptrain.methods import LORO, LowRank
from peptrain.methods.lowrank import LowRankLinear
from peptrain.models.sites import Site, reparametrized
from peptrain.rng import Rng
from peptrain.settings.fields import as_before

N, M, R = 96, 160, 24
both_methods = pytest.mark.parametrize("method", [LowRank, LORO])


def site(n: int = N, m: int = M, *, fresh: bool = True) -> Site:
    parent = nn.ModuleDict({"layer": nn.Linear(m, n, dtype=torch.float64)})
    return replace(Site("layer", parent, m), fresh=fresh)


def factors(method: type[LowRank], seed: int = 0, **given: Any) -> tuple[Tensor, Tensor]:
    layer = method(rank=R, **given).layer(site(), Rng(seed))
    return layer.B.detach(), layer.A.detach()


@both_methods
def test_orthogonal_factors_are_frames_of_one_length(method: type[LowRank]) -> None:
    B, A = factors(method, init="orthogonal")
    g2 = 0.02 * math.sqrt(N * M / R)
    unit = g2 * torch.eye(R, dtype=torch.float64)
    assert_close(B.T @ B, unit, rtol=0, atol=1e-6)
    assert_close(A @ A.T, unit, rtol=0, atol=1e-6)
    sigma = torch.linalg.svdvals(B @ A)
    assert_close(sigma[:R], torch.full((R,), g2, dtype=torch.float64), rtol=1e-6, atol=0)
    assert sigma[R] < 1e-12
    assert (B @ A).square().mean().sqrt().item() == pytest.approx(0.02, rel=1e-6)


@both_methods
@pytest.mark.parametrize("given, std", [({}, 0.01), ({"init_std": 0.1}, 0.1)])
def test_normal_factors_have_the_deviation_asked_for(
    method: type[LowRank], given: dict[str, float], std: float
) -> None:
    B, A = factors(method, init="normal", **given)
    for factor in (B, A):  # of k entries the deviation scatters by 1 / sqrt(2 k), here 0.015
        assert factor.std().item() == pytest.approx(std, rel=0.06)
        assert abs(factor.mean().item()) < 5 * std / math.sqrt(factor.numel())
    assert variances(method, init="normal", **given) == pytest.approx(R * std**4, rel=0.03)


@both_methods
def test_xavier_is_the_default_and_has_its_variance(method: type[LowRank]) -> None:
    B, A = factors(method)
    wanted = [torch.empty(N, R), torch.empty(R, M)]
    for factor, name in zip(wanted, "BA", strict=True):
        nn.init.xavier_normal_(factor, generator=Rng(0)("layer", purpose=name))
    assert torch.equal(B, wanted[0].double()) and torch.equal(A, wanted[1].double())
    assert variances(method) == pytest.approx(4 * R / ((N + R) * (R + M)), rel=0.03)


def variances(method: type[LowRank], **given: Any) -> float:
    """The mean of the squared entries of B A, over 20 seeds."""
    drawn = [factors(method, seed, **given) for seed in range(20)]
    return sum((B @ A).square().mean().item() for B, A in drawn) / 20


@both_methods
@pytest.mark.parametrize("init", ["xavier", "normal", "orthogonal"])
def test_a_draw_depends_on_the_seed_and_on_nothing_else(method: type[LowRank], init: str) -> None:
    first, again, other = (factors(method, seed, init=init) for seed in (3, 3, 4))
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_given_weight_is_factorised_whatever_the_initialisation() -> None:
    at = site(8, 6, fresh=False)
    W = torch.randn(8, 6, generator=seeded(1), dtype=torch.float64)
    at.linear.weight = nn.Parameter(W)
    layer = LowRank(rank=6, init="orthogonal").layer(at, Rng(0))
    assert_close(layer.effective_weight().detach(), W)


def test_a_model_is_built_with_it() -> None:
    model, _, _ = made(tiny_method("loro", init="orthogonal"))
    layers = [layer for layer in reparametrized(model) if isinstance(layer, LowRankLinear)]
    assert layers
    for layer in layers:
        assert layer.effective_weight().square().mean().sqrt().item() == pytest.approx(0.02)


@both_methods
def test_what_does_not_fit_the_initialisation_is_refused_by_name(method: type[LowRank]) -> None:
    for init in ("xavier", "orthogonal"):
        with pytest.raises(ConfigError, match=r"method\.init_std: is of method\.init normal only"):
            method(init=init, init_std=0.1)
    with pytest.raises(ConfigError, match=r"method\.init_std: must be a finite number > 0 \(got 0"):
        method(init="normal", init_std=0.0)
    with pytest.raises(ConfigError, match=r"method\.init: orthogonal needs .* = 5 in layer, 5 x 9"):
        method(init="orthogonal", rank=6).layer(site(5, 9), Rng(0))


@both_methods
def test_an_older_run_was_initialised_by_xavier(method: type[LowRank]) -> None:
    older = as_before(method(init="normal", init_std=0.1), written={"rank"})
    assert (older.init, older.init_std) == ("xavier", None)
