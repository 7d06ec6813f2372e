"""Every benchmark runs, at a size that tells nothing; and what they compute of times is right."""

import argparse
import json
import os
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from support import rows as recorded
from support import tiny, tiny_method
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peptrain import recipes
from peptrain.cli.app import main
from peptrain.comparison.grid import expand
from peptrain.config import resolved
from peptrain.data import Corpus
from peptrain.distributed.launch import cores
from peptrain.methods import METHODS
from peptrain.runs.build import build
from peptrain.runs.checkpoint import available, read
from peptrain.runs.directory import RunDir
from peptrain.training.loop import train

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")
METHOD_ROWS = ["bpt:rank=4", "relora:rank=4", "loro:rank=4"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of a benchmark, by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        found = import_module(name)
        assert Path(str(found.__file__)).parent == BENCHMARKS
        return found

    return load


@pytest.fixture(scope="session")
def smoke_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text and the corpus of the smoke test."""
    folder = tmp_path_factory.mktemp("smoke")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import_module("smoke").make_corpus(folder)
    return folder


@pytest.fixture
def ran(script: Any, smoke_folder: Path) -> Any:
    """Call a benchmark as the smoke test does on a CPU."""

    def run(name: str, *more: str) -> None:
        smoke = script("smoke")
        given = smoke.arguments(smoke.SCRIPTS[name], device="cpu", folder=smoke_folder)
        script(name).main([*given, *more])

    return run


@pytest.fixture
def numbers(ran: Any, tmp_path: Path) -> Any:
    """The rows that a benchmark writes when it is called so."""

    def measured(name: str, *more: str) -> list[dict[str, Any]]:
        out = tmp_path / "json"
        ran(name, *more, f"--json={out}")
        written = json.loads(out.read_text(encoding="utf-8"))
        assert written["environment"]["torch"] == torch.__version__
        rows: list[dict[str, Any]] = written["rows"]
        return rows

    return measured


def test_speed(numbers: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = numbers("speed")
    added = ["full:train.precision=fp32", "spectron:rank=4:rule=lora-muon"]
    names = ["full", *METHOD_ROWS, *added, "full"]
    assert [(r["tokens"], r["row"]) for r in rows] == [(t, n) for t in (32, 64) for n in names]
    assert [r["train"]["precision"] for r in rows[-3:]] == ["fp32", "bf16", "bf16"]
    assert all(len(r["ms"]) == 2 and r["tokens_per_second"] > 0 for r in rows)
    assert all(len(r["optimizer_ms"]) == 2 for r in rows)
    assert "| loro:rank=4 |" in capsys.readouterr().out


def test_inference(numbers: Any) -> None:
    rows = numbers("inference")
    assert [(r["batch"], r["length"]) for r in rows] == [(2, 8), (1, 16)]
    assert all(len(r[k]["ms"]) == 20 for r in rows for k in ("dense", "factorised", "plain"))


def test_budget(numbers: Any) -> None:
    rows = numbers("budget")
    assert [len(r["errors"]) for r in rows] == [0, 3, 3, 0]
    for e in (e for r in rows for e in r["errors"]):
        assert e["delta"] > 0
        assert abs(e["bias"]) < 5


@pytest.mark.slow
def test_estimate(numbers: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = numbers("estimate")
    assert all(r["predicted_peak"] > r["predicted_between"] > 0 for r in rows)
    assert rows[-1]["predicted_peak"] < rows[0]["predicted_peak"]
    assert "| loro:rank=4 | 0.00 | not measured |" in capsys.readouterr().out


@pytest.mark.slow
def test_dynamics(numbers: Any, smoke_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes with a share of the cores train and analyze; a second call reads the tables."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    rows = numbers("dynamics")
    found = json.loads((smoke_folder / "out" / "relora-warm-0" / "env.json").read_text())
    assert found[0]["threads"] == max(1, cores() // 2)
    assert {row["step"] for row in rows} == {0, 1, 2, 3, 4, 6, 7, 8}
    cycles = [row for row in rows if row["what"] == "cycle"]
    assert [row["step"] for row in cycles] == [6] and 0 <= cycles[0]["overlap"] <= 1
    assert not (smoke_folder / "out" / "runs" / "relora-warm-0").exists()
    assert numbers("dynamics") == rows


@pytest.mark.slow
def test_tasks(numbers: Any, smoke_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every run is judged, and a second call prints the same from the results."""
    found = numbers("tasks")
    assert [(row["run"], row["seed"]) for row in found] == [("full", 0), ("bpt", 0)]
    out = capsys.readouterr().out
    assert "| piqa | acc_norm |" in out and "| minus full | bpt |" in out
    assert "left out: --tasks-data:" in out
    assert not (smoke_folder / "out" / "judged" / "runs" / "bpt-0").exists()
    assert numbers("tasks") == found


@pytest.mark.slow
def test_study(
    numbers: Any, script: Any, smoke_folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Two rates, two seeds of the better one, each judged; a second call trains and judges none."""
    study, out = script("study"), smoke_folder / "out" / "study"
    more = ("--only", "full", "relora-warm", "--rates", "1e-3", "1e-2", "--seeds=2")
    found = numbers("study", *more)
    pairs = [(name, seed) for name in ("full", "relora-warm") for seed in (0, 1)]
    for pair in pairs:
        values = {(row["group"], row["measure"]): row["value"] for row in found
                  if (row["method"], row["seed"]) == pair}  # fmt: skip
        held_out, domain = values["held-out loss", "all"], values["loss by domain", "corpus"]
        assert domain == pytest.approx(held_out, rel=1e-3)
        assert values["BLiMP", "all"] == values["BLiMP", "binding"]
        assert 0 < values["PER over the rank", "weight ov"] <= 1
        if pair[0] == "full":  # an update of relora in so short a run may have a lower rank
            assert values["log10 condition", "update o_proj"] > 0
    assert sorted({(row["method"], row["seed"]) for row in found}) == pairs
    settings = (out / "relora-warm-1" / "config.toml").read_text()
    rates = {row["method"]: row["lr"] for row in found}
    assert f"warm_start_lr = {rates['full']}" in settings
    assert not list((out / "compare" / "runs").iterdir())
    printed = capsys.readouterr().out
    assert printed.count("est)") == 2 and "| held-out loss, minus full | relora-warm |" in printed
    for name in ("compare", "call"):
        monkeypatch.setattr(study, name, lambda *given: pytest.fail(f"called with {given}"))
    assert numbers("study", *more) == found


def test_the_methods_of_the_study_have_its_shares_of_the_steps(script: Any) -> None:
    study = script("study")
    args = argparse.Namespace(
        steps=600, batch_size=64, seq_len=512, precision="fp32", device="cpu", compile=False,
        preset="pico-tiny", layers=None, intermediate_size=None, data=Path("corpus"), set=[],
    )  # fmt: skip
    tuned = [{"method": "full", "lr": 4e-3, "held_out_loss": 5.0}]
    blocks = [study.settings_of(name, args, tuned) | {"optim.lr": [1e-3, 2e-3]}
              for name in study.METHODS]  # fmt: skip
    runs = expand(tomllib.loads(study.grid(args, blocks))).runs
    assert len(runs) == 2 * len(study.METHODS)
    _, relora, warm, lora, compat, ours, bpt, _ = (run.config.method for run in runs[::2])
    assert [m.merge_every for m in (relora, warm, compat, ours, bpt)] == [60] * 5
    assert [m.restart_warmup for m in (relora, warm, compat, ours)] == [3] * 4
    assert [m.warm_start_steps for m in (relora, warm, lora, compat, ours)] == [0, 150, 150, 0, 0]
    assert warm.warm_start_lr == lora.warm_start_lr == 4e-3
    assert ours == replace(compat, dropout=0.0)
    relora_run, ours_run = runs[2].config, runs[10].config
    assert (ours_run.optim, ours_run.schedule) == (relora_run.optim, relora_run.schedule)
    as_released = recipes.load(study.RECIPE).method
    shares = {"merge_every": 2000, "reset_every": 2000, "restart_warmup": 100}
    assert replace(compat, **shares) == replace(as_released, **shares, train_rest=True)
    with pytest.raises(SystemExit, match="add full to --only"):
        study.settings_of("relora-warm", args, [])
    with pytest.raises(SystemExit, match="lora-warm starts at full's best rate"):
        study.settings_of("lora-warm", args, [])


def test_the_tables_of_the_study_pair_seeds_and_leave_out_what_is_not_known(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The interval of two values is t s / sqrt(2) = 12.7062 |x - y| / 2."""
    (tmp_path / "tune.csv").write_text(
        "method,lr,seed,state,held_out_loss\nfull,0.001,0,finished,5\nfull,0.002,0,finished,4\n"
        "full,0.004,0,diverged,\nbpt,0.001,0,finished,4\nbpt,0.002,0,finished,6\n"
    )
    rows = [
        "full,0.001,0,held-out loss,all,9,0",  # of a rate that is not the best any more
        *(f"full,0.002,{seed},held-out loss,all,{4 + seed},0" for seed in (0, 1)),
        *(f"bpt,0.001,{seed},held-out loss,all,{4.5 + seed * 1.2},0" for seed in (0, 1)),
        "bpt,0.001,2,held-out loss,all,,0",
        "bpt,0.001,0,log10 condition,weight ov,1.5,3",
        "bpt,0.001,1,log10 condition,weight ov,,12",
    ]
    header = "method,lr,seed,group,measure,value,left_out"
    (tmp_path / "measures.csv").write_text("\n".join([header, *rows]) + "\n")
    script("study_tables").print_tables(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert "| full | 5.0000 | 4.0000 | diverged | 0.002 |" in lines
    assert "| bpt | 4.0000 | 6.0000 |  | 0.001 (lowest) |" in lines
    assert "| all | 4.5000 ± 6.3531 | 5.1000 ± 7.6237 |" in lines
    assert "| all | +0.6000 ± 1.2706 |" in lines
    assert "| weight ov | 1.5000* |" in lines
    assert lines[-1] == "bpt-2 diverged and is left out"


def test_a_table_of_seeds_pairs_them_and_names_what_it_lacks(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As above; of three values the interval is 4.30265 s / sqrt(3)."""
    file, seeds = tmp_path / "runs.csv", script("seed_tables")
    rows = ["full,,0,4", "full,,1,5", "loro,0.01,1,5.7", "loro,0.01,0,4.5", "loro,0.01,2,9",
            "loro,1,0,6", "bpt,1,3,"]  # fmt: skip
    file.write_text("\n".join(["line,rate,seed,held_out_loss", *rows]) + "\n")
    given = [str(file), "--by", "line", "rate", "--minus", "full", "-"]
    seeds.main(given)
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| full - | 2 | 4.5000 ± 6.3531 |  |",
        "| loro 0.01 | 3 | 6.4000 ± 5.7886 | +0.6000 ± 1.2706 |",  # of the seeds that both have
        "| loro 1 | 1 | 6.0000 | +2.0000 |",
        "| bpt 1 | 1 | – | – |",
        "",
    ]
    with pytest.raises(SystemExit, match=r"no line full 1; there are full -, loro 0\.01, loro 1"):
        seeds.main([*given[:-1], "1"])
    with pytest.raises(SystemExit, match="no column blimp; there are line, rate, seed"):
        seeds.main([*given, "--value", "blimp"])
    with pytest.raises(SystemExit, match="two runs of seed 0 with the same values of --by"):
        seeds.main([str(file), "--by", "line", "--minus", "full"])


@pytest.fixture
def tune(script: Any, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script tune, which trains in a thread here and not in processes of its own."""
    found: ModuleType = script("tune")
    monkeypatch.setattr(found, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    return found


@pytest.mark.slow
def test_tune(
    tune: ModuleType, numbers: Any, smoke_folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Two rates of loro, then the seeds; a second call trains nothing, or what is new."""
    found = numbers("tune")
    assert [(r["case"], r["seed"]) for r in found] == [("full@0:full", 1), ("full:loro", 1)]
    assert all(-1 <= r["value"] <= 1 and r["steps"] == 2 and r["seconds"] > 0 for r in found)
    out = smoke_folder / "out" / "tune"
    kept = json.loads((out / "results.json").read_text())
    assert [(r["lr"], r["seed"]) for r in kept["runs"][:2]] == [(1e-4, 0), (1e-3, 0)]
    assert {r["start_loss"] for r in kept["runs"]} == {kept["starts"][0]["loss"]}
    assert [file.name for file in (out / "runs").iterdir()] == ["full"]
    printed = capsys.readouterr().out
    assert "| majority class |  |  | 0.0000 |" in printed and "| full | loro | 2,176 |" in printed
    assert numbers("tune", "--seeds", "1", "2", "--minutes=0") == found
    assert "(1 of 2) |" in capsys.readouterr().out
    monkeypatch.setattr(tune, "pretrain", lambda *given: pytest.fail(f"called with {given}"))
    seeds = [row["seed"] for row in numbers("tune", "--seeds", "1", "2")]
    assert seeds == [1, 2, 1, 2]
    with pytest.raises(SystemExit, match=r"--epochs: .* has results of \{'cola': 1.*another --out"):
        numbers("tune", "--epochs", "cola=2")


def test_tune_is_out_of_time_at_once(
    tune: ModuleType, numbers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert numbers("tune", "--minutes=0", f"--out={tmp_path / 'out'}") == []
    assert "| full | loro |  | – (0 of 1) |" in capsys.readouterr().out


def test_the_cases_of_tune_differ_in_start_and_method_alone(tune: ModuleType) -> None:
    given = ["--data=corpus", "--tasks-data=tasks", "--out=out", "--rates", "lora=1e-3,2e-3"]
    args = tune.parsed([*given, "--epochs", "rte=5", "--start-rates", "loro=1e-2"])
    assert args.rates["lora"] == [1e-3, 2e-3] and args.rates["relora"] == (3e-4, 1e-3, 3e-3)
    assert args.epochs["rte"] == 5 and args.epochs["sst2"] == 1
    assert args.start_rates == {"full": 1e-3, "relora": 4e-3, "loro": 1e-2}
    configs = [tune.tuning(args, tune.Job(case, "rte", 1e-3, 1)) for case in tune.CASES]
    assert len({config.run for config in configs}) == len(tune.CASES)
    names = ["full@0", "full", "relora", "loro", *["full"] * 3]
    assert [config.init_from.name for config in configs] == names
    assert [config.method.name for config in configs] == [*["full"] * 4, "relora", "lora", "loro"]
    for method in (config.method for config in configs[4:]):
        assert (method.rank, method.targets, method.train) == (8, "q,k", "classifier")
    relora, _, loro = (config.method for config in configs[4:])
    assert (relora.warm, loro.around, loro.alpha_over_rank) == (0, "frozen", True)
    for flag, item in [("--rates", "lora=fast"), ("--epochs", "cola"), ("--rows", "ten=10")]:
        with pytest.raises(SystemExit, match=f"{flag}: must be NAME=VALUE.*{item}"):
            tune.parsed([*given, flag, item])


def test_the_tables_of_tune_have_the_best_rates_and_say_what_is_missing(
    tune: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """The interval of two values is 12.7062 |x - y| / 2."""
    values = [  # case, lr, seed, value, loss
        ("full:full", 1.0, 0, 0.7, 0.5), ("full:full", 2.0, 0, 0.7, 0.4),
        ("full:full", 2.0, 1, 0.8, 0.4), ("full:full", 2.0, 2, 0.82, 0.4),
        ("full:full", 1.0, 1, 0.1, 0.4),
        ("full@0:full", 1.0, 0, 0.6, 0.6), ("full@0:full", 2.0, 0, None, None),
        ("full@0:full", 1.0, 1, 0.5, 0.6), ("full@0:full", 1.0, 2, 0.54, 0.6),
        ("full:lora", 3.0, 1, 0.75, 0.5), ("full:loro", 1.0, 0, 0.9, 0.5),
    ]  # fmt: skip
    keys = ("case", "lr", "seed", "value", "loss")
    runs = [dict(zip(keys, row, strict=True)) | {"task": "rte", "trainable": 10, "seconds": 2.0,
            "start_loss": 4.0} for row in values]  # fmt: skip
    starts = [{"start": "full", "lr": 1.0, "loss": loss, "trainable": 9, "parameters": 10,
               "seconds": 60.0} for loss in (3.9, 4.0)]  # fmt: skip
    args = argparse.Namespace(
        only=[*dict.fromkeys(row[0] for row in values)], tasks=["rte"], seeds=[1, 2],
        rates={"full": [1.0, 2.0], "lora": [3.0], "loro": [1.0, 2.0]},
    )  # fmt: skip
    found = tune.print_tables(args, starts, runs, {"rte": 0.527})
    assert [row["value"] for row in found] == [0.8, 0.82, 0.5, 0.54, 0.75]
    lines = capsys.readouterr().out.splitlines()
    assert "| majority class |  |  | 0.5270 |" in lines
    assert "| full | full | 10 | 0.8100 ± 0.1271 |" in lines
    assert "| full@0 | full | 10 | 0.5200 ± 0.2541 |" in lines
    assert "| full | lora | 10 | 0.7500 (1 of 2) |" in lines
    assert "| full | loro | 10 | – (0 of 2) |" in lines
    assert "| full@0:full | -0.2900 ± 0.1271 |" in lines
    assert "| full:full | 1: 0.7000, **2: 0.7000** |" in lines
    assert "| full@0:full | **1: 0.6000**, 2: diverged |" in lines
    assert "| full:lora | 3, not tuned |" in lines
    assert "| full:loro | 1: 0.9000, 2: – |" in lines
    assert "| full | 1 | 3.9000 | 9 / 10 | 60 | 0 |" in lines
    assert "| full | 1 | 4.0000 | 9 / 10 | 60 | 11 |" in lines


@pytest.mark.slow
def test_scale(numbers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes are called by torchrun; a second call reads the results."""
    path = os.pathsep.join(map(os.path.abspath, sys.path))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = numbers("scale")
    names = ["full", *METHOD_ROWS]
    assert [r["row"].split(":")[0] for r in found[::2]] == [n.split(":")[0] for n in names] * 2
    assert [r["world_size"] for r in found] == [1, 2] * 8
    for one, two in zip(found[::2], found[1::2], strict=True):
        assert one["sent_bytes"] == 0  # of two: 2 bytes a weight, 4 for a diagonal
        assert 2 * two["trainable"] <= two["sent_bytes"] <= 2.2 * two["trainable"]
        assert two["trainable"] == one["trainable"] and len(two["ms"]) == 2
        assert (one.get("event_ms") is None) == (one["tokens"] == 64 or one["row"] == "full")
    assert numbers("scale") == found


def test_merges(numbers: Any) -> None:
    rows = numbers("merges")
    assert [r["event"] for r in rows] == ["merge", "merge", "exact step"]
    assert all(len(r["event_ms"]) == 2 for r in rows)


def test_fast_forms(numbers: Any) -> None:
    rows = numbers("fast_forms")
    assert [r["fast"] for r in rows] == [False, True] * 2
    assert all(len(r["losses"]) == 4 for r in rows)


def test_exact_step(ran: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ran("exact_step")
    out = capsys.readouterr().out
    assert "| Gram | " in out
    assert "| step of 7 pairs" in out


def test_corruption(script: Any, smoke_folder: Path, tmp_path: Path) -> None:
    smoke, out = script("smoke"), tmp_path / "cases.jsonl"
    words = smoke.arguments(smoke.SCRIPTS["corruption"], device="cpu", folder=smoke_folder)
    assert script("corruption").main([*words, f"--out={out}"]) == 0
    cases = [case for line in out.read_text().splitlines() for case in json.loads(line)["cases"]]
    found = {(c["file"], c["damage"]): c["class"] for c in cases}
    assert found["begun/checkpoints/step-00000006/SHA256SUMS", "half"] == "harmless"
    assert found["unfinished/train-00000.bin", "random bytes"] == "refused"
    assert {c["command"] for c in cases} == {"resume", "data prepare"}


def test_the_corruption_sweep_sees_what_must_not_happen(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Were another result not reported, an error not named, or an exception not caught."""
    corruption, commands, subjects = (script(n) for n in ("corruption", "commands", "subjects"))
    whole, file = corruption.Ran(0, "", "", 1), tmp_path / "run" / "env.json"
    copy = commands.Copy(subjects.Subjects(tmp_path), tmp_path / "run")
    ran = {
        "harmless": corruption.Ran(0, "", "", 1),
        "refused": corruption.Ran(1, "", f"error: {file}: damaged\n"),
        "reported": corruption.Ran(0, f"WARNING {tmp_path}/env.j\n        son: damaged\n", "", 2),
        "silent": corruption.Ran(0, "INFO     other text", "", 2),
        "unclear": corruption.Ran(1, "", "error: Is a directory\n"),
        "traceback": corruption.Ran(raised="Traceback ..."),
        "hang": corruption.Ran(raised="hang"),
    }
    for name, one in ran.items():
        assert corruption.classify(commands.COMMANDS[0], one, whole, file, copy) == name
    lines = list(corruption.table([{"file": "run/env.json", "command": "eval", "class": "hang"}]))
    assert lines[-1] == "| `run/env.json` | eval |  |  |  |  | 1 |"


def test_an_interrupted_corruption_sweep_continues_with_what_is_missing(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corruption, out, damaged = script("corruption"), tmp_path / "cases.jsonl", []
    command = corruption.COMMANDS[0]

    def damage(sweep: Any, job: tuple[int, Path]) -> list[dict[str, str]]:
        if len(damaged) == 3:
            raise KeyboardInterrupt
        damaged.append(str(job[1]))
        place = f"{command.subject}/{job[1]}"
        return [{"file": place, "command": command.name, "damage": "half", "class": "refused"}]

    def jobs(sweep: Any, only: list[str], names: str = "abcd") -> Any:
        return [(0, Path(f"{name}-{os.urandom(4).hex()}.json")) for name in names]

    monkeypatch.setattr(corruption.Sweep, "damage", damage)
    monkeypatch.setattr(corruption.Sweep, "jobs", jobs)
    monkeypatch.setattr(corruption.Sweep, "undamaged", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        corruption.main([f"--out={out}"])
    with out.open("r+") as file:
        file.truncate(out.stat().st_size - 9)  # cut off while the third was written
    damaged.clear()
    assert corruption.main([f"--out={out}"]) == 0
    assert [name[0] for name in damaged] == ["c", "d"]
    assert "4 cases: 4 refused" in capsys.readouterr().out
    assert corruption.main([f"--out={out}", "--table"]) == 0
    assert "4 cases: 4 refused" in capsys.readouterr().out
    assert corruption.main([f"--out={out}", "--table", "--seed=1"]) == 0
    assert "0 cases" in capsys.readouterr().out


def test_first_table(ran: Any, capsys: pytest.CaptureFixture[str]) -> None:
    ran("first_table")
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (row["run"].split(":")[0], row["steps"]) == ("bpt", 2)
    assert row["loss"] > 0


def test_data(
    ran: Any, script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prepared here, not in processes of their own."""
    pytest.importorskip("pyarrow")
    data = script("data")
    monkeypatch.setattr(data, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    ran("data")
    out = capsys.readouterr().out
    assert all(f"| `{form}` | " in out for form in data.FORMS)
    assert "| 512 x 1024 | " in out


def test_the_share_of_a_merge_is_of_the_steps_that_lie_between(
    numbers: Any, script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script("merges"), "merge_times", lambda training, repeat: [32.0])
    row = numbers("merges", "--ms-per-8192=10")[0]
    assert row["share"] == pytest.approx(32 / (200 * 16 * 10))


def test_loop(numbers: Any) -> None:
    rows = numbers("loop")
    assert all(
        len(r[k][c]) == 2 for r in rows for k in ("trainer", "bare") for c in ("wall", "cpu")
    )


def test_cpu_peft(numbers: Any) -> None:
    pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    rows = numbers("cpu_peft")
    assert all(len(r["wall"]) == len(r["cpu"]) == 1 for r in rows)
    trainable = {r["row"]: r["trainable"] for r in rows}
    assert trainable["Trainer + PEFT, the rest trains too"] == trainable["lora:rank=4"]
    assert trainable["Trainer + PEFT, adapters"] == trainable["lora:rank=4:train_rest=false"]
    assert trainable["Trainer, full"] == trainable["full"]


@pytest.mark.slow
def test_soak(tmp_path: Path) -> None:
    """A dozen runs. In a process of its own, because it forks."""
    out = tmp_path / "json"
    subprocess.run(
        [sys.executable, BENCHMARKS / "soak.py", "--runs=12", "--workers=2", f"--json={out}"],
        check=True,
        timeout=1800,
    )
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["files"] + row["rows"] for row in rows] == [[]] * 12
    assert all(row["killed"] for row in rows)


def test_a_run_that_ends_before_the_clock_kills_it_is_repeated(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soak = script("soak")
    tried: list[float] = []

    def process(action: Any, when: Any, run: Path) -> str:
        if when is None:  # the resume that completes the run
            return "finished"
        run.mkdir(parents=True)  # fails unless what the last attempt left is gone
        tried.append(when.seconds)
        return "killed" if when.seconds < 1 else "finished"

    monkeypatch.setattr(soak, "process", process)
    for name in ("different_files", "different_rows"):
        monkeypatch.setattr(soak, name, lambda *_: [])
    for scratch, nth in [(False, 1), (True, 6)]:
        late = soak.Moment("by the clock", seconds=5, scratch=scratch, nth=nth)
        monkeypatch.setattr(soak, "moment", lambda *_, late=late: late)
        case = soak.Case(nth, "full", "fp32", ("by the clock",))
        assert soak.soak(case, tmp_path, 5.0, 0)["killed"] == ["by the clock"]
    assert tried == [5, 2.5, 1.25, 0.625] * 2
    assert soak.earlier(late).nth == 5


def test_the_smoke_test_has_every_script(script: Any) -> None:
    """And so this file has, which calls each as the smoke test does."""
    parts = {"commands", "common", "seed_tables", "smoke", "study_tables", "subjects"}
    parts |= {"tune_tables"}
    found = {file.stem for file in BENCHMARKS.glob("*.py")} - parts
    assert script("smoke").SCRIPTS.keys() == found
    assert all(f"test_{name}" in globals() for name in found)


def test_the_smoke_tests_runs_change_phase_merge_and_step_exactly(
    script: Any, smoke_folder: Path
) -> None:
    smoke = script("smoke")
    for name in smoke.TRAININGS:
        assert main(smoke.training_arguments(name, device="cpu", folder=smoke_folder)) == 0
    for name, count in [("bpt", "merges"), ("relora", "merges"), ("loro", "exact_steps")]:
        assert max(row.get(count, 0) for row in recorded(smoke_folder / f"train-{name}")) == 2
    assert [row["phase"] for row in recorded(smoke_folder / "train-relora", "phase")] == [1]


def test_on_a_gpu_the_smoke_test_compiles_and_records(script: Any) -> None:
    smoke = script("smoke")
    checks = {check.name: check for check in smoke.all_checks("cuda", Path("corpus"))}
    tests = {name for name in checks if name.startswith("gpu-")}
    assert {"gpu-gpu-1", "gpu-gpu-4", "gpu-spectron"} <= tests
    assert checks.keys() - tests == smoke.SCRIPTS.keys() | smoke.TRAININGS.keys()
    assert "--cuda-graph" in checks["inference"].command
    for name in smoke.TRAININGS:
        assert {"--train.compile=true", "--train.cuda-graph=true"} <= set(checks[name].command)
    eager = ("--no-compile", "--set=train.compile=false", "--device=cpu")
    found = {name for name, check in checks.items() if any(e in check.command for e in eager)}
    assert found == {"cpu_peft"}


@pytest.mark.slow
@pytest.mark.parametrize("file", ["test_gpu", "distributed/test_replicas"])
def test_the_shards_of_a_file_of_gpu_tests_are_all_of_it(script: Any, file: str) -> None:
    """Each test in one of them, and none of them is empty, which would be an error of pytest."""
    name = file.rpartition("/")[2]

    def collected(*words: str) -> list[str]:
        done = subprocess.run([*words, "--collect-only", "-q"], capture_output=True, text=True,
                              cwd=BENCHMARKS.parent, timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return [line for line in done.stdout.splitlines() if "::" in line]

    short = f"gpu-{name.removeprefix('test_')}"
    checks = [
        c for c in script("smoke").gpu_tests(several=True) if c.name.rpartition("-")[0] == short
    ]
    shards = [collected(*check.command) for check in checks]
    whole = collected(*[w for w in checks[0].command if not w.startswith("--shard")])
    assert len(shards) == 4 and min(map(len, shards)) >= max(map(len, shards)) - 1 > -1
    assert all(shards) and sorted(test for shard in shards for test in shard) == sorted(whole)


class Watching(TorchDispatchMode):
    """Notes the operations that have to do with the CPU or with a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(made) if isinstance(x, torch.Tensor)]
        other = [x for x in tree_leaves((args, kwargs)) if not isinstance(x, torch.Tensor)]
        if any(isinstance(x, torch.Generator) or x == CPU for x in other) or any(
            t.device == CPU for t in tensors
        ):
            self.seen.append(str(func))
        return made


@pytest.mark.parametrize("phase", [0, 1])
@pytest.mark.parametrize("name", METHODS)
def test_a_model_is_drawn_on_the_device_alone(script: Any, name: str, phase: int) -> None:
    """Whatever device and generator a method names. A GPU takes no generator of the CPU's."""
    config = resolved(tiny(name, Path("corpus")), world_size=1, on_gpu=False)
    with Watching() as watching, script("common").drawn_on(torch.device("meta")):
        model = build(config, phase)
    assert watching.seen == []
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"meta"}


def test_what_is_made_of_numbers_of_the_host_is_on_the_device_too(script: Any) -> None:
    numbers = np.zeros(2)
    with script("common").drawn_on(torch.device("meta")):
        made = [torch.tensor([1.0], device="cpu"), torch.from_numpy(numbers), torch.ones(2).cpu()]
    assert {t.device.type for t in made} == {"meta"}


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
                "optimizer_ms": [2.0, 4.0, 3.0], "optimizer_flops": peak * 10**11,
                "trainable": 1, "parameters": 2}  # fmt: skip

    rows = [row("full", 90, 8), row("bpt", 150, 5), row("full", 110, 8)]
    table = script("speed").compared([*rows[:2], {"row": "big", "peak_bytes": 2**30}, rows[2]])
    assert [cells[3] for cells in table] == ["0.900", "1.500", "", "1.100"]
    assert [cells[4] for cells in table] == ["3.00", "3.00", "", "3.00"]
    assert [cells[5] for cells in table] == ["0.80", "0.50", "", "0.80"]
    assert [cells[6] for cells in table] == ["8.00", "", "over 1.00", "8.00"]
    assert [cells[7] for cells in table] == ["9.00", "9.00", "", "9.00"]


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


@pytest.mark.slow
def test_no_gpu_benchmark_needs_the_command_lines_packages() -> None:
    code = """
import sys
sys.modules |= {"tyro": None, "rich": None, "peft": None}
import smoke, speed, inference, budget, merges, loop, estimate, fast_forms, first_table, exact_step
import tune
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS), *sys.path])}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


def check(smoke: ModuleType, name: str, code: str, **given: Any) -> Any:
    return smoke.Check(name, [sys.executable, "-S", "-c", code], **given)


def test_the_smoke_test_says_what_failed(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smoke = script("smoke")
    checks = [
        check(smoke, "good", "print(1)"),
        check(smoke, "tests", "print('3 passed in 1 s')", tells=True),
        check(smoke, "bad", "print('so far'); raise ValueError('so it is')"),
        check(smoke, "crash", "import os; os.abort()"),
        check(smoke, "stuck", "import time; print('so far', flush=True); time.sleep(600)", limit=1),
        check(smoke, "lacking", "", needs=("sys", "no_such_package")),
    ]
    assert sorted(smoke.run(smoke.able(checks), tmp_path, jobs=4)) == ["bad", "crash", "stuck"]
    lines = {line.split()[1]: line.split() for line in capsys.readouterr().out.splitlines()}
    said = {name: (words[0], " ".join(words[4:])) for name, words in lines.items()}
    assert said == {
        "good": ("ok", ""),
        "tests": ("ok", "3 passed in 1 s"),
        "bad": ("FAIL", "ValueError: so it is"),
        "crash": ("FAIL", "exit status -6"),
        "stuck": ("FAIL", "no end after 1 s"),
        "lacking": ("skip", "needs no_such_package"),
    }
    assert sorted(file.name for file in tmp_path.iterdir()) == ["bad.txt", "crash.txt", "stuck.txt"]
    assert "so far" in (tmp_path / "bad.txt").read_text()


@pytest.mark.parametrize(("code", "status"), [("", 0), ("raise SystemExit(3)", 1)])
def test_the_exit_status_of_the_smoke_test(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, status: int
) -> None:
    smoke = script("smoke")
    only = check(smoke, "one", code)
    monkeypatch.setattr(smoke, "all_checks", lambda device, folder: [only])
    monkeypatch.setattr(smoke, "make_corpus", lambda folder: None)
    assert smoke.main(["--device=cpu", f"--out={tmp_path / 'out'}"]) == status
    with pytest.raises(SystemExit, match="no check another; there are one"):
        smoke.main(["--only", "another"])
