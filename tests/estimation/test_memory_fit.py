"""What fits into memory: what is tried, what is shown of it, and what is said when nothing does."""

import io
import json
import logging
import re
import shlex
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from peptrain.cli.app import main
from peptrain.cli.progress import fitting
from peptrain.config import RunConfig
from peptrain.errors import ConfigError
from peptrain.estimation.dry_run import DryRun
from peptrain.estimation.estimate import estimate
from peptrain.estimation.memory_fit import _largest, in_units
from peptrain.methods import BPT, LORO, Full, LowRank, ReLoRA
from peptrain.methods.base import Method
from peptrain.models.hf import ModelConfig
from peptrain.sections import TrainConfig
from peptrain.testing import MODEL

WIDE = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 168, "layers": 1, "heads": 4}


def run_of(method: Method, model: dict[str, Any] = MODEL, **train: Any) -> RunConfig[Any]:
    shape = {"steps": 8, "batch_size": 4, "seq_len": 16, "precision": "fp32", "device": "cpu"}
    return RunConfig(
        method=method, model=ModelConfig(**model), train=TrainConfig(**{**shape, **train})
    )


# The search.


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 10_000), min_size=1, max_size=40, unique=True).map(sorted),
    st.integers(1, 12_000),
    st.booleans(),
)
def test_the_largest_of_any_ascending_peaks_is_found(
    peaks: list[int], budget: int, bent: bool
) -> None:
    """Against going through them all; a trial is made once, as far as peaks are kept."""
    sizes = [i * i for i in range(len(peaks))] if bent else range(len(peaks))
    wanted = [size for size, peak in zip(sizes, peaks, strict=True) if peak <= budget]
    found = _largest(sizes, dict(zip(sizes, peaks, strict=True)).__getitem__, budget)
    assert found == (wanted[-1] if wanted else None)


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The micro-batches of the steps that are run dry."""
    made: list[int] = []
    whole = DryRun.step_peak

    def counted(self: DryRun, micro_batch: int) -> int:
        made.append(micro_batch)
        return whole(self, micro_batch)

    monkeypatch.setattr(DryRun, "step_peak", counted)
    return made


def test_few_steps_are_run_dry(trials: list[int]) -> None:
    """From what stays and one peak the line is known that the others are nearly on."""
    config = run_of(Full(), WIDE, seq_len=64, batch_size=256, micro_batch=256)
    peaks = {k: estimate(replace(config, train=replace(config.train, micro_batch=k))).peak_bytes
             for k in (16, 32)}  # fmt: skip
    trials.clear()
    fit = estimate(config, gpu_memory=peaks[32] - 1).fit
    assert fit is not None and (fit.fits, fit.micro_batch) == (False, 16)
    assert trials == [256, 32, 16] or trials == [256, 16, 32]


def test_where_what_stays_is_too_much_no_step_is_run_dry(trials: list[int]) -> None:
    config = run_of(Full(), WIDE)
    static = estimate(config).phases[0].static_bytes
    trials.clear()
    with pytest.raises(ConfigError):
        estimate(config, gpu_memory=static // 4)
    assert trials == [4, *[1] * trials.count(1)]  # as configured, and for the error's numbers


def test_a_step_that_accumulates_holds_the_gradients_of_the_first_micro_batch() -> None:
    """Against both micro-batches, one after the other."""
    config = run_of(BPT(rank=4), WIDE, batch_size=6, micro_batch=2, seq_len=32)
    whole = DryRun.step_peak

    def both(self: DryRun, micro_batch: int) -> int:
        windows = torch.zeros(self.rows, self.config.train.seq_len + 1, dtype=torch.long)
        with self._live(windows) as live:
            self.forward_backward(torch.split(windows, micro_batch))
            self._step()
        return live.peak

    quick = estimate(config).phases[0].step_peak_bytes
    try:
        DryRun.step_peak = both  # type: ignore[method-assign]
        assert estimate(config).phases[0].step_peak_bytes == quick
    finally:
        DryRun.step_peak = whole  # type: ignore[method-assign]


# What is said when nothing fits.


estimated = cache(estimate)


def told(config: RunConfig[Any], budget: int, ranks: int = 1) -> str:
    with pytest.raises(ConfigError) as error:
        estimate(config, gpu_memory=budget, ranks=ranks)
    return str(error.value)


def least(config: RunConfig[Any]) -> RunConfig[Any]:
    """At a micro-batch of 1 and rank 1."""
    rank = {"rank": 1} if hasattr(config.method, "rank") else {}
    return replace(
        config,
        method=replace(config.method, **rank),
        train=replace(config.train, micro_batch=1),
    )


REPAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "train.checkpoint_activations true": ("train", {"checkpoint_activations": True}),
    "train.precision bf16": ("train", {"precision": "bf16"}),
    "a shorter train.seq_len": ("train", {"seq_len": 1}),
    "method.warm_start_steps 0": ("method", {"warm_start_steps": 0}),
}


slow = pytest.mark.slow


METHODS = [Full(), LowRank(rank=8), ReLoRA(rank=8, warm_start_steps=3)]
USUAL = {("full", 0.999), ("lowrank", 0.3), ("relora", 0.999)}
"""Of the cases below, those in the default run."""


@pytest.mark.parametrize(
    "method, share",
    [
        pytest.param(m, s, id=f"{m.name}-{s}", marks=[] if (m.name, s) in USUAL else slow)
        for m in METHODS
        for s in (0.3, 0.55, 0.9, 0.999)
    ],
)
def test_what_is_advised_helps_and_what_is_not_does_not(method: Method, share: float) -> None:
    """Each repair against an estimate of its own."""
    config = run_of(method, WIDE, seq_len=64, batch_size=2)
    small = least(config)
    budget = int(share * estimated(small).peak_bytes)
    said = told(config, budget)
    for name, (section, change) in REPAIRS.items():
        old = getattr(small, section)
        if not all(hasattr(old, key) for key in change):
            assert name not in said
            continue
        repaired = replace(small, **{section: replace(old, **change)})
        assert (name in said) == (estimated(repaired).peak_bytes <= budget), (name, said)
    assert said.endswith("choose a smaller model or another method")


def test_sizes_have_units() -> None:
    sizes = (2**20, 3 * 2**29, 2**30 - 1, 2**30, 24 * 2**30)
    assert [in_units(size) for size in sizes] == ["1 MiB", "1.5 GiB", "1024 MiB", "1 GiB", "24 GiB"]


def test_what_stays_is_named_with_its_parts() -> None:
    config = run_of(Full(), WIDE)
    (phase,) = estimate(config).phases
    said = told(config, phase.weight_bytes)
    assert said.startswith(
        f"--gpu-memory: full does not fit in {phase.weight_bytes / 2**20:.4g} MiB even at"
        " micro-batch 1: weights + gradients + optimizer state need "
    )
    sizes = (phase.static_bytes, phase.weight_bytes, phase.gradient_bytes, phase.state_bytes)
    assert re.findall(r"(\S+) MiB", said.replace("(", ""))[1:] == [
        f"{size / 2**20:.4g}" for size in sizes
    ]
    assert "independent of batch size and recomputation, and the same on every process" in said
    assert "checkpoint_activations" not in said and "seq_len" not in said
    assert "gradients + optimizer state need" in told(config, phase.weight_bytes, ranks=2)


def test_a_warm_start_that_is_too_much_is_named_by_its_steps() -> None:
    config = run_of(ReLoRA(rank=2, warm_start_steps=5), WIDE)
    warm, adapted = estimate(least(config)).phases
    assert adapted.peak_bytes < warm.static_bytes
    said = told(config, warm.static_bytes - 1)
    assert "MiB) in steps 0 to 5, independent of" in said
    assert "set train.precision bf16 or method.warm_start_steps 0 (--init-from loads" in said


def test_a_step_that_is_too_much_is_told_from_what_stays() -> None:
    config = run_of(Full(), WIDE, seq_len=64)
    (phase,) = estimate(least(config)).phases
    said = told(config, phase.step_peak_bytes - 1)
    sizes = [f"{size / 2**20:.4g}" for size in (phase.step_peak_bytes, phase.static_bytes)]
    assert f"a step needs {sizes[0]} MiB, of which {sizes[1]} MiB are static" in said


def test_an_event_that_is_too_much_is_named() -> None:
    config = run_of(LORO(rank=1, exact_every=3), {**WIDE, "vocab_size": 8}, seq_len=1, batch_size=1)
    (phase,) = estimate(config).phases
    assert phase.step_peak_bytes < phase.peak_bytes
    said = told(config, phase.step_peak_bytes)
    assert f": exact every needs {phase.peak_bytes / 2**20:.4g} MiB; " in said


# What is shown and logged.


def test_each_line_is_logged_once_for_all_phases(caplog: pytest.LogCaptureFixture) -> None:
    config = run_of(ReLoRA(rank=2, warm_start_steps=3, exclude="k"),
                    {**MODEL, "intermediate_size": 25}, device="auto")  # fmt: skip
    with caplog.at_level(logging.INFO, "peptrain"):
        estimate(config, gpu_memory=2**30)
        assert caplog.messages == [
            "2 MLPs of width 25: computed at 64",
            "relora: 12 of 14 matrices adapted; dense and trainable: k_proj",
        ]
        estimate(config, gpu_memory=2**30)
    assert len(caplog.messages) == 4  # the second estimate says it too


def test_a_terminal_shows_what_is_tried_and_nothing_else_does() -> None:
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
        with fitting(console) as watch:
            made = estimate(run_of(LowRank(rank=4)), gpu_memory=2**30, watch=watch)
        written = console.file.getvalue()  # type: ignore[attr-defined]
        assert made.fit is not None and made.fit.fits
        assert ("what fits: micro-batch 4 at rank 4" in written) == terminal
        assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == int(terminal)
        assert terminal or not written
        assert "micro-batch of 0" not in written


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_shows_the_search_on_standard_error(
    as_json: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = Terminal()
    monkeypatch.setattr(sys, "stderr", error)
    monkeypatch.setenv("TERM", "xterm")
    line = " ".join(f"--model.{k.replace('_', '-')} {v}" for k, v in MODEL.items())
    line = f"estimate full {line} --train.seq-len 16 --train.batch-size 4 --gpu-memory 1GiB"
    assert main([*shlex.split(line), *(["--json"] if as_json else [])]) == 0
    out = capsys.readouterr().out
    assert "what fits" not in out and ("what fits: " in error.getvalue()) != as_json
    if as_json:
        assert json.loads(out)["fit"]["micro_batch"] == 4 and not error.getvalue()
