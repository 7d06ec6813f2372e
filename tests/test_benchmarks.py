"""Every benchmark runs, at a size that tells nothing; and what they compute of times is right."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import tiny, tiny_method

from peptrain.config import resolved
from peptrain.data import Corpus
from peptrain.methods import METHODS
from peptrain.runs.checkpoint import available, read
from peptrain.runs.directory import RunDir
from peptrain.testing import MODEL
from peptrain.training.loop import train

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")
SMALL = ["--preset=tiny", "--layers=1", "--device=cpu", "--set=train.compile=false"]
SMALL += [f"--set=model.{k}={MODEL[k]}" for k in ("hidden_size", "heads", "vocab_size")]
SHORT = ["--steps=2", "--warm-up=1"]
METHOD_ROWS = ["bpt:rank=2", "relora:rank=2", "loro:rank=2"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of a benchmark, by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        found = import_module(name)
        assert Path(str(found.__file__)).parent == BENCHMARKS
        return found

    return load


def numbers(module: ModuleType, out: Path, *args: str) -> list[dict[str, Any]]:
    """The rows that a benchmark writes."""
    module.main([*args, f"--json={out}"])
    written = json.loads(out.read_text(encoding="utf-8"))
    assert written["environment"]["torch"] == torch.__version__
    rows: list[dict[str, Any]] = written["rows"]
    return rows


def test_speed(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--tokens", "32", "64", "--seq-len=16", "--precision=fp32"]
    given = [*SMALL, *SHORT, *sizes, *METHOD_ROWS, "full:train.precision=bf16"]
    rows = numbers(script("speed"), tmp_path / "json", *given)
    names = ["full", *METHOD_ROWS, "full:train.precision=bf16", "full"]
    assert [(r["tokens"], r["row"]) for r in rows] == [(t, n) for t in (32, 64) for n in names]
    assert [r["train"]["precision"] for r in rows[-2:]] == ["bf16", "fp32"]
    assert all(len(r["ms"]) == 2 and r["tokens_per_second"] > 0 for r in rows)
    assert "| loro:rank=2 |" in capsys.readouterr().out


def test_inference(script: Any, tmp_path: Path) -> None:
    given = ["--intermediate-size=24", "--rank=2", "--cells", "2x8", "1x16", "--logits=last"]
    rows = numbers(script("inference"), tmp_path / "json", *SMALL, *given, "--no-compile")
    assert [(r["batch"], r["length"]) for r in rows] == [(2, 8), (1, 16)]
    assert all(len(r[k]["ms"]) == 20 for r in rows for k in ("dense", "factorised"))


def test_budget(script: Any, tmp_path: Path) -> None:
    given = ["--tokens=32", "--seq-len=16", "--steps=8", "full", *METHOD_ROWS]
    rows = numbers(script("budget"), tmp_path / "json", *SMALL, *given)
    assert [len(r["errors"]) for r in rows] == [0, 3, 3, 0]
    for e in (e for r in rows for e in r["errors"]):
        assert e["delta"] > 0
        assert abs(e["bias"]) < 5


def test_estimate(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--presets", "tiny", "--rows-of-step=2", "--seq-len=16", *METHOD_ROWS]
    given.append("bpt:rank=2:train.micro_batch=1")
    rows = numbers(script("estimate"), tmp_path / "json", *SMALL, *given)
    assert all(r["predicted_peak"] > r["predicted_between"] > 0 for r in rows)
    assert rows[-1]["predicted_peak"] < rows[0]["predicted_peak"]
    assert "| loro:rank=2 | 0.00 | not measured |" in capsys.readouterr().out


def test_merges(script: Any, tmp_path: Path) -> None:
    given = ["--rows-of-step=2", "--seq-len=16", "--repeat=2", *METHOD_ROWS]
    rows = numbers(script("merges"), tmp_path / "json", *SMALL, *SHORT, *given)
    assert [r["event"] for r in rows] == ["merge", "merge", "exact step"]
    assert all(len(r["event_ms"]) == 2 for r in rows)


def test_the_share_of_a_merge_is_of_the_steps_that_lie_between(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merges = script("merges")
    monkeypatch.setattr(merges, "merge_times", lambda training, repeat: [32.0])
    given = ["--rows-of-step=2", "--seq-len=16", "--ms-per-8192=10", "bpt:rank=2"]
    [row] = numbers(merges, tmp_path / "json", *SMALL, *given)
    assert row["share"] == pytest.approx(32 / (200 * 16 * 10))


def test_loop(script: Any, tmp_path: Path, corpus: Path) -> None:
    given = [f"--data={corpus}", "--batch-size=2", "--seq-len=16", "--steps=4", "--log-every=2"]
    rows = numbers(script("loop"), tmp_path / "json", *SMALL, *given, "--rounds=2", "full", "loro")
    assert all(
        len(r[k][c]) == 2 for r in rows for k in ("trainer", "bare") for c in ("wall", "cpu")
    )


def test_cpu_peft(script: Any, tmp_path: Path, corpus: Path) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    given = [f"--data={corpus}", "--batch-size=2", "--seq-len=16", "--steps=4", "--log-every=2"]
    rows = numbers(script("cpu_peft"), tmp_path / "json", *SMALL, *given, "--rounds=1",
                   "lora:rank=2", "lora:rank=2:train_rest=false", "full")  # fmt: skip
    assert all(len(r["wall"]) == len(r["cpu"]) == 1 for r in rows)
    trainable = {r["row"]: r["trainable"] for r in rows}
    assert trainable["Trainer + PEFT, the rest trains too"] == trainable["lora:rank=2"]
    assert trainable["Trainer + PEFT, adapters"] == trainable["lora:rank=2:train_rest=false"]
    assert trainable["Trainer, full"] == trainable["full"]


@pytest.mark.parametrize("name", METHODS)
def test_the_step_that_is_timed_is_the_trainers(
    script: Any, name: str, corpus: Path, tmp_path: Path
) -> None:
    """On the trainer's batches it leaves the trainer's weights."""
    common, run = script("common"), tmp_path / "run"
    config = tiny(tiny_method(name), corpus, run, optim={"clip": 0.1}, train={"steps": 2})
    if name in ("lora", "relora", "dora"):
        config = tiny(tiny_method(name, warm_start_steps=0), corpus, run,
                      optim={"clip": 0.1}, train={"steps": 2})  # fmt: skip
    config = resolved(config, world_size=1, on_gpu=False)
    train(config)
    training, batches = common.start(config, CPU), Corpus.open(corpus)
    for i in range(2):
        windows = batches.batch(seed=0, step=i, rank=0, world=1, batch_size=4, seq_len=16)
        common.step(training, windows)
    saved = read(available(RunDir(run).checkpoints)[-1]).model
    for key, p in training.train_state.model.named_parameters():
        torch.testing.assert_close(p.detach(), saved[key])


def test_a_row_says_its_settings_over_those_given_for_all(script: Any) -> None:
    common = script("common")
    base = common.base_config(common.ModelConfig(), 2, 16)
    given = ["train.keep=3", "train.seed=5"]
    row = "relora:rank=4:reset=magnitude:train.keep=7"
    config = common.configured(row, base, given, device=CPU)
    assert (config.train.keep, config.train.seed, config.method.rank) == (7, 5, 4)
    assert (config.method.reset, config.method.warm_start_steps) == ("magnitude", 0)
    assert common.configured("relora:warm_start_steps=9", base, device=CPU).method.warm == 9
    with pytest.raises(SystemExit, match=r"did you mean 'train\.compile'"):
        common.configured("full:train.compil=true", base, device=CPU)


def test_ratios_are_to_the_mean_of_both_full_rows(script: Any) -> None:
    def row(name: str, rate: float, peak: int) -> dict[str, Any]:
        return {"row": name, "ms": [1.0], "tokens_per_second": rate, "peak_bytes": peak * 2**30,
                "reserved_bytes": 9 * 2**30, "recorded": name == "bpt",
                "trainable": 1, "parameters": 2}  # fmt: skip

    rows = [row("full", 90, 8), row("bpt", 150, 5), row("full", 110, 8)]
    table = script("speed").compared([*rows[:2], {"row": "big", "peak_bytes": 2**30}, rows[2]])
    assert [cells[3] for cells in table] == ["0.900", "1.500", "", "1.100"]
    assert [cells[4] for cells in table] == ["8.00", "", "over 1.00", "8.00"]
    assert [cells[5] for cells in table] == ["9.00", "9.00", "", "9.00"]


def test_the_error_of_a_merge(script: Any) -> None:
    error = script("budget").error
    W, delta = torch.randn(40, 50), 1e-2 * torch.randn(40, 50)
    whole = error(W, W + delta, W + delta)
    assert (whole["relative"], whole["bias"]) == (0, 0)
    assert whole["arrived"] == pytest.approx(1)
    lost = error(W, W + delta, W)
    assert lost["arrived"] == 0
    assert lost["relative"] == pytest.approx(1e-2, rel=0.1)
    shifted = error(W, W + delta, W + delta + 1e-3)
    assert shifted["bias"] == pytest.approx(2000**0.5, rel=1e-3)


def test_a_spread_is_the_median_and_the_quartiles(script: Any) -> None:
    assert script("common").spread([5, 1, 2, 3, 4], 0) == "3 (2 to 4)"
    assert script("common").spread([5]) == "5.00"


def test_no_gpu_benchmark_needs_the_command_lines_packages() -> None:
    code = """
import sys
sys.modules |= {"tyro": None, "rich": None, "peft": None}
import speed, inference, budget, merges, loop, estimate
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path])}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
