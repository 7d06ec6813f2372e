"""Spectron's optimizer: its trajectories, its groups and state, what is shared, what it refuses."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from byhand import seeded
from oracles import muon, spectron
from support import rows, tiny, tiny_method
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peptrain.adaptation import adapt
from peptrain.distributed import owners
from peptrain.errors import ConfigError
from peptrain.estimation.estimate import estimate
from peptrain.methods import Spectron
from peptrain.ops import factor_steps
from peptrain.ops.newton_schulz import COEFFICIENTS
from peptrain.optim.adamw import learning_rates, state_bytes
from peptrain.optim.spectron import Rule, SpectronOptimizer
from peptrain.testing import QWEN, Bench, bench
from peptrain.training.loop import resume, train

RULES: tuple[Rule, ...] = get_args(Rule)
every_rule = pytest.mark.parametrize("rule", RULES)
ADAM: dict[str, Any] = {"lr": 0.05, "betas": (0.9, 0.999), "eps": 1e-8}
SHAPES = [(12, 20, 3), (20, 12, 3), (12, 20, 3), (9, 9, 3), (10, 8, 2)]
"""n, m and r of each pair; one of another rank."""
QUINTIC = [(1.875, -1.25, 0.375)] * 48
Grads = list[list[Tensor]]


def factors(dtype: torch.dtype = torch.float64, steps: int = 4) -> tuple[list[nn.Parameter], Grads]:
    """B, A, B, A, ... and their gradients in each step."""
    draw = seeded()
    sizes = [size for n, m, r in SHAPES for size in ((n, r), (r, m))]
    params = [nn.Parameter(torch.randn(s, generator=draw).to(dtype)) for s in sizes]
    return params, [[torch.randn(s, generator=draw).to(dtype) for s in sizes] for _ in range(steps)]


def made(params: list[nn.Parameter], rule: Rule = "spectron", **given: Any) -> SpectronOptimizer:
    own = {"momentum": 0.9, "coefficients": QUINTIC, "damping": 0.0} | given
    groups = [{"params": params, "factors": True, "weight_decay": own.pop("decay", 0.0)}]
    return SpectronOptimizer(groups, rule=rule, **own, **ADAM)


def walked(optimizer: SpectronOptimizer, params: list[nn.Parameter], grads: Grads) -> list[Tensor]:
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    return [p.detach() for p in params]


@every_rule
@pytest.mark.parametrize("momentum, decay", [(0.95, 0.0), (0.0, 0.0), (0.5, 0.3)])
def test_its_trajectory_is_that_of_the_oracle(
    rule: Rule, momentum: float, decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With power iterations until the norms are exact."""
    monkeypatch.setattr(factor_steps, "POWER_ITERATIONS", 1000)
    params, grads = factors()
    start = [p.detach().clone() for p in params]
    found = walked(made(params, rule, momentum=momentum, decay=decay), params, grads)
    for i in range(0, len(start), 2):
        wanted = spectron.trajectory(
            *start[i : i + 2], [(step[i], step[i + 1]) for step in grads], rule,
            lr=0.05, momentum=momentum, decay=decay,
        )  # fmt: skip
        for one, other in zip(found[i : i + 2], wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


@every_rule
def test_bf16_factors_move_as_float64_ones_up_to_their_rounding(rule: Rule) -> None:
    params, grads = factors(torch.bfloat16)
    start = [p.detach().double() for p in params]
    wide = [nn.Parameter(p.detach().double()) for p in params]
    own: dict[str, Any] = {"damping": 1e-2}
    found = walked(made(params, rule, **own), params, grads)
    wanted = walked(made(wide, rule, **own), wide, [[g.double() for g in s] for s in grads])
    for one, other, W in zip(found, wanted, start, strict=True):
        assert one.dtype == torch.bfloat16
        rounding = 2**-8 * W.norm() * len(grads) ** 0.5
        assert (one.double() - other).norm() < rounding + 0.1 * (other - W).norm()


@every_rule
def test_its_state_is_a_momentum_and_of_spectron_a_vector_of_the_rank(rule: Rule) -> None:
    params, grads = factors(torch.bfloat16, 1)
    optimizer = made(params, rule)
    walked(optimizer, params, grads)
    for p in params:
        state = {key: (t.shape, t.dtype) for key, t in optimizer.state[p].items()}
        wanted = {"momentum": (p.shape, torch.bfloat16)}
        if rule == "spectron":
            wanted["vector"] = ((min(p.shape),), torch.bfloat16)
        assert state == wanted
    ranks = 2 * sum(r for *_, r in SHAPES) if rule == "spectron" else 0
    assert state_bytes(optimizer) == 2 * (sum(p.numel() for p in params) + ranks)


def test_a_pair_without_gradients_is_left_alone() -> None:
    params, grads = factors(steps=1)
    before = params[1].detach().clone()
    optimizer = made(params)
    for p, g in zip(params[1:], grads[0][1:], strict=True):
        p.grad = g
    optimizer.step()
    assert torch.equal(params[1], before) and params[0] not in optimizer.state
    assert not torch.equal(params[2], before[: len(params[2])]) and optimizer.state[params[2]]


@every_rule
def test_its_share_alone_is_computed_by_each_process(
    rule: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both shares together are what one process computes."""
    alone, grads = factors(steps=1)
    wanted = walked(made(alone, rule), alone, grads)
    for rank in (0, 1):
        params, _ = factors()
        sent: list[int] = []
        monkeypatch.setattr(
            owners.Owners, "send_", lambda self, items, sent=sent: sent.extend(self.own)
        )
        with owners.sharing(rank, 2):
            found = walked(made(params, rule), params, grads)
        assert 0 < len(sent) < len(SHAPES)
        for i in range(len(SHAPES)):
            for j in (2 * i, 2 * i + 1):
                same = torch.allclose(found[j], wanted[j], rtol=0, atol=1e-12)
                assert same == (i in sent)


class Counting(TorchDispatchMode):
    """Count operations other than views, which launch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not op.is_view and "view" not in str(op):
            self.calls[str(op)] += 1
        return op(*args, **(kwargs or {}))


@every_rule
def test_more_layers_launch_no_more_operations_and_none_waits_for_a_value(rule: Rule) -> None:
    counts = []
    for layers in (1, 6):
        draw = seeded()
        sizes = [s for n, m in ((8, 8), (12, 8), (8, 12)) for s in ((n, 2), (2, m))] * layers
        params = [nn.Parameter(torch.randn(s, generator=draw)) for s in sizes]
        optimizer = made(params, rule, damping=1e-2, coefficients=COEFFICIENTS)
        grads = [[torch.randn(s, generator=draw) for s in sizes]]
        walked(optimizer, params, grads)  # creates the state
        with Counting() as counting:
            optimizer.step()
        counts.append(counting.calls)
    assert counts[0] == counts[1]
    waiting = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")
    assert not [op for op in counts[1] if any(f".{name}." in op for name in waiting)]
    assert 0 < counts[1].total() < 150


@pytest.mark.gpu
@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_waits_for_nothing_and_is_the_same_captured_in_a_graph(
    rule: Rule, dtype: torch.dtype
) -> None:
    """At widths where products are large. The rate is the one of the capture."""
    sizes = [s for n, m in ((256, 256), (704, 256), (256, 704)) for s in ((n, 64), (64, m))] * 3
    draw, found = seeded(), []
    start = [0.1 * torch.randn(s, generator=draw) for s in sizes]
    grads = [torch.randn(s, generator=draw).to("cuda", dtype) for s in sizes]
    for captured in (False, True):
        params = [nn.Parameter(p.to("cuda", dtype)) for p in start]
        optimizer = made(params, rule, damping=1e-2, coefficients=COEFFICIENTS)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # creates the state, and the workspaces of the libraries
            optimizer.step()
        torch.cuda.synchronize()
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            graph.replay()
        else:
            torch.cuda.set_sync_debug_mode("error")
            try:
                optimizer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found.append([p.detach() for p in params])
    for eager, replayed in zip(*found, strict=True):
        torch.testing.assert_close(eager, replayed, rtol=0, atol=1e-5)


# --- the method


def rates(one: Bench) -> dict[str, tuple[str, float]]:
    """Of each parameter: what steps it, and its learning rate."""
    names = {p: name for name, p in one.model.named_parameters()}
    return {
        names[p]: ("rule" if g["factors"] else "muon" if g["matrices"] else "adamw", g["lr"])
        for g in one.optimizer.param_groups
        for p in g["params"]
    }


def test_factors_and_dense_matrices_have_one_rate_and_all_else_is_adamws() -> None:
    optim = {"head_lr": 2e-3, "weight_decay": 0.1}
    one = bench(tiny_method("spectron", exclude="k,down"), model=QWEN, optim=optim)
    found = rates(one)
    assert found.keys() == {name for name, _ in one.model.named_parameters()}
    for name, (by, lr) in found.items():
        wanted = ("adamw", 2e-3 if name.startswith("lm_head") else 5e-3)
        if name.endswith((".A", ".B")):
            wanted = ("rule", 4e-2)
        elif name.endswith(("k_proj.weight", "down_proj.weight")):
            wanted = ("muon", 4e-2)
        assert (by, lr) == wanted, name
    assert [g["weight_decay"] for g in one.optimizer.param_groups] == [0.1, 0.1, 0.0, 0.1]
    rows = {"lr": 4e-2, "lr_embedding": 5e-3, "lr_head": 2e-3}
    assert learning_rates(one.optimizer) == rows


def test_a_dense_matrix_moves_as_by_muon_with_the_methods_momentum() -> None:
    one = bench(tiny_method("spectron", exclude="k", momentum=0.5), optim={"lr": 0.1})
    path = "model.layers.0.self_attn.k_proj.weight"
    W, grads = one.model.get_parameter(path), []
    start = W.detach().clone()
    for _ in range(3):
        one.backward()
        grads.append(W.grad.clone())
        one.update()
    wanted = muon.trajectory(
        start, grads, one.optimizer.coefficients, lr=0.1, momentum=0.5, decay=0.0, scale="spectral"
    )
    torch.testing.assert_close(W.detach(), wanted, rtol=0, atol=1e-10)


def test_unset_settings_are_its_own() -> None:
    config = bench(tiny_method("spectron")).config
    optim, method = config.optim, config.method
    assert (optim.lr, optim.embedding_lr, optim.head_lr, optim.clip) == (4e-2, 5e-3, None, 0.0)
    assert isinstance(method, Spectron)
    assert (method.rule, method.momentum, method.init) == ("spectron", 0.95, "orthogonal")


def test_the_default_rate_of_embeddings_may_be_that_of_frozen_ones() -> None:
    """As when fine-tuning: it was not asked for."""
    model = nn.Sequential(nn.Embedding(7, 12), nn.Linear(12, 10))
    adapted = adapt(model, Spectron(rank=2, train_rest=False), steps=2)
    assert len(adapted.optimizer.param_groups) == 1


def test_what_it_can_not_take_is_refused_by_name() -> None:
    params, _ = factors()
    with pytest.raises(ConfigError, match=r"^damping: must be >= 0 \(got -0\.01\)"):
        made(params, damping=-0.01)
    with pytest.raises(ConfigError, match="coefficients: must be one polynomial or more"):
        made(params, coefficients=())
    for momentum in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"^method\.momentum: must be in \[0, 1\) \(got"):
            Spectron(momentum=momentum)
    with pytest.raises(ConfigError, match=r"^optim\.kind: must be adamw for spectron"):
        bench(tiny_method("spectron"), optim={"kind": "muon"})
    wanted = r"method\.init: orthogonal needs a rank of at most min\(n, m\) = 8 in .*k_proj, 8 x 16"
    with pytest.raises(ConfigError, match=wanted):
        bench(tiny_method("spectron", rank=12, include="k"), model=QWEN)


@every_rule
def test_a_rank_above_min_n_m_trains_from_another_initialisation(rule: Rule) -> None:
    given = tiny_method("spectron", rule=rule, rank=12, include="*", init="xavier")
    one = bench(given, model=QWEN)
    one.train(4)
    assert all(p.isfinite().all() for p in one.model.parameters())


@pytest.mark.slow
@every_rule
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-mixed"])
def test_it_trains_in_every_precision_and_resumes_to_the_same_bits(
    rule: Rule, precision: str, corpus: Path, tmp_path: Path
) -> None:
    train_settings = {"precision": precision, "steps": 12, "checkpoint_every": 6}
    config = tiny(tiny_method("spectron", rule=rule), corpus, tmp_path / "run")
    config = replace(config, train=replace(config.train, **train_settings))
    train(config)
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.3

    class Stop(BaseException):
        pass

    def observe(row: Any) -> None:
        if row["event"] == "checkpoint" and row["step"] == 6:
            raise Stop

    with pytest.raises(Stop):
        train(replace(config, run=tmp_path / "parted"), observe)
    resume(tmp_path / "parted")
    assert [row["loss"] for row in rows(tmp_path / "parted")] == losses


@pytest.mark.slow
@every_rule
def test_the_estimate_has_its_bytes_and_its_products(rule: Rule, corpus: Path) -> None:
    here = {"device": "cpu"}
    (phase,) = estimate(tiny(tiny_method("spectron", rule=rule), corpus, train=here)).phases
    found = bench(tiny_method("spectron", rule=rule), model={})
    found.train()
    assert phase.state_bytes == state_bytes(found.optimizer)
    assert [e.what for e in phase.events] == ["optimizer step"]
    r = 2
    sides = [max(p.shape) for n, p in found.model.named_parameters() if n.endswith((".A", ".B"))]
    assert min(sides) > 1.5 * r  # so that steps are composed
    polars = sum(8 * r * r * w + 28 * r**3 for w in sides)
    once = sum(2 * r * r * w for w in sides)  # a product of every wide matrix with r x r
    wanted = {
        "factors": polars,
        "spectron": polars + once + len(sides) * 2 * (3 * r * r + r),  # S v three times, and v S v
        "lora-muon": polars + 3 * once,
        "tangent": 11 * once + len(sides) // 2 * 5 * 6 * (2 * r) ** 3,
    }
    assert phase.events[0].flops == wanted[rule]
    solved = {"factors": 0, "spectron": 0, "lora-muon": len(sides), "tangent": 2 * len(sides)}
    assert phase.events[0].decompositions.get("cholesky", 0) == solved[rule]
