"""Schedules: the papers' printed points, plain formulas, and the multiplier's promises."""

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import algebra

from peptrain.config import RunConfig, resolved
from peptrain.errors import ConfigError
from peptrain.methods import METHODS
from peptrain.methods.bpt import BPT
from peptrain.methods.loro import LORO, reference_schedule
from peptrain.optim import schedule
from peptrain.optim.schedule import Schedule, ScheduleConfig, restarted
from peptrain.sections import TrainConfig

EXAMPLES = settings(max_examples=300, deadline=None, derandomize=True)

RELORA_JAGGED = {250: 0.5, 500: 1.0, 2500: 0.958409, 5000: 0.0, 5050: 0.397203, 5100: 0.794406,
                 7500: 0.574363, 14999: 0.100000}  # fmt: skip
"""ReLoRA with N = 15000, w = 500, R = 5000, rw = 100, mn = 0.1."""
LORO_REFERENCE = {1: 0.001, 500: 0.0031702665, 501: 1e-8, 1000: 0.0053448823, 2500: 0.0098464629,
                  4000: 0.0099999999, 20000: 0.0012716519}  # fmt: skip
"""Learning rates of the released LLaMA-130M run; iteration i is t = i - 1. N = 20000, w = 2000,
R = 500, lr 0.01."""

BASE = ScheduleConfig(
    kind="cosine", warmup=0, decay=0, decay_shape="cosine", floor=0.1, restart_every=0,
    restart_warmup=0,
)  # fmt: skip


def built(steps: int, **given: object) -> Schedule:
    return schedule.build(replace(BASE, **given), steps)  # type: ignore[arg-type]


def test_reloras_jagged_cosine() -> None:
    jagged = built(15000, warmup=500, restart_every=5000, restart_warmup=100)
    for t, value in RELORA_JAGGED.items():
        assert jagged(t) == pytest.approx(value, abs=1e-6), t
    oracle = algebra.relora_jagged(15000, 500, 5000, 100, 0.1)
    assert all(abs(jagged(t) - oracle(t)) < 1e-14 for t in range(15000))


@EXAMPLES
@given(st.integers(2, 2000), st.data())
def test_the_jagged_cosine_for_any_run(N: int, data: st.DataObject) -> None:
    w = data.draw(st.integers(0, N - 1))
    R = data.draw(st.integers(max(w, 1), N + 10))  # the formula's own order: warm-up, then restarts
    rw, mn = data.draw(st.integers(1, R)), data.draw(st.floats(0, 1))
    jagged = built(N, warmup=w, restart_every=R, restart_warmup=rw, floor=mn)
    oracle = algebra.relora_jagged(N, w, R, rw, mn)
    for t in range(0, N, max(1, N // 100)):
        if t // R * R + rw <= N:  # beyond the run the formula's cosine would rise again
            assert jagged(t) == pytest.approx(oracle(t), abs=1e-13)


def test_loros_released_schedule() -> None:
    method = LORO(exact_every=500, refresh_every=500, reference_schedule=True)
    released = method.schedule(built(20000, warmup=2000))
    for iteration, rate in LORO_REFERENCE.items():
        assert 0.01 * released(iteration - 1) == pytest.approx(rate, abs=1.01e-10), iteration


@pytest.mark.parametrize("N, w, R", [(20000, 2000, 500), (1000, 100, 30), (500, 120, 125)])
def test_loros_released_schedule_at_every_step(N: int, w: int, R: int) -> None:
    released, oracle = reference_schedule(built(N, warmup=w), R), algebra.loro_reference(N, w, R)
    assert all(abs(released(t) - oracle(t)) < 1e-12 for t in range(N))


@pytest.mark.parametrize("w", [0, 1, 30])
@pytest.mark.parametrize("mn", [0.0, 0.1, 1.0])
def test_the_plain_shapes(w: int, mn: float) -> None:
    N = 200
    constant, linear = built(N, kind="constant", warmup=w), built(N, kind="linear", warmup=w,
                                                                 floor=mn)  # fmt: skip
    cosine, oracle = built(N, warmup=w, floor=mn), algebra.warmup_cosine(N, w, mn)
    for t in range(N):
        p = (t - w) / (N - w)
        assert constant(t) == (t / w if t < w else 1.0)
        assert linear(t) == pytest.approx(t / w if t < w else (1 - p) * 1 + p * mn, abs=1e-14)
        assert cosine(t) == pytest.approx(oracle(t), abs=1e-14)


@pytest.mark.parametrize("w", [0, 20])
@pytest.mark.parametrize("decay", [0, 1, 50, 180])
@pytest.mark.parametrize("mn", [0.0, 0.1])
def test_warmup_stable_decay(w: int, decay: int, mn: float) -> None:
    N = 200
    for shape in ("cosine", "linear"):
        wsd = built(N, kind="wsd", warmup=w, decay=decay, decay_shape=shape, floor=mn)
        for t in range(N):
            p = (t - (N - decay)) / decay if t > N - decay else 0.0
            falling = algebra.half_cosine(p, mn) if shape == "cosine" else 1 - p + p * mn
            assert wsd(t) == pytest.approx(t / w if t < w else falling, abs=1e-14), (shape, t)
        if decay:  # 0 is none
            assert wsd(max(w, N - decay)) == pytest.approx(1.0) and wsd(N) == pytest.approx(mn)


def test_a_decay_that_reaches_into_the_warmup_starts_after_it() -> None:
    wsd = built(100, kind="wsd", warmup=40, decay=90, floor=0.0)
    assert wsd(39) == 39 / 40 and wsd(40) == 1.0
    assert wsd(70) == pytest.approx(0.5) and wsd(100) == pytest.approx(0.0)


SHAPES = st.sampled_from(["constant", "linear", "cosine", "wsd"])


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, ScheduleConfig]:
    N = draw(st.integers(1, 3000))
    length = st.integers(0, 2 * N)
    config = ScheduleConfig(
        kind=draw(SHAPES),
        warmup=draw(st.integers(0, N - 1)),
        decay=draw(length),
        decay_shape=draw(st.sampled_from(["cosine", "linear"])),
        floor=draw(st.floats(0, 1)),
        restart_every=draw(length),
        restart_warmup=draw(length),
    )
    return N, config


@EXAMPLES
@given(runs(), st.integers(0, 4000), st.integers(0, 200))
def test_any_run_has_multipliers_from_0_to_1(
    run: tuple[int, ScheduleConfig], every: int, rewarm: int
) -> None:
    N, config = run
    base = schedule.build(config, N)
    wrapped = [
        base,
        BPT(merge_every=every, restart_warmup=rewarm).schedule(base),
        LORO(exact_every=every, refresh_every=every, restart_warmup=rewarm).schedule(base),
        reference_schedule(base, every),
        restarted(base, every=every, rewarm=rewarm, start=N // 3),
    ]
    for s in wrapped:
        assert all(0 <= s(t) <= 1 + 1e-15 for t in {*range(0, N, max(1, N // 40)), N - 1})
        assert all(math.isfinite(s(t)) for t in (0, N - 1, N))


@EXAMPLES
@given(runs())
def test_without_restarts_there_is_no_jump(run: tuple[int, ScheduleConfig]) -> None:
    N, config = run
    w, decay, shape = config.warmup, config.decay, config.kind
    assert w is not None and decay is not None and config.floor is not None
    s = schedule.build(replace(config, restart_every=0), N)
    span = N - w if shape != "wsd" else min(N - w, max(decay, 1))
    slope = max(1 / max(w, 1), math.pi / 2 / span) + 1e-12  # the steepest is a cosine's middle
    assume(N > 1)
    for t in range(0, N - 1, max(1, N // 100)):
        assert abs(s(t + 1) - s(t)) <= slope
    assert w == 0 or (s(0) == 0 and s(w) == pytest.approx(1))


@EXAMPLES
@given(runs())
def test_a_restart_begins_at_exactly_0_and_ends_on_the_base(
    run: tuple[int, ScheduleConfig],
) -> None:
    N, config = run
    every, rewarm = config.restart_every, config.restart_warmup
    assert every is not None and rewarm is not None
    assume(rewarm > 0 and 1 < every < N)
    base, s = (schedule.build(replace(config, restart_every=r), N) for r in (0, every))
    for t0 in list(range(every, N, every))[:20]:
        assert s(t0) == 0
        end = t0 + rewarm
        if rewarm < every:
            assert s(end) == base(end)
            assert s(end - 1) == pytest.approx((rewarm - 1) / rewarm * base(end))
        half = t0 + rewarm // 2
        if rewarm // 2 < every:
            assert s(half) == pytest.approx(rewarm // 2 / rewarm * base(end))
    assert all(s(t) == base(t) for t in range(min(every, N)))


def test_restarts_may_begin_late() -> None:
    """The end of a warm start is a restart point of its own; the multiples after it follow."""
    base = built(100, kind="constant")
    s = restarted(base, every=10, rewarm=4, start=25)
    zeros = [t for t in range(100) if s(t) == 0]
    assert zeros == [25, 30, 40, 50, 60, 70, 80, 90]
    assert [s(t) for t in (24, 26, 29, 34)] == [1.0, 0.25, 1.0, 1.0]
    once = restarted(base, every=0, rewarm=4, start=25)
    assert [t for t in range(100) if once(t) < 1] == [25, 26, 27, 28]


@pytest.mark.parametrize(
    "method",
    [
        BPT(merge_every=30, restart_warmup=7),
        LORO(exact_every=30, refresh_every=30, restart_warmup=7),
        LORO(exact_every=60, refresh_every=30, restart_warmup=7),
    ],
)
def test_the_learning_rate_is_0_on_the_step_next_to_a_merge_or_refresh(
    method: BPT | LORO,
) -> None:
    """After R completed steps comes the step of index R."""
    base = built(100, kind="constant")
    s = method.schedule(base)
    assert [t for t in range(100) if s(t) == 0] == [30, 60, 90]
    assert s(37) == 1.0 and s(36) == pytest.approx(6 / 7)


def test_without_refresh_there_is_no_restart() -> None:
    base = built(100, kind="constant")
    for method in (
        LORO(exact_every=30, refresh_every=30, refresh="none"),
        LORO(exact_every=30, refresh_every=0),
        LORO(exact_every=30, refresh_every=30, restart_warmup=0),
        BPT(merge_every=30),
        BPT(merge_every=0, restart_warmup=7),
    ):
        assert all(method.schedule(base)(t) == 1 for t in range(100))


@pytest.mark.parametrize("warmup", [100, 101, 5000])
def test_a_warmup_as_long_as_the_run_is_refused(warmup: int) -> None:
    with pytest.raises(ConfigError, match=rf"schedule\.warmup: must .* 100 .*got {warmup}"):
        built(100, warmup=warmup)
    assert built(100, warmup=99)(99) == 1.0


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 600])
def test_the_defaults_fit_a_run_of_any_length(name: str, steps: int) -> None:
    given = RunConfig(method=METHODS[name](), train=TrainConfig(steps=steps))
    config = resolved(given, world_size=1, on_gpu=False)
    s = config.method.schedule(schedule.build(config.schedule, steps))
    multipliers = [s(t) for t in range(steps)]
    assert all(0 <= x <= 1 for x in multipliers) and max(multipliers) > 0.5
    assert config.schedule.warmup == round(steps / 10)


@pytest.mark.parametrize(
    "key, value", [("warmup", -1), ("decay", -1), ("restart_every", -1), ("floor", 1.5)]
)
def test_impossible_settings_are_named(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"schedule\.{key}: must be .*got {value}\)"):
        ScheduleConfig(**{key: value})  # type: ignore[arg-type]


def test_a_rate_that_never_recovers_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    base = built(20, warmup=2)
    jagged = built(20, warmup=2, restart_every=5, restart_warmup=1)
    for rates, every, rewarm, start, said in (
        (base, 0, 5, 14, ""),
        (base, 0, 5, 15, "method.restart_warmup: 5 steps of warm-up, but the warm start leaves 5"),
        (base, 5, 4, 0, ""),
        (base, 5, 5, 0, "restarts every 5 steps and never recovers; set fewer than 5"),
        (jagged, 0, 0, 0, ""),
        (jagged, 10, 5, 0, "schedule.restart_every: the method restarts the learning rate itself"),
    ):
        caplog.clear()
        restarted(rates, every=every, rewarm=rewarm, start=start)
        assert said in caplog.text and bool(said) == bool(caplog.records)
