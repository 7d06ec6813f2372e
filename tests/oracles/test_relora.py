"""ReLoRA's merge, resets, schedule and counts against closed forms and the papers' numbers."""

import pytest
import torch
from torch import Tensor

from . import algebra as al
from . import relora
from .test_oracles import arch, draw

BETAS = (0.9, 0.999)


def test_a_merge_keeps_the_weight_and_a_second_one_does_nothing() -> None:
    W, B, A, s = draw(7, 5), draw(7, 2, seed=1), draw(2, 5, seed=2), 2.0
    effective = al.relora_effective(W, B, A, s)
    entry = W[3, 4] + 2 * (B[3, 0] * A[0, 4] + B[3, 1] * A[1, 4])
    assert effective[3, 4].item() == pytest.approx(entry.item(), abs=1e-14)
    merged, zero = al.relora_merge(W, B, A, s)
    again = al.relora_merge(merged, zero, draw(2, 5, seed=3), s)[0]
    for x in (merged, al.relora_effective(merged, zero, draw(2, 5, seed=3), s), again):
        torch.testing.assert_close(x, effective, rtol=0, atol=1e-14)
    assert torch.equal(again, merged) and zero.shape == B.shape and not zero.any()
    assert torch.linalg.matrix_rank(merged - W).item() == 2
    trained = torch.tensor(0.5, dtype=torch.float64)
    torch.testing.assert_close(al.relora_merge(W, B, A, trained)[0] - W, 0.5 * B @ A)


def test_merging_and_switching_a_state() -> None:
    state = {"x.weight": draw(4, 3), "x.B": draw(4, 2), "x.A": draw(2, 3), "x.s": torch.tensor(1.5)}
    before, new_A = dict(state), draw(2, 3, seed=1)
    relora.merge(state, "x", 2.0, new_A)
    W, B, A = (before[f"x.{x}"] for x in ("weight", "B", "A"))
    torch.testing.assert_close(state["x.weight"], W + 1.5 * B @ A)
    assert torch.equal(state["x.A"], new_A) and not state["x.B"].any() and state["x.s"] == 2.0
    begun = relora.switch({"x.weight": W}, ["x"], lambda site: new_A)
    assert begun.keys() == {"x.B", "x.A"} and begun["x.B"].shape == (4, 2)
    assert not begun["x.B"].any() and torch.equal(begun["x.A"], new_A)
    with pytest.raises(ValueError, match="r x 3"):
        relora.switch({"x.weight": W}, ["x"], lambda site: new_A.T)


def updates(m: Tensor, v: Tensor, k: int, steps: int) -> list[Tensor]:
    """|update| / lr of the steps that follow, each with gradient 1."""
    p, sizes = torch.zeros_like(m), list[Tensor]()
    for _ in range(steps):
        k += 1
        q, m, v = al.adam_update(p, torch.ones_like(m), m, v, k, 1.0, BETAS, 0.0)
        sizes.append((q - p).abs())
        p = q
    return sizes


def test_updates_after_a_reset() -> None:
    """From m = v = 1 after many steps; with k steps since, b1 = 0.9, b2 = 0.999."""
    one = torch.ones(2, 3, dtype=torch.float64)
    everything, nothing = one.bool(), ~one.bool()
    begun = updates(*al.reset_zero(one, one), 12)
    assert all(begun[k - 1] == pytest.approx(one, abs=1e-12) for k in (1, 2, 5))
    kept = [
        x[0, 0].item() for x in updates(*al.reset_pico(one, one, 10**6, everything, everything), 40)
    ]
    assert kept[0] == pytest.approx(0.1 / 0.001**0.5) == pytest.approx(3.16, abs=5e-3)
    assert kept[11] == pytest.approx(6.57, abs=5e-3) and max(kept) == kept[11]
    v_gone = updates(*al.reset_pico(one, one, 10**6, nothing, everything), 1)[0]
    assert v_gone == pytest.approx(one / 0.001**0.5, rel=1e-3)  # 31.6
    m_gone = updates(*al.reset_pico(one, one, 10**6, everything, nothing), 1)[0]
    assert m_gone == pytest.approx(0.1 * one, rel=1e-3)
    pruned = torch.tensor([[True, False, False], [False, True, False]])
    first = updates(*al.reset_masked(one, one, pruned), 1)[
        0
    ]  # survivors: 1 / 0.1 / sqrt(1 / 0.001)
    expected = torch.where(pruned, 1.0, 10 * 0.001**0.5)
    assert first == pytest.approx(expected.double(), rel=1e-3)


def test_magnitude_pruning_takes_exactly_the_smallest() -> None:
    m = torch.tensor([[-3.0, 0.1, 2.0], [-0.2, 2.0, -2.0]], dtype=torch.float64)
    v = torch.arange(6.0, 0.0, -1.0, dtype=torch.float64).reshape(2, 3)
    for p, gone in {0.0: [], 1 / 3: [1, 3], 0.5: [1, 2, 3], 2 / 3: [1, 2, 3, 4]}.items():
        new_m, new_v, step = al.reset_magnitude(m, v, p)
        kept = torch.tensor(
            [[i not in gone for i in (0, 1, 2)], [i not in gone for i in (3, 4, 5)]]
        )
        assert step == 0 and torch.equal(new_m, m * kept) and torch.equal(new_v, v * kept)
    ties, large = torch.zeros(40, 25, dtype=torch.float64), draw(40, 25)
    for x in (ties, large):
        assert al.smallest(x, 0.99).sum().item() == 990 and al.smallest(x, 0.999).sum() == 999
    assert al.smallest(ties, 0.99).flatten().tolist() == [True] * 990 + [False] * 10
    left, right = large[al.smallest(large, 0.9)].abs(), large[~al.smallest(large, 0.9)].abs()
    assert left.max() < right.min()
    a, b, k = al.reset_pico(m, v, 7, m > 0, v > 3)
    assert k == 7 and torch.equal(a, m.clamp(max=0)) and torch.equal(b, v * (v <= 3))


def test_a_reset_touches_the_factors_asked_for_and_nothing_else() -> None:
    def start() -> dict[str, al.Moments]:
        names = ("x.B", "x.A", "x.s", "y.A", "norm.weight")
        return {name: (draw(2), draw(2, seed=1).abs(), 5) for name in names}

    for how in ("both", "A"):
        moments, before = start(), start()
        relora.reset(moments, "x", 10, "zero", how)
        for name, (m, v, k) in moments.items():
            touched = name in {"both": ("x.B", "x.A", "x.s"), "A": ("x.A",)}[how]
            assert k == (0 if touched else 5)
            for now, then in zip((m, v), before[name][:2], strict=True):
                assert torch.equal(now, then * (not touched))
    moments, calls = start(), list[tuple[str, int, int]]()

    def own(name: str, done: int, m: Tensor, v: Tensor, k: int) -> al.Moments:
        calls.append((name, done, k))
        return m + 1, v + 2, 3

    relora.reset(moments, "x", 10, own, "both")
    assert calls == [("x.B", 10, 5), ("x.A", 10, 5), ("x.s", 10, 5)]
    m, v, k = moments["x.A"]
    assert k == 3 and torch.equal(m, draw(2) + 1) and torch.equal(v, draw(2, seed=1).abs() + 2)
    kept = start()
    relora.reset(kept, "x", 10, "keep", "both")
    assert all(torch.equal(kept[n][0], x[0]) and kept[n][2] == 5 for n, x in start().items())


PAPER = (15000, 500, 5000, 100, 0.1)  # N, w, R, rw, mn
BASE = al.warmup_cosine(15000, 500, 0.1)
PRINTED = {250: 0.5, 500: 1.0, 2500: 0.958409, 5000: 0.0, 5050: 0.397203, 5100: 0.794406}
PRINTED |= {7500: 0.574363, 14999: 0.1}


def test_the_jagged_schedule_of_the_paper() -> None:
    jagged, letter = al.relora_schedule(*PAPER), al.relora_jagged(*PAPER)
    switch_there_too = al.relora_schedule(*PAPER, warm=5000)
    for t, value in PRINTED.items():
        assert jagged(t) == pytest.approx(value, abs=1e-6)
    for t in range(15000):
        assert jagged(t) == pytest.approx(letter(t), abs=1e-14)
        assert switch_there_too(t) == pytest.approx(letter(t), abs=1e-14)
    odd = (1000, 50, 60, 100, 0.2)  # restarts cut short by the next, N not a multiple of R
    jagged, letter = al.relora_schedule(*odd), al.relora_jagged(*odd)
    assert all(jagged(t) == pytest.approx(letter(t), abs=1e-14) for t in range(1000))
    early = (1000, 300, 200, 50, 0.1)  # a restart in the warm-up: here the two differ
    jagged, letter = al.relora_schedule(*early), al.relora_jagged(*early)
    differ = [t for t in range(1000) if jagged(t) != pytest.approx(letter(t), abs=1e-14)]
    assert differ == list(range(200, 250)) and jagged(200) == 0 and letter(200) == 2 / 3
    assert jagged(225) == pytest.approx(0.5 * 250 / 300)


def test_the_switch_is_a_restart() -> None:
    base = [BASE(t) for t in range(15000)]

    def restarts(expected: dict[int, int], R: int, warm: int, rw: int = 100) -> None:
        """expected: restart -> the step at which it ends; everything else is the base."""
        multiplier = al.relora_schedule(15000, 500, R, rw, 0.1, warm)
        values = list(base)
        for t0, end in expected.items():
            values[t0:end] = [(t - t0) / rw * base[t0 + rw] for t in range(t0, end)]
        assert [multiplier(t) for t in range(15000)] == pytest.approx(values, abs=1e-14)

    restarts({}, R=0, warm=0)
    restarts({4000: 4100}, R=0, warm=4000)
    restarts({4000: 4100, 5000: 5100, 10000: 10100}, R=5000, warm=4000)
    restarts({4950: 5000, 5000: 5100, 10000: 10100}, R=5000, warm=4950)  # cut by the first merge
    restarts({5001: 5101, 10000: 10100}, R=5000, warm=5001)
    restarts({10000: 10100}, R=5000, warm=10000)
    restarts({}, R=5000, warm=4000, rw=0)


def test_a_fresh_schedule_begins_at_the_switch() -> None:
    fresh, again = (
        al.relora_schedule(*PAPER, warm=4000, fresh=True),
        al.warmup_cosine(11000, 500, 0.1),
    )
    assert all(fresh(t) == BASE(t) for t in range(4000))
    printed = {4000: 0.0, 4050: 0.1, 4100: 0.2, 4250: 0.5, 4500: 1.0, 5000: 0.0, 10000: 0.0}
    for t, value in (printed | {9750: 0.55, 10050: 0.251481, 10100: 0.502962}).items():
        assert fresh(t) == pytest.approx(value, abs=1e-6)
    assert fresh(5050) == pytest.approx(0.5 * again(1100)) and fresh(14999) == again(10999)


def test_relora_parameter_counts() -> None:
    millions = {("llama-60m", 128): 42.771, ("llama-1b", 128): 250.707}
    for (name, r), printed in millions.items():
        assert al.parameter_count(arch(name), "relora", r).trainable / 1e6 == pytest.approx(
            printed, abs=5e-4
        )
    pico = arch("pico-tiny")
    assert al.parameter_count(pico, "relora", 16) == al.parameter_count(pico, "lora", 16)
    total, trainable, _ = al.parameter_count(pico, "relora", 16, trained_scale=True)
    assert (total, trainable) == (11_682_144 + 12 * 7, 10_060_128 + 12 * 7)
    # r = 28: 32 x 96 (k, v) stay dense, as 28 * 128 > 3072, and have no scale
    one, plain = (al.parameter_count(pico, "relora", 28, x) for x in (True, False))
    assert one.trainable - plain.trainable == one.total - plain.total == 12 * 5
    assert plain.trainable == 9_660_768 + 12 * (28 * (2 * 192 + 3 * 480) + 2 * 3072)
