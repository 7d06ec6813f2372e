"""Spectral steps on pairs of factors against dense float64 forms with singular values."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from byhand import seeded
from oracles import spectron as oracle
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

from peptrain.ops import factor_steps
from peptrain.ops.factor_steps import (
    Pair,
    Steps,
    lora_muon_steps,
    spectron_steps,
    tangent_steps,
)

QUINTIC = [(1.875, -1.25, 0.375)] * 48
"""Newton's own polynomials, which converge to the polar factor."""
SHAPES = [(24, 17), (17, 24), (17, 17), (24, 17), (30, 12)]
R = 5
Problem = tuple[Tensor, Tensor, Tensor]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def problems(shapes: Sequence[tuple[int, int]] = SHAPES, r: int = R) -> list[Problem]:
    """B, A and the gradient of B A for each shape."""
    return [
        (normal(n, r, seed=3 * i), normal(r, m, seed=3 * i + 1), normal(n, m, seed=3 * i + 2))
        for i, (n, m) in enumerate(shapes)
    ]


def pair(B: Tensor, A: Tensor, G: Tensor) -> Pair:
    return Pair(B, A, G @ A.mT, B.mT @ G)


def start(pairs: Sequence[Pair]) -> list[tuple[Tensor, Tensor]]:
    each = [p.A.new_ones(p.A.shape[0]) / math.sqrt(p.A.shape[0]) for p in pairs]
    return [(v, v) for v in each]


def by_spectron(pairs: Sequence[Pair]) -> Steps:
    """From the vectors at which power iterations end."""
    last = [(torch.linalg.svd(p.B)[2][0], torch.linalg.svd(p.A)[0][:, 0]) for p in pairs]
    return spectron_steps(pairs, last, QUINTIC)[0]


RULES: dict[str, Callable[[Sequence[Pair]], Steps]] = {
    "spectron": by_spectron,
    "lora-muon": lambda pairs: lora_muon_steps(pairs, 0.0, QUINTIC),
    "tangent": lambda pairs: tangent_steps(pairs, 0.0, QUINTIC),
    "factors": lambda pairs: factor_steps.factor_steps(pairs, QUINTIC),
}
every_rule = pytest.mark.parametrize("rule", RULES)


@every_rule
def test_each_pair_has_the_steps_of_its_oracle(rule: str) -> None:
    """Several shapes at once, and averages that are of no single gradient."""
    given = [
        Pair(B, A, G @ A.mT + normal(len(B), R, seed=80), B.mT @ G + normal(*A.shape, seed=81))
        for B, A, G in problems()
    ]
    for p, (dB, dA) in zip(given, RULES[rule](given), strict=True):
        wanted_B, wanted_A = oracle.steps(rule, *p)
        assert_close(dB, wanted_B, rtol=0, atol=1e-9)
        assert_close(dA, wanted_A, rtol=0, atol=1e-9)
        assert dB.is_contiguous() and dA.is_contiguous()


def test_damped_roots_are_those_of_an_eigendecomposition() -> None:
    given = [pair(*problem) for problem in problems()]
    for p, (dB, dA) in zip(given, lora_muon_steps(given, 0.3, QUINTIC), strict=True):
        wanted_B, wanted_A = oracle.steps("lora-muon", *p, damping=0.3)
        assert_close(dB, wanted_B, rtol=0, atol=1e-10)
        assert_close(dA, wanted_A, rtol=0, atol=1e-10)


def test_lora_muon_moves_w_by_half_the_polar_factors_of_the_projected_gradients() -> None:
    for B, A, G in problems():
        ((dB, dA),) = RULES["lora-muon"]([pair(B, A, G)])
        P, Q = oracle.projections(B, A)
        assert_close(dB @ A, oracle.polar(G @ Q) / 2)
        assert_close(B @ dA, oracle.polar(P @ G) / 2)


def test_tangent_moves_w_by_the_polar_factor_of_the_projected_gradient_projected() -> None:
    """Its product with the gradient is the dual norm of the projected gradient, which no step of
    lora-muon reaches, although it has at most 2/sqrt(3) of its spectral norm."""
    for B, A, G in problems():
        ((dB, dA),) = RULES["tangent"]([pair(B, A, G)])
        T, dW = oracle.tangent(G, B, A), dB @ A + B @ dA
        assert_close(dW, oracle.tangent(oracle.polar(T), B, A), rtol=0, atol=1e-9)
        nuclear = torch.linalg.svdvals(T).sum()
        assert_close((G * dW).sum(), nuclear)
        assert 1 < oracle.norm(dW) < 2 / math.sqrt(3) + 1e-9
        ((dB, dA),) = RULES["lora-muon"]([pair(B, A, G)])
        assert (G * (dB @ A + B @ dA)).sum() < 0.99 * nuclear


@pytest.mark.parametrize("size", [0.3, 1.0, 30.0])
def test_spectron_changes_w_by_at_most_lr_in_spectral_norm(size: float) -> None:
    """Also for factors whose norms differ. Muon on each factor does not."""
    for B, A, G in problems():
        B, A = size * B, A / 7
        ((dB, dA),) = by_spectron([pair(B, A, G)])
        ((other_B, other_A),) = RULES["factors"]([pair(B, A, G)])
        for lr in (1e-3, 0.1, 1.0):
            assert oracle.norm((B - lr * dB) @ (A - lr * dA) - B @ A) <= lr * (1 + 1e-9)
        longest = oracle.norm((B - 0.1 * other_B) @ (A - 0.1 * other_A) - B @ A)
        assert longest > 0.1


def changed(rule: str, B: Tensor, A: Tensor, G: Tensor) -> Tensor:
    ((dB, dA),) = RULES[rule]([pair(B, A, G)])
    return dB @ A + B @ dA


@every_rule
def test_steps_in_w_do_not_depend_on_how_it_is_factored_where_the_rule_says_so(rule: str) -> None:
    for B, A, G in problems():
        S = normal(R, R, seed=90)
        other = changed(rule, B @ S, torch.linalg.solve(S, A), G)
        apart = (changed(rule, B, A, G) - other).abs().max()
        assert apart < 1e-8 if rule in ("lora-muon", "tangent") else apart > 1e-2


@every_rule
def test_pairs_of_several_shapes_do_not_mix(rule: str) -> None:
    """What is not finite stays in its pair."""
    given = [pair(*problem) for problem in problems()]
    alone = [RULES[rule]([p])[0] for p in given]
    given[1] = given[1]._replace(N_B=given[1].N_B.clone().fill_(torch.nan))
    for i, (together, one) in enumerate(zip(RULES[rule](given), alone, strict=True)):
        if i == 1:
            assert not together[0].isfinite().any()
        else:
            assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(together, one, strict=True))


def test_two_power_iterations_a_step_follow_factors_that_move() -> None:
    given = [pair(*problem) for problem in problems()]
    v, errors = start(given), []
    for i in range(40):
        steps, moved = spectron_steps(given, v, QUINTIC[:30])
        v = list(moved)  # type: ignore[arg-type]
        wanted = [1 / (oracle.norm(p.B) + oracle.norm(p.A) + 1) for p in given]
        found = [oracle.norm(dB) for dB, _ in steps]
        errors.append(max(abs(a / b - 1) for a, b in zip(found, wanted, strict=True)))
        given = [
            pair(p.B + 0.02 * normal(*p.B.shape, seed=i), p.A, problem[2])
            for p, problem in zip(given, problems(), strict=True)
        ]
    assert 0.01 < errors[0] < 0.3 and max(errors[20:]) < 0.01


DAMPED: dict[str, Callable[[Sequence[Pair]], Steps]] = {
    "spectron": lambda pairs: spectron_steps(pairs, start(pairs))[0],
    "lora-muon": lora_muon_steps,
    "tangent": tangent_steps,
    "factors": factor_steps.factor_steps,
}


@pytest.mark.parametrize("rule", DAMPED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["B", "A", "both", "gradient", "columns"])
def test_singular_factors_and_no_gradient_give_finite_steps_of_limited_size(
    rule: str, dtype: torch.dtype, what: str
) -> None:
    """0, or of a lower rank than r, or with r above min(n, m)."""
    for n, m, r in ((12, 9, 4), (6, 9, 8)):
        B, A, G = normal(n, r, seed=1), normal(r, m, seed=2), normal(n, m, seed=3)
        B = 0 * B if what in ("B", "both") else B
        A = 0 * A if what in ("A", "both") else A
        G = 0 * G if what == "gradient" else G
        if what == "columns":
            B[:, 1:] = B[:, :1]
        p = Pair(*(t.to(dtype) for t in pair(B, A, G)))
        ((dB, dA),) = DAMPED[rule]([p])
        assert dB.dtype == dA.dtype == dtype
        assert dB.isfinite().all() and dA.isfinite().all()
        if rule in ("lora-muon", "tangent"):
            dW = dB.double() @ p.A.double() + p.B.double() @ dA.double()
            assert oracle.norm(dW) < 1.6
        if what in ("gradient", "both"):
            assert not dB.any() and not dA.any()


def test_damping_makes_a_tangent_step_at_most_twice_as_long_where_a_factor_is_nearly_singular() -> (
    None
):
    given = [pair(*problem) for problem in problems([(8, 12)] * 24, r=6)]

    def longest(damping: float) -> float:
        steps = tangent_steps(given, damping, QUINTIC)
        moved = zip(given, steps, strict=True)
        return max(oracle.norm(dB @ p.A + p.B @ dA) for p, (dB, dA) in moved)

    limit = 2 / math.sqrt(3)
    assert longest(0.0) <= limit + 1e-6
    assert 1.1 * limit < longest(factor_steps.DAMPING) <= 2 * limit


def test_a_vector_that_a_factor_maps_to_0_stays_a_unit_vector() -> None:
    """Or its norm would be 0 ever after."""
    B, A, G = problems()[0]
    (_, (v,)) = spectron_steps([pair(0 * B, A, G)], start([pair(B, A, G)]))
    assert_close(torch.linalg.vector_norm(v[0]), torch.ones((), dtype=torch.float64))
    assert torch.linalg.vector_norm(v[1]).item() == pytest.approx(1.0)


@pytest.mark.parametrize("rule", DAMPED)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-3), (torch.bfloat16, 0.06)])
def test_a_narrower_dtype_gives_nearly_the_same_steps(
    rule: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Relative to their size, of factors that are rounded to it."""
    given = [Pair(*(t.to(dtype) for t in pair(*problem))) for problem in problems()]
    wide = [Pair(*(t.double() for t in p)) for p in given]
    for narrow, exact in zip(DAMPED[rule](given), DAMPED[rule](wide), strict=True):
        for a, b in zip(narrow, exact, strict=True):
            assert (a.double() - b).norm() < tolerance * b.norm()


class TF32(TorchFunctionMode):
    """Rounds what a GPU rounds while its products of fp32 matrices are in TF32."""

    products = (torch.Tensor.matmul, torch.Tensor.__matmul__, torch.matmul, torch.baddbmm)
    rounded = exact = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in self.products:
            in_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
            self.rounded += in_tf32
            self.exact += not in_tf32
            if in_tf32:
                args = (*args[:-2], *(self.round(X) for X in args[-2:]))
        return func(*args, **(kwargs or {}))

    def round(self, X: Tensor) -> Tensor:
        bits = X.contiguous().view(torch.int32)
        return ((bits + (1 << 12)) & -(1 << 13)).view(torch.float32)


@pytest.mark.parametrize("rank, tolerance", [(96, 0.004), (4, 0.06)])
def test_products_in_tf32_change_tangent_steps_by_less_than_bf16_does(
    rank: int, tolerance: float
) -> None:
    """Also where D and E are of a lower rank than r, and rounding is most of them elsewhere."""
    B, A = normal(160, 32, seed=1), normal(32, 96, seed=2)
    G = normal(160, rank, seed=3) @ normal(rank, 96, seed=4)
    N_B, N_A = pair(B, A, G)[2:]
    given = Pair(*(t.float() for t in (B, A, N_B, N_A)))

    def change(steps: Steps) -> Tensor:
        ((dB, dA),) = steps
        return dB.double() @ A + B @ dA.double()

    exact = change(tangent_steps([Pair(B, A, N_B, N_A)]))
    with TF32() as rounding:
        steps = tangent_steps([given])
    narrow = given._replace(N_B=N_B.bfloat16().float(), N_A=N_A.bfloat16().float())
    by_tf32, by_bf16 = (
        ((change(found) - exact).norm() / exact.norm()).item()
        for found in (steps, tangent_steps([narrow]))
    )
    assert rounding.exact == 0
    assert rounding.rounded == 2 * 11 + 15  # 15 of the polar factor, which a GPU has in fp16
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    assert 1e-4 < by_tf32 < tolerance
    assert by_tf32 < by_bf16


@pytest.mark.gpu
@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_steps_are_within_a_twentieth_of_float64(rule: str, dtype: torch.dtype) -> None:
    """In Frobenius norm, with usual damping and coefficients."""
    shapes = [(256, 256), (704, 256), (256, 704)]
    drawn = [pair(*problem) for problem in problems(shapes, r=64)]
    rules: dict[str, Callable[[Sequence[Pair]], Steps]] = {
        "spectron": lambda pairs: spectron_steps(pairs, start(pairs))[0],
        "lora-muon": lora_muon_steps,
        "tangent": tangent_steps,
        "factors": factor_steps.factor_steps,
    }
    given = [Pair(*(t.to("cuda", dtype) for t in p)) for p in drawn]
    wanted = rules[rule]([Pair(*(t.double() for t in p)) for p in given])
    for found, exact in zip(rules[rule](given), wanted, strict=True):
        for step, of_float64 in zip(found, exact, strict=True):
            assert step.dtype == dtype and step.is_contiguous()
            apart = (step.double() - of_float64).norm() / of_float64.norm()
            assert apart < 0.05
