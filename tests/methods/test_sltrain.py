"""SLTrain: its linear map against dense autograd, and its supports."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from byhand import made, seeded, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from support import tiny, tiny_method
from torch import Tensor, nn

from peptrain.adaptation import adapt
from peptrain.errors import ConfigError
from peptrain.methods.sltrain import SLTrain, SLTrainLinear, support
from peptrain.models.sites import Site, reparametrized
from peptrain.ops.sparse import sparse_linear, sparse_weight
from peptrain.rng import Rng
from peptrain.testing import newest
from peptrain.training.loop import train


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def dense(B: Tensor, A: Tensor, values: Tensor, indices: Tensor, s: float) -> Tensor:
    """W entry by entry: s times a row of B into a column of A, and the values at their places."""
    n, m = B.shape[0], A.shape[1]
    rows = [[s * (B[i] * A[:, j]).sum() for j in range(m)] for i in range(n)]
    for value, place in zip(values, indices.tolist(), strict=True):
        rows[place // m][place % m] = rows[place // m][place % m] + value
    return torch.stack([torch.stack(row) for row in rows])


# --- the map


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 6),
    m=st.integers(1, 6),
    r=st.integers(1, 4),
    lead=st.sampled_from([(), (3,), (2, 3), (0,)]),
    s=st.sampled_from([0.25, 1.0, 3.0]),
    seed=st.integers(0, 10**6),
)
def test_the_map_and_its_gradients_are_those_of_the_dense_matrix(
    n: int, m: int, r: int, lead: tuple[int, ...], s: float, seed: int
) -> None:
    nnz = 1 + seed % (n * m)
    indices = support(n * m, nnz, seeded(seed))
    given = [normal(*shape, seed=seed + i)
             for i, shape in enumerate([(*lead, m), (n, r), (r, m), (nnz,)])]  # fmt: skip
    ours, theirs = ([t.clone().requires_grad_() for t in given] for _ in range(2))
    y = sparse_linear(*ours, indices, s)
    x, *parts = theirs
    wanted = x @ dense(*parts, indices, s).T
    torch.testing.assert_close(y, wanted, rtol=0, atol=1e-12)
    upstream = normal(*lead, n, seed=seed + 9)
    for a, b in zip(torch.autograd.grad(y, ours, upstream),
                    torch.autograd.grad(wanted, theirs, upstream), strict=True):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_no_matrix_is_kept_for_the_backward_pass() -> None:
    n, m, r, nnz = 37, 41, 3, 45
    x, B, A, values = (t.requires_grad_() for t in (
        normal(5, m, seed=0), normal(n, r, seed=1), normal(r, m, seed=2), normal(nnz, seed=3)
    ))  # fmt: skip
    kept: list[int] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        sparse_linear(x, B, A, values, support(n * m, nnz, seeded(0)), 0.5).sum().backward()
    assert sorted(kept) == sorted([5 * m, n * r, r * m, nnz, nnz])
    assert values.grad is not None and values.grad.shape == (nnz,)


def test_the_input_needs_no_gradient() -> None:
    B, A, values = (normal(*s, seed=1).requires_grad_() for s in ((4, 2), (2, 5), (3,)))
    indices = support(20, 3, seeded(0))
    sparse_linear(normal(6, 5, seed=0), B, A, values, indices, 2.0).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in (B, A, values))


def test_bf16_computes_and_fp32_is_what_the_parameters_get() -> None:
    x, B, A, values = (t.float().requires_grad_() for t in (
        normal(64, 32, seed=0), normal(48, 4, seed=1), normal(4, 32, seed=2), normal(50, seed=3)
    ))  # fmt: skip
    indices = support(48 * 32, 50, seeded(0))
    with torch.autocast("cpu", torch.bfloat16):
        y = sparse_linear(x, B, A, values, indices, 0.25)
    assert y.dtype == torch.bfloat16
    upstream = normal(64, 48, seed=4).float()
    found = torch.autograd.grad(y, [x, B, A, values], upstream.bfloat16())
    exact = torch.autograd.grad(
        x @ dense(B, A, values, indices, 0.25).T, [x, B, A, values], upstream
    )
    for a, b in zip(found, exact, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < 0.01 * b.norm()


# --- the support


@pytest.mark.parametrize("size, nnz", [(1, 1), (20, 1), (20, 20), (1000, 30)])
def test_a_support_has_its_size_ascends_and_names_no_place_twice(size: int, nnz: int) -> None:
    found = support(size, nnz, seeded(5))
    assert found.dtype == torch.int32 and found.shape == (nnz,)
    assert found.min() >= 0 and found.max() < size and (found.diff() > 0).all()


def test_every_place_is_as_likely() -> None:
    """Of 4000 supports of 6 in 30 each place is in 800, give or take 5 times 25; and each pair of
    neighbours in 4000 * 30/870 = 138, give or take 5 times 11.5: they are not drawn apart."""
    draws = torch.stack([support(30, 6, Rng(0)("x", i)) for i in range(4000)]).long()
    taken = torch.zeros(4000, 30).scatter_(1, draws, 1.0)
    assert (taken.sum(0) - 800).abs().max() < 125
    assert ((taken[:, 1:] * taken[:, :-1]).sum(0) - 138).abs().max() < 58


def layers(seed: int = 0, **given: Any) -> dict[str, SLTrainLinear]:
    model, _, _ = made(tiny_method("sltrain", **given), train={"seed": seed})
    found = (x for x in reparametrized(model) if isinstance(x, SLTrainLinear))
    return {layer.site: layer for layer in found}


def test_a_support_depends_on_the_seed_and_the_site_alone() -> None:
    one, again, other = layers(), layers(rank=1, exclude="q,k", alpha=4.0), layers(seed=1)
    assert len(one) == 14 and len(again) == 10
    assert all(torch.equal(layer.indices, one[site].indices) for site, layer in again.items())
    assert not any(torch.equal(layer.indices, one[site].indices) for site, layer in other.items())
    first, second = (one[f"model.layers.{i}.mlp.up_proj"].indices for i in (0, 1))
    assert not torch.equal(first, second)


def test_a_run_keeps_its_support_and_its_checkpoints_do_without(
    corpus: Path, tmp_path: Path
) -> None:
    """The places are the seed's; the same after a resume, as test_laws.py has it."""
    train(tiny("sltrain", corpus, tmp_path / "run"))
    saved = newest(tmp_path / "run")
    assert {n.rpartition(".")[2] for n in saved.model} == {"A", "B", "values", "weight"}
    for site, layer in layers().items():
        assert saved.model[f"{site}.values"].shape == layer.indices.shape
    assert not any("indices" in key for key in (*saved.model, *saved.optimizer))


def test_a_state_taken_to_a_loop_of_another_seed_brings_its_support() -> None:
    """`adapt` has no configuration that would refuse another seed."""
    trainings = []
    for seed in (1, 2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 24))
        trainings.append((model, adapt(model, SLTrain(rank=2), steps=4, seed=seed, fresh=True)))
    (one, first), (two, second) = trainings
    x = torch.randn(3, 24, generator=seeded(0))
    assert not torch.equal(one(x), two(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(one(x), two(x))


# --- where it starts


@pytest.mark.parametrize("density", [0.03, 0.5])
def test_a_fresh_layer_is_its_sparse_part_alone(density: float) -> None:
    """A like nn.Linear's own weights, B = 0, S uniform up to 1/sqrt(m)."""
    n, m = 96, 64
    parent = nn.ModuleDict({"x": nn.Linear(m, n)})
    layer = SLTrainLinear(Site("x", parent, m), 8, 32.0, density, Rng(0))
    nnz = int(density * n * m)
    assert layer.s == 4.0 and layer.values.shape == layer.indices.shape == (nnz,)
    assert not layer.B.any() and layer.bias is parent["x"].bias
    bound = 1 / math.sqrt(m)
    for p in (layer.A, layer.values):
        assert 0.95 * bound < p.abs().max() <= bound
        assert p.detach().std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    W = layer.effective_weight()
    assert int((W != 0).sum()) == nnz
    torch.testing.assert_close(W.flatten()[layer.indices], layer.values)


@pytest.mark.parametrize("alpha", [4.0, 32.0])
def test_a_trained_matrix_is_approximated(alpha: float) -> None:
    """s B A is the best of its rank, and on the support nothing is lost."""
    parent = nn.ModuleDict({"x": nn.Linear(9, 14, dtype=torch.float64)})
    W = normal(14, 9, seed=0)
    with torch.no_grad():
        parent["x"].weight.copy_(W)  # type: ignore[operator, union-attr]
    layer = SLTrainLinear(Site("x", parent, 9, fresh=False), 3, alpha, 0.3, Rng(0))
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    best = (U[:, :3] * sigma[:3]) @ Vt[:3]
    wanted = best.flatten()
    at = layer.indices.long()
    wanted[at] = W.flatten()[at]
    found = layer.effective_weight().detach()
    torch.testing.assert_close(found, wanted.view(14, 9), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        torch.linalg.svdvals(layer.B.detach()), torch.linalg.svdvals(layer.A.detach())
    )


def test_the_effective_weight_is_at_least_fp32() -> None:
    parts = (normal(6, 2, seed=0), normal(2, 8, seed=1), normal(5, seed=2))
    indices = support(48, 5, seeded(0))
    given = [p.bfloat16() for p in parts]
    W = sparse_weight(given[0], given[1], given[2], indices, 0.5, torch.float32)
    exact = dense(*(p.double() for p in given), indices, 0.5)
    torch.testing.assert_close(W.double(), exact, rtol=0, atol=1e-6)


def test_only_the_support_of_s_moves() -> None:
    """With s B A held still, W changes at the support's places and nowhere else."""
    model, optimizer, _ = made(tiny_method("sltrain"))
    layer = next(x for x in reparametrized(model) if isinstance(x, SLTrainLinear))
    before = layer.effective_weight().detach().clone()
    layer.values.grad = torch.ones_like(layer.values)
    kept = snapshot(layer)
    optimizer.step()
    moved = (layer.effective_weight().detach() != before).flatten().nonzero().flatten()
    assert torch.equal(moved, layer.indices.long())
    assert torch.equal(layer.A, kept["A"]) and torch.equal(layer.B, kept["B"])


@pytest.mark.parametrize(
    "key, value",
    [("density", 0.0), ("density", 1.0), ("density", -0.1), ("alpha", 0.0), ("rank", 0)],
)
def test_settings_that_cannot_be_are_named(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^method\.{key}: must be .*got {value}\)"):
        SLTrain(**{key: value})  # type: ignore[arg-type]


def test_the_values_count_in_the_rule() -> None:
    """At 20 x 20 the factors of rank 9 are 360 of 400 numbers, and a tenth of them is 40 more."""
    site = Site("x", nn.ModuleDict({"x": nn.Linear(20, 20)}), 20)
    assert SLTrain(rank=9, density=0.09).chosen([site]) == [site]
    with pytest.raises(ConfigError, match=r"rank 9 .* rank is 8$"):
        SLTrain(rank=9, density=0.1).chosen([site])
