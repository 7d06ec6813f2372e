"""GaLore: its optimizer against the paper's loop, its projections, and its state."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from byhand import back, made, seeded, snapshot, walk
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import projected
from support import Killed, kill_at, tiny, tiny_method
from torch import Tensor, nn
from torch.optim import AdamW

from peptrain.errors import ConfigError
from peptrain.methods.galore import GaLore, ProjectedLinear
from peptrain.models.sites import reparametrized
from peptrain.ops.projection import leading_directions, project, rotated
from peptrain.optim.adamw import clip_gradients, set_lr
from peptrain.optim.galore import GaLoreOptimizer, GaLoreRule
from peptrain.testing import EVENT, STEPS, differences, newest
from peptrain.training.loop import resume, train

BETAS = (0.9, 0.99)
SHAPES = [(5, 9), (9, 5), (6, 6), (1, 4), (4, 1), (2, 2)]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def alone(
    W: Tensor, rank: int, rule: GaLoreRule, lr: float = 0.01, eps: float = 1e-3, decay: float = 0.0
) -> tuple[nn.Parameter, GaLoreOptimizer]:
    """An optimizer of one projected matrix."""
    p = nn.Parameter(W.clone())
    group = {"params": [p], "projected": True, "weight_decay": decay}
    return p, GaLoreOptimizer([group], rule, {p: rank}, lr=lr, betas=BETAS, eps=eps)


def stepped(p: nn.Parameter, optimizer: GaLoreOptimizer, G: Tensor) -> Tensor:
    p.grad = G.clone()
    optimizer.step()
    return p.detach().clone()


# --- against the paper's loop


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    rank=st.integers(1, 7),
    gap=st.sampled_from([0, 1, 2, 3, 5]),
    rotate=st.booleans(),
    decay=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 10**6),
)
def test_the_steps_are_the_papers_loop(
    shape: tuple[int, int], rank: int, gap: int, rotate: bool, decay: float, seed: int
) -> None:
    """Tall, wide and square, over several SVDs; a rate of 0 moves nothing but the moments. The
    gradients share a part, or a rotated moment would have nothing to carry over."""
    rank = min(rank, *shape)
    W, common = normal(*shape, seed=seed), normal(*shape, seed=seed + 1)
    gradients = [common + 0.7 * normal(*shape, seed=seed + 2 + t) for t in range(8)]
    rates = [0.02, 0.01, 0.0, 0.03, 0.01, 0.02, 0.0, 0.01]
    rule = GaLoreRule(gap, 0.25, "rotate" if rotate else "keep")
    p, optimizer = alone(W, rank, rule, decay=decay)
    right = projected.galore(
        W.numpy(), [G.numpy() for G in gradients], rates,
        r=rank, gap=gap, scale=0.25, betas=BETAS, eps=1e-3, decay=decay, rotate=rotate,
    )  # fmt: skip
    for G, lr, wanted in zip(gradients, rates, right, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        found = stepped(p, optimizer, G)
        torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=0, atol=1e-8)


def test_what_moments_do_at_a_new_projection_matters() -> None:
    """Else the test above could not tell the two apart."""
    ends = []
    for moments in ("keep", "rotate"):
        p, optimizer = alone(normal(5, 9, seed=0), 2, GaLoreRule(2, 0.25, moments))  # type: ignore[arg-type]
        for t in range(4):
            stepped(p, optimizer, normal(5, 9, seed=t + 1))
        ends.append(p.detach())
    assert (ends[0] - ends[1]).abs().max() > 1e-4


@pytest.mark.parametrize("moments", ["keep", "rotate"])
def test_in_a_model_the_sites_follow_the_loop_and_all_else_adamw(moments: str) -> None:
    """At the trainer's rates, after its clipping; bit for bit where AdamW itself can be asked."""
    method = tiny_method("galore", moments=moments, gap=2, exclude="k")
    model, optimizer, _ = made(
        method, model={"family": "qwen2", "kv_heads": 1}, optim={"weight_decay": 0.1, "lr": 0.03}
    )
    sites = {f"{layer.site}.weight" for layer in reparametrized(model)}
    assert len(sites) == 12 and not any("k_proj" in name for name in sites)
    start, grads = snapshot(model), []
    twins = {n: nn.Parameter(w.clone()) for n, w in start.items() if n not in sites}
    plain = ("embed_tokens" in n or w.ndim == 1 for n, w in twins.items())
    grouped = [{"params": [w], "weight_decay": 0.0 if p else 0.1}
               for w, p in zip(twins.values(), plain, strict=True)]  # fmt: skip
    adamw = AdamW(grouped, 0.03, (0.9, 0.999), 1e-6, fused=True)
    rates = [0.5, 1.0, 0.25, 0.0, 1.0]
    for t, rate in enumerate(rates):
        back(model, t)
        clip_gradients(model, 0.05)
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        for twin in (optimizer, adamw):
            set_lr(twin, rate)
        for n, w in twins.items():
            w.grad = grads[-1][n]
        optimizer.step()
        adamw.step()
    for n, p in model.named_parameters():
        if n in twins:
            assert torch.equal(p, twins[n]), n
            continue
        wanted = projected.galore(
            start[n].numpy(), [g[n].numpy() for g in grads], [0.03 * rate for rate in rates],
            r=2, gap=2, scale=0.25, betas=(0.9, 0.999), eps=1e-6, decay=0.1,
            rotate=moments == "rotate",
        )  # fmt: skip
        torch.testing.assert_close(p.detach(), torch.from_numpy(wanted[-1]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
def test_between_two_svds_the_weight_moves_in_r_dimensions_and_over_several_in_more(
    shape: tuple[int, int],
) -> None:
    """The sum of low-rank updates is not of low rank: what sets GaLore apart from LoRA."""
    p, optimizer = alone(torch.zeros(shape, dtype=torch.float64), 2, GaLoreRule(4, 0.25, "keep"))
    ranks = []
    for t in range(12):
        moved = stepped(p, optimizer, normal(*shape, seed=t))
        ranks.append(int(torch.linalg.matrix_rank(moved, rtol=1e-9)))
    assert ranks == [2] * 4 + [4] * 4 + [6] * 4


# --- the projection


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_p_is_orthonormal_on_the_shorter_side_and_holds_the_most_of_g(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    G = normal(*shape, seed=3).to(dtype)
    at = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
    sigma = torch.linalg.svdvals(G.double())
    for rank in range(1, min(shape) + 1):
        P = leading_directions(G, rank)
        assert P.dtype == dtype and P.is_contiguous() and P.shape == (min(shape), rank)
        eye = torch.eye(rank, dtype=torch.float64)
        torch.testing.assert_close(P.double().T @ P.double(), eye, rtol=0, atol=at)
        R = project(P, G).double()
        assert R.shape == ((rank, shape[1]) if shape[0] < shape[1] else (shape[0], rank))
        # Each direction holds its own singular value, the largest first.
        norms = R.norm(dim=1 if shape[0] < shape[1] else 0)
        torch.testing.assert_close(norms, sigma[:rank], rtol=at, atol=at)


@pytest.mark.parametrize("shape", SHAPES)
def test_p_does_not_depend_on_the_sign_of_g(shape: tuple[int, int]) -> None:
    G = normal(*shape, seed=4)
    P = leading_directions(G, min(shape))
    assert torch.equal(P, leading_directions(-G, min(shape)))
    largest = P.gather(0, P.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def spread(n: int, m: int, rank: int, ratio: float) -> Tensor:
    """n x m in fp32; the rank-th singular value is `ratio` of the first, the others below that."""
    U, V = (torch.linalg.qr(normal(k, n, seed=k))[0] for k in (n, m))
    top = torch.logspace(0, math.log10(ratio), rank, dtype=torch.float64)
    rest = 0.3 * ratio * torch.linspace(1, 0.1, n - rank, dtype=torch.float64)
    return (U * torch.cat([top, rest]) @ V.T).float()


def test_the_subspace_is_better_than_from_an_svd_in_fp32() -> None:
    """What the Gram matrix's squared condition costs is paid by float64."""
    G, r = spread(96, 160, 24, 1e-5), 24

    def error(P: Tensor) -> float:
        return float(torch.linalg.matrix_norm(P @ P.T - best @ best.T, 2))

    best = torch.linalg.svd(G.double())[0][:, :r]
    single = torch.linalg.svd(G)[0][:, :r].double()
    of_gram = torch.linalg.eigh(G.double() @ G.double().T)[1][:, -r:]
    assert error(of_gram) < 1e-6 and error(single) > 1e-3
    assert error(leading_directions(G, r).double()) < 2e-6


def test_a_gradient_that_is_no_number_reaches_the_weights_and_ends_nothing() -> None:
    for bad in (math.nan, math.inf):
        p, optimizer = alone(normal(3, 5, seed=0), 2, GaLoreRule(1, 0.25, "rotate"))
        stepped(p, optimizer, normal(3, 5, seed=1))
        G = normal(3, 5, seed=2)
        G[1, 2] = bad
        assert not stepped(p, optimizer, G).isfinite().all()


@pytest.mark.parametrize("moments", ["keep", "rotate"])
def test_without_a_gradient_nothing_moves(moments: Any) -> None:
    p, optimizer = alone(normal(3, 5, seed=0), 2, GaLoreRule(1, 0.25, moments))
    for _ in range(3):
        assert torch.equal(stepped(p, optimizer, torch.zeros(3, 5).double()), normal(3, 5, seed=0))


# --- rotated moments


def of_some_steps(r: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of 5 steps, and how many."""
    m, v = torch.zeros(r, k, dtype=torch.float64), torch.zeros(r, k, dtype=torch.float64)
    for t in range(5):
        g = normal(r, k, seed=t)
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g * g
    return m, v, torch.tensor(5.0)


def test_moments_follow_a_basis_that_only_changes_order_and_signs() -> None:
    m, v, k = of_some_steps(3, 7)
    C = torch.tensor([[0.0, -1, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.float64)
    new_m, new_v = rotated(m, v, C, k, BETAS)
    torch.testing.assert_close(new_m, torch.stack([-m[1], m[2], m[0]]), rtol=1e-12, atol=0)
    torch.testing.assert_close(new_v, torch.stack([v[1], v[2], v[0]]), rtol=1e-12, atol=0)


def test_of_a_constant_gradient_the_rotated_moments_are_those_of_the_new_basis() -> None:
    """Without variance all is known: what Adam would have had, had the basis been there."""
    g = normal(3, 7, seed=0)
    C = torch.linalg.qr(normal(3, 3, seed=1))[0]
    k = torch.tensor(4.0)
    u1, u2 = 1 - BETAS[0] ** 4, 1 - BETAS[1] ** 4
    new_m, new_v = rotated(u1 * g, u2 * g * g, C, k, BETAS)
    torch.testing.assert_close(new_m, u1 * (C @ g), rtol=0, atol=1e-12)
    torch.testing.assert_close(new_v, u2 * (C @ g) ** 2, rtol=0, atol=1e-12)


def test_of_uncorrelated_gradients_the_rotated_moments_are_right_on_average() -> None:
    draws, C = 20_000, torch.linalg.qr(normal(3, 3, seed=1))[0]
    sizes = torch.tensor([[3.0], [1.0], [0.3]], dtype=torch.float64)
    g = sizes * normal(3, draws, seed=2) + torch.tensor([[1.0], [-2.0], [0.0]]).double()
    mean, square = g.mean(1, keepdim=True), g.square().mean(1, keepdim=True)
    k = torch.tensor(1e6)  # no bias left
    new_m, new_v = rotated(mean, square, C, k, BETAS)
    turned = C @ g
    torch.testing.assert_close(new_m, turned.mean(1, keepdim=True), rtol=0, atol=1e-9)
    wanted = turned.square().mean(1, keepdim=True)
    torch.testing.assert_close(new_v, wanted, rtol=0.05, atol=0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(0, 10**6))
def test_the_second_moment_stays_at_0_or_more(r: int, seed: int) -> None:
    """Even where m is no mean of numbers whose squares v is the mean of."""
    m, v = 3 * normal(r, 4, seed=seed), normal(r, 4, seed=seed + 1).square()
    C = torch.linalg.qr(normal(r + 2, r + 2, seed=seed + 2))[0][:r, :r]
    new_v = rotated(m, v, C, torch.tensor(3.0), BETAS)[1]
    assert (new_v >= 0).all()


# --- the state


@pytest.mark.parametrize("shape", SHAPES)
def test_the_moments_are_as_long_as_the_longer_side(shape: tuple[int, int]) -> None:
    p, optimizer = alone(normal(*shape, seed=0), 1, GaLoreRule(0, 0.25, "keep"))
    stepped(p, optimizer, normal(*shape, seed=1))
    state, short = optimizer.state[p], min(shape)
    of_r = (1, shape[1]) if shape[0] < shape[1] else (shape[0], 1)
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert shapes == {"P": (short, 1), "step": (), "exp_avg": of_r, "exp_avg_sq": of_r}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 60))
def test_a_matrix_is_projected_if_its_state_is_less_than_adams(n: int, m: int, r: int) -> None:
    state = 2 * r * max(n, m) + r * min(n, m)
    assert (GaLore(rank=r).cost(n, m, r) < n * m) == (state < 2 * n * m)


def test_p_is_made_at_the_first_step_and_at_every_gap_th_after_it() -> None:
    for gap, wanted in ((3, [0, 3, 6]), (1, list(range(8))), (0, [0]), (9, [0])):
        p, optimizer = alone(normal(4, 6, seed=0), 2, GaLoreRule(gap, 0.25, "keep"))
        changed, before = [], torch.zeros(())
        for t in range(8):
            stepped(p, optimizer, normal(4, 6, seed=t + 1))
            if not torch.equal(before, optimizer.state[p]["P"]):
                changed.append(t)
            before = optimizer.state[p]["P"]
        assert changed == wanted


@pytest.mark.parametrize("moments", ["keep", "rotate"])
@pytest.mark.parametrize(
    "precision", ["fp64", pytest.param("fp32", marks=pytest.mark.slow), "bf16"]
)
def test_a_run_goes_on_bit_for_bit_wherever_it_stopped(
    moments: str, precision: str, corpus: Path, tmp_path: Path
) -> None:
    """Just before, at and after the steps that make a P anew."""
    method = tiny_method("galore", moments=moments)
    t = {"precision": precision, "checkpoint_every": 1, "keep": 99}
    train(tiny(method, corpus, tmp_path / "whole", train=t))
    whole = newest(tmp_path / "whole")
    of_p = {key for key in whole.optimizer if key.endswith("/P")}
    assert len(of_p) == 14 and whole.groups[-1]["clock"] == STEPS
    for step in (1, EVENT - 1, EVENT, EVENT + 1):
        run = tmp_path / f"stopped-{step}"
        with pytest.raises(Killed):
            train(tiny(method, corpus, run, train=t), kill_at("checkpoint", step))
        resume(run)
        assert differences(whole, newest(run)) == []


def test_bf16_keeps_all_in_bf16_and_computes_p_in_more(corpus: Path, tmp_path: Path) -> None:
    train(tiny("galore", corpus, tmp_path / "run", train={"precision": "bf16"}))
    found = newest(tmp_path / "run").optimizer
    for key, P in found.items():
        assert P.dtype == (torch.float32 if key.endswith("/step") else torch.bfloat16)
        if key.endswith("/P"):
            # Rounded once: of 2 columns in 8 to 24 dimensions, each entry by 2^-9 of itself.
            off = P.double().T @ P.double() - torch.eye(2, dtype=torch.float64)
            assert off.abs().max() < 2**-7


def test_moments_that_come_into_a_phase_keep_their_count_and_meet_a_new_p() -> None:
    """The clocks begin again at a boundary, the moments of parameters that stay do not."""
    rule = GaLoreRule(4, 0.25, "rotate")
    p, optimizer = alone(normal(4, 6, seed=0), 2, rule)
    gradients = [normal(4, 6, seed=t + 1) for t in range(4)]
    for G in gradients:
        stepped(p, optimizer, G)
    q, other = alone(p.detach(), 2, rule)
    other.state[q] = {key: value.clone() for key, value in optimizer.state[p].items()}
    late = [normal(4, 6, seed=t + 10) for t in range(3)]
    for G in late:
        assert torch.equal(stepped(p, optimizer, G), stepped(q, other, G))
    dense, begun = alone(q.detach(), 2, rule)  # full training's state has no P
    begun.state[dense] = {"step": torch.tensor(7.0), "exp_avg": late[0], "exp_avg_sq": late[0] ** 2}
    fresh, anew = alone(q.detach(), 2, rule)
    assert torch.equal(stepped(dense, begun, late[0]), stepped(fresh, anew, late[0]))


def test_a_closure_gives_the_loss() -> None:
    p, optimizer = alone(normal(3, 5, seed=0), 2, GaLoreRule(1, 0.25, "keep"))

    def closure() -> float:
        p.grad = None
        loss = p.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    first = optimizer.step(closure)
    assert first == pytest.approx(float(normal(3, 5, seed=0).square().sum()))
    assert float(p.detach().square().sum()) < first


def test_a_state_that_was_read_on_the_cpu_moves_to_the_weights() -> None:
    """By torch.load(..., map_location="cpu"). The fused kernel takes moments and count on one
    device; torch moves the count for an optimizer that says it is fused."""
    rule = GaLoreRule(2, 0.25, "keep")
    p, optimizer = alone(normal(5, 9, seed=0), 2, rule)
    stepped(p, optimizer, normal(5, 9, seed=1))
    elsewhere, other = alone(torch.empty(5, 9, device="meta"), 2, rule)
    other.load_state_dict(optimizer.state_dict())
    state = other.state[elsewhere]
    assert {key: t.device.type for key, t in state.items()} == dict.fromkeys(state, "meta")
    assert state["step"].dtype == torch.float32 and other.param_groups[0]["clock"] == 1


def test_a_matrix_without_a_gradient_is_left_alone() -> None:
    model, optimizer, _ = made(tiny_method("galore"), optim={"weight_decay": 0.1})
    walk(model, optimizer, 1)
    layer = next(x for x in reparametrized(model) if isinstance(x, ProjectedLinear))
    back(model, 5)
    layer.weight.grad = None
    before = layer.weight.detach().clone()
    optimizer.step()
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("key, value", [("gap", -1), ("scale", 0.0), ("scale", -0.25), ("rank", 0)])
def test_settings_that_cannot_be_are_named(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^method\.{key}: must be .*got {value}\)"):
        GaLore(**{key: value})  # type: ignore[arg-type]


def test_the_slow_loop_learns() -> None:
    """The oracle itself, on a quadratic: the loss falls along its path."""
    target, W = normal(4, 6, seed=1).numpy(), np.zeros((4, 6))
    losses = []
    for _ in range(60):
        losses.append(float(((W - target) ** 2).sum()))
        (W,) = projected.galore(W, [W - target], [0.05], r=4, gap=1, scale=1.0, betas=BETAS,
                                eps=1e-8, decay=0.0, rotate=False)  # fmt: skip
    assert losses[-1] < 0.1 * losses[0]
