"""Grids of runs: what is started, resumed, tried again and left alone, and what comes of it.

Most tests put a script of a few lines in the place of a training, for speed.
"""

import csv
import errno
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from support import Killed, kill_at, rows, tiny, write_grid

import peptrain.comparison.workers
import peptrain.runs.lock
from peptrain.cli.app import main
from peptrain.cli.progress import comparing, standing
from peptrain.comparison import compare as module
from peptrain.comparison.compare import compare
from peptrain.comparison.equal_cost import Timing
from peptrain.comparison.grid import GridRun, load_grid
from peptrain.comparison.table import Comparison, as_csv
from peptrain.comparison.workers import Job, Status, Working, visible_gpus
from peptrain.config import load
from peptrain.data import Corpus
from peptrain.errors import CheckpointError, ConfigError, DataError, Interrupted
from peptrain.files import write_atomically
from peptrain.models.hf import ModelConfig, hf_config
from peptrain.settings import toml
from peptrain.testing import MODEL, newest
from peptrain.training.loop import train
from peptrain.training.result import Result

pytestmark = pytest.mark.usefixtures("signals")
RATES, SEEDS = [1e-3, 2e-3], [0, 1]


FAKE = """
import json, os, shutil, signal, sys, time
run, settings, what = sys.argv[1:]
os.makedirs(run, exist_ok=True)
shutil.copyfile(settings, run + "/config.toml")
def row(event, **given):
    with open(run + "/metrics.jsonl", "a") as file:
        file.write(json.dumps({"event": event, **given}) + "\\n")
print("environment", os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("OMP_NUM_THREADS"))
print("colours", os.environ.get("FORCE_COLOR"), os.environ.get("NO_COLOR"))
def saved(*signals):
    time.sleep(0.2)
    sys.exit(130)
if what == "crash":
    sys.exit("Traceback\\nRuntimeError: out of memory")
elif what == "error":
    print("error: method.rank: too large; give less\\nand more", file=sys.stderr)
    sys.exit(1)
elif what == "diverged":
    row("step", step=2, loss=9.0)
    row("diverged", step=3, error="step 3: the loss is nan; try less")
    sys.exit("error: step 3: the loss is nan; try less")
elif what == "preempted":
    sys.exit(os.EX_TEMPFAIL)
elif what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
elif what == "hang":
    signal.signal(signal.SIGTERM, saved)
    row("step", step=4, loss=3.5)
    time.sleep(600)
elif what == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    row("step", step=4, loss=3.5)
    time.sleep(600)
row("step", step=8, loss=3.5)
row("end", step=8, held_out_loss=float(what), perplexity=1.0, trainable=1000,
    state_bytes=8000, tokens_per_second=100.0)
"""


@dataclass
class Fakes:
    """What each training does, by (method, learning rate, seed), else a loss of 3."""

    does: dict[tuple[str, float, int], Any] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)

    def command(self, job: Job) -> list[str]:
        config = load(job.settings)
        assert config.optim.lr is not None
        key = (config.method.name, config.optim.lr, config.train.seed)
        self.started.append(job.name)
        what = str(self.does.get(key, 3.0))
        return [sys.executable, "-S", "-c", FAKE, str(job.run), str(job.settings), what]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    made = Fakes()
    monkeypatch.setattr(Job, "command", lambda job: made.command(job))
    monkeypatch.setattr(peptrain.comparison.workers, "POLL", 0.02)
    return made


def test_the_table_of_a_grid(fakes: Fakes, corpus: Path, tmp_path: Path) -> None:
    fakes.does = {
        ("full", 1e-3, 0): 2.9, ("full", 1e-3, 1): 3.4, ("full", 2e-3, 0): 3.0,
        ("full", 2e-3, 1): 3.2, ("bpt", 1e-3, 0): 2.5, ("bpt", 1e-3, 1): 2.7,
    }  # fmt: skip
    grid = write_grid(tmp_path, corpus, {}, {"method.name": "bpt", "method.rank": 2})
    made = compare(grid, tmp_path / "out", workers=3)
    assert [(line.label, line.lr, line.place) for line in made.lines] == [
        ("full", 2e-3, "highest"),
        ("bpt rank=2", 1e-3, "lowest"),
    ]
    assert [line.loss for line in made.lines] == pytest.approx([3.1, 2.6])
    assert [line.tokens for line in made.lines] == [8 * 4 * 16] * 2
    floors = "schedule.floor differs by the methods' defaults: 0.1 for full; 0.0 for bpt"
    assert made.notes == [floors]
    out = tmp_path / "out"
    with (out / "table.csv").open() as file:
        assert [float(line["held_out_loss"]) for line in csv.DictReader(file)] == [
            pytest.approx(3.1), pytest.approx(2.6),
        ]  # fmt: skip
    assert "| full | 3.100 ± " in (out / "table.md").read_text()
    assert r"bpt rank=2 & 2.600 $\pm$" in (out / "table.tex").read_text()
    kept = json.loads((out / "runs.json").read_text())
    assert len(kept["runs"]) == 8 and len(kept["configurations"]) == 2
    first = kept["runs"][0]
    assert (out / first["run"] / "config.toml").is_file()
    assert (first["method"], first["lr"], first["state"]) == ("full", 1e-3, "finished")
    assert first["tokens"] == 512 and first["held_out_loss"] == 2.9
    assert "tuned by the same grid, over 0.001, 0.002" in kept["caption"]


def test_a_second_call_starts_nothing_and_a_changed_grid_only_adds(
    fakes: Fakes, corpus: Path, tmp_path: Path
) -> None:
    grid, out = write_grid(tmp_path, corpus), tmp_path / "out"
    first = compare(grid, out)
    assert len(fakes.started) == 4
    assert compare(grid, out) == first and len(fakes.started) == 4
    # One more seed, and a key that says what was the default anyway.
    write_grid(tmp_path, corpus, {"optim.clip": 1.0}, train__seed=[0, 1, 2])
    (line,) = compare(grid, out).lines
    assert line.runs == line.finished == 6
    assert [name.split("-seed=")[1][0] for name in fakes.started[4:]] == ["2", "2"]
    write_grid(tmp_path, corpus, train__batch_size=8)
    assert compare(grid, out).lines[0].tokens == 2 * first.lines[0].tokens
    assert len(fakes.started) == 10 and len(list((out / "runs").iterdir())) == 10


def test_runs_of_0_1_0_are_found_although_they_evaluated_more_tokens(
    fakes: Fakes, corpus: Path, tmp_path: Path
) -> None:
    grid, out = write_grid(tmp_path, corpus), tmp_path / "out"
    made = compare(grid, out)
    for file in out.glob("runs/*/config.toml"):
        text = file.read_text()
        assert "eval_tokens = 256\n" in text
        file.write_text(text.replace("eval_tokens = 256\n", "eval_tokens = 8192\n"))
    assert compare(grid, out) == made and len(fakes.started) == 4


def test_at_an_equal_budget_each_run_is_started_with_its_own_steps(
    fakes: Fakes, corpus: Path, tmp_path: Path
) -> None:
    grid, out = write_grid(
        tmp_path, corpus, {}, {"method.name": "lowrank", "method.rank": 2},
        train__seed=0, optim__lr=1e-3,
    ), tmp_path / "out"  # fmt: skip
    grid.write_text(f'equal = "flops"\n{grid.read_text()}')
    made = compare(grid, out)
    full, low = made.lines
    assert made.equal == "flops" and full.steps == 8 < low.steps
    assert full.cost and low.cost and low.cost <= full.cost * (1 + 1e-9)
    for run in json.loads((out / "runs.json").read_text())["runs"]:
        assert load(out / run["run"] / "config.toml").train.steps == run["steps"]
    assert compare(grid, out) == made and len(fakes.started) == 2


@pytest.mark.parametrize("equal", ["tokens", "flops"])
def test_the_same_corpus_in_another_place_is_said_before_runs_are_made_again(
    fakes: Fakes, corpus: Path, tmp_path: Path, equal: str
) -> None:
    """As on another machine, where the home directory has another name."""
    out, first, elsewhere = (tmp_path / name for name in ("out", "first", "elsewhere"))
    shutil.copytree(corpus, first)
    shutil.copytree(corpus, elsewhere)

    def grid(path: Path, **more: Any) -> Path:
        made = write_grid(tmp_path, path, {}, {"method.name": "lowrank", "method.rank": 2}, **more)
        made.write_text(f'equal = "{equal}"\n{made.read_text()}')
        return made

    made = compare(grid(first, train__seed=0), out)
    said = r"has \d runs of this grid, .* corpus at " + re.escape(str(first)) + r"; .*no link"
    with pytest.raises(CheckpointError, match=said):
        compare(grid(elsewhere, train__seed=0), out)
    assert compare(grid(first, train__seed=0), out) == made and len(fakes.started) == 4
    compare(grid(elsewhere, train__seed=1), out)
    assert len(fakes.started) == 8
    shutil.rmtree(first)
    first.symlink_to(elsewhere)  # no help, as the message says
    shutil.rmtree(out / "runs")
    compare(grid(elsewhere, train__seed=0), out)
    compare(grid(first, train__seed=0), out)
    assert len(fakes.started) == 12


def test_a_run_that_lost_its_settings_is_refused_with_what_restores_them(
    fakes: Fakes, corpus: Path, tmp_path: Path
) -> None:
    grid, out = write_grid(tmp_path, corpus), tmp_path / "out"
    made = compare(grid, out)
    file = min(out.glob("runs/*/config.toml"))
    file.unlink()
    kept = out / "settings" / f"{file.parent.name}.toml"
    with pytest.raises(CheckpointError, match=f"config.toml is missing; restore it from {kept}"):
        compare(grid, out)
    shutil.copyfile(kept, file)
    assert compare(grid, out) == made and len(fakes.started) == 4


def test_another_corpus_in_the_same_place_is_another_run(
    fakes: Fakes, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = write_grid(tmp_path, corpus)
    compare(grid, tmp_path / "out")
    other = SimpleNamespace(fingerprint="another", windows=lambda seq_len: 1)
    monkeypatch.setattr(Corpus, "open", lambda path, verify_again: other)
    compare(grid, tmp_path / "out")
    assert len(set(fakes.started)) == 8


FAILURES = {
    "crash": "RuntimeError: out of memory",
    "error": "method.rank: too large",
    "killed": "ended by SIGKILL",
}


@pytest.mark.parametrize("what", FAILURES)
def test_a_failing_run_leaves_the_others_alone_and_is_tried_again(
    what: str, fakes: Fakes, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes.does = {("full", 2e-3, 1): what, ("full", 1e-3, 0): 3.1}
    grid, out = write_grid(tmp_path, corpus), tmp_path / "out"
    line = ["compare", str(grid), "--out", str(out), "--workers", "2"]
    assert main(line) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: 1 of 4 runs failed (see ") and "Traceback" not in said.err
    kept = json.loads((out / "runs.json").read_text())
    assert [run["state"] for run in kept["runs"]].count("finished") == 3
    (failed,) = [run for run in kept["runs"] if run["state"] == "failed"]
    assert failed["error"].startswith(FAILURES[what])
    assert f"{Path(failed['run']).name}: {FAILURES[what]}" in (out / "table.md").read_text()
    assert FAILURES[what] in said.out and "full: 3 of 4 runs finished" in said.out
    log = (out / "logs" / f"{Path(failed['run']).name}.log").read_text()
    assert what == "killed" or FAILURES[what] in log
    (configuration,) = kept["configurations"]
    assert configuration["lr"] == 1e-3, "a rate with a seed less is not chosen"

    fakes.does, fakes.started = {("full", 1e-3, 0): 3.1}, []
    assert main(line) == 0
    assert fakes.started == [Path(failed["run"]).name]
    assert json.loads((out / "runs.json").read_text())["configurations"][0]["lr"] == 2e-3


def test_debug_is_passed_to_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(sys.modules[compare.__module__], "compare", lambda *a: asked.append(a[-1]))
    for line in (["--debug", "compare", "grid"], ["compare", "--debug", "grid"]):
        main([*line, "--out=out"])  # fails, as that compared nothing
    main(["compare", "grid", "--out=out"])
    assert asked == [True, True, False]
    job = Job("one", tmp_path / "run", tmp_path / "settings", tmp_path / "log", 8, debug=True)
    assert "--debug" in job.command()
    assert "--debug" not in replace(job, debug=False).command()


@pytest.mark.parametrize("kind", [Job, Timing])
@pytest.mark.parametrize("out", ["-dash", "~tilde"])
def test_a_comparison_may_have_a_name_that_the_command_of_its_runs_would_misread(
    kind: type[Job], out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = kind("one", Path(out, "run"), Path(out, "settings"), Path(out, "log"), 8)
    words = job.command()
    assert {str(tmp_path / out / "run"), str(tmp_path / out / "settings")} <= {*words}
    assert not [word for word in words if word.startswith(out)]


def test_a_run_that_diverged_is_a_result_and_not_tried_again(
    fakes: Fakes, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes.does = {("full", 2e-3, 0): "diverged", ("full", 2e-3, 1): "diverged"}
    grid, out = write_grid(tmp_path, corpus), tmp_path / "out"
    line = ["compare", str(grid), "--out", str(out), "--workers", "2"]
    for started in (4, 4):
        assert main(line) == 0
        assert len(fakes.started) == started
        kept = json.loads((out / "runs.json").read_text())
        assert [run["state"] for run in kept["runs"]] == ["finished", "diverged"] * 2
        (configuration,) = kept["configurations"]
        assert (configuration["lr"], configuration["place"]) == (1e-3, "lowest")
        name = Path(kept["runs"][1]["run"]).name
        assert f"- diverged: {name}: step 3: the loss is nan\n" in (out / "table.md").read_text()
    write_grid(tmp_path, corpus, optim__clip=0.5)
    compare(grid, out)
    assert len(fakes.started) == 8, "another configuration is another run"


def test_no_more_run_at_a_time_than_workers(fakes: Fakes, corpus: Path, tmp_path: Path) -> None:
    seen = []
    grid = write_grid(tmp_path, corpus, train__seed=[0, 1, 2])
    compare(grid, tmp_path / "out", workers=2, watch=lambda s: seen.append(len(s.running)))
    assert max(seen) == 2 and seen[-1] == 0


@pytest.mark.parametrize("gpus, environments", [
    ([], {"environment None 1"}),
    (["3", "5"], {"environment 3 None", "environment 5 None"}),
])  # fmt: skip
def test_runs_are_spread_over_the_gpus_or_have_one_thread(
    gpus: list[str], environments: set[str], fakes: Fakes, corpus: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("peptrain.comparison.compare._gpus", lambda planned: gpus)
    for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    compare(write_grid(tmp_path, corpus), tmp_path / "out", workers=2)
    logs = (tmp_path / "out" / "logs").iterdir()
    assert {log.read_text().splitlines()[0] for log in logs} == environments


def test_gpus_are_named_as_the_environment_names_them() -> None:
    assert visible_gpus({}, 2) == ["0", "1"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "4, GPU-7"}, 2) == ["4", "GPU-7"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, 0) == []


# Stopping.


def after_a_row(number: int, then: Callable[[], object]) -> Callable[[Status], None]:
    """Call `then` once `number` runs have written a row."""
    called = []

    def watch(status: Status) -> None:
        if not called and sum(w.step == 4 for w in status.running.values()) == number:
            called.append(then())

    return watch


@pytest.mark.parametrize("numbers", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGTERM] * 2])
def test_a_signal_lets_runs_save_and_the_same_call_goes_on(
    numbers: list[int], fakes: Fakes, corpus: Path, tmp_path: Path
) -> None:
    """What ends a job may well send SIGTERM twice."""
    grid, out = write_grid(tmp_path, corpus), tmp_path / "out"
    fakes.does = {("full", lr, seed): "hang" for lr in RATES for seed in SEEDS}
    stop = after_a_row(2, lambda: [os.kill(os.getpid(), number) for number in numbers])
    with pytest.raises(Interrupted, match=r"stopped and saved, 0 of 4 runs finished") as stopped:
        compare(grid, out, 2, stop)
    assert len(fakes.started) == 2, "nothing is begun after the signal"
    assert stopped.value.code == (130 if numbers[0] == signal.SIGINT else os.EX_TEMPFAIL)
    kept = json.loads((out / "runs.json").read_text())
    assert {run["state"] for run in kept["runs"]} == {"unfinished"}
    assert "| full | unfinished |" in (out / "table.md").read_text()
    fakes.does = {}
    assert compare(grid, out, 2).lines[0].finished == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_while_the_table_is_written_ends_the_call_after_it(
    number: int, fakes: Fakes, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, out = write_grid(tmp_path, corpus), tmp_path / "out"

    def signalled(made: Comparison) -> str:
        os.kill(os.getpid(), number)
        return as_csv(made)

    monkeypatch.setattr(module, "as_csv", signalled)
    with pytest.raises(Interrupted, match=r"stopped and saved, 4 of 4 runs finished; run") as ended:
        compare(grid, out, 2)
    assert ended.value.code == (130 if number == signal.SIGINT else os.EX_TEMPFAIL)
    monkeypatch.setattr(module, "as_csv", as_csv)
    written = {name: (out / name).read_bytes() for name in ("table.csv", "table.md", "runs.json")}
    assert written["table.csv"].decode() == as_csv(compare(grid, out, 2))
    assert all((out / name).read_bytes() == content for name, content in written.items())


def test_a_run_that_others_stopped_has_not_failed(
    fakes: Fakes, corpus: Path, tmp_path: Path
) -> None:
    grid, out = write_grid(tmp_path, corpus), tmp_path / "out"
    fakes.does = {("full", 1e-3, 0): "preempted"}
    with pytest.raises(Interrupted, match=r"stopped and saved, 3 of 4 runs finished") as stopped:
        compare(grid, out, 2)
    assert stopped.value.code == os.EX_TEMPFAIL
    states = [run["state"] for run in json.loads((out / "runs.json").read_text())["runs"]]
    assert sorted(states) == ["finished"] * 3 + ["unfinished"]


def test_runs_are_saved_when_nobody_reads_what_is_shown(
    fakes: Fakes, corpus: Path, tmp_path: Path
) -> None:
    fakes.does = {("full", lr, seed): "hang" for lr in RATES for seed in SEEDS}
    processes: list[subprocess.Popen[bytes]] = []

    def watch(status: Status) -> None:
        if all(w.step == 4 for w in status.running.values()) and status.running:
            processes[:] = [w.process for w in status.running.values()]
            raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        compare(write_grid(tmp_path, corpus), tmp_path / "out", 2, watch)
    assert [p.returncode for p in processes] == [130] * 2


def test_logs_are_without_colours(
    fakes: Fakes, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error is told by how its line begins."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    compare(write_grid(tmp_path, corpus), tmp_path / "out", workers=2)
    for log in (tmp_path / "out" / "logs").iterdir():
        assert log.read_text().splitlines()[1] == "colours None 1"


def test_a_second_ctrl_c_ends_all_at_once(fakes: Fakes, corpus: Path, tmp_path: Path) -> None:
    fakes.does = {("full", lr, seed): "stubborn" for lr in RATES for seed in SEEDS}
    processes: list[subprocess.Popen[bytes]] = []

    def watch(status: Status) -> None:
        if all(w.step == 4 for w in status.running.values()) and status.running:
            processes[:] = [w.process for w in status.running.values()]
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        compare(write_grid(tmp_path, corpus), tmp_path / "out", 2, watch)
    assert [p.returncode for p in processes] == [-signal.SIGKILL] * 2


def test_a_run_that_outlives_its_parent_keeps_the_directory(
    fakes: Fakes, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume of a run that is still being written would ruin it."""
    grid, out = write_grid(tmp_path, corpus, train__seed=[0], optim__lr=[1e-3]), tmp_path / "out"
    fakes.does = {("full", 1e-3, 0): "hang"}
    messages: list[str] = []
    orphan: list[subprocess.Popen[bytes]] = []

    def second(status: Status) -> None:
        if not orphan and [w.step for w in status.running.values()] == [4]:
            orphan.append(status.running[0].process)
            with pytest.raises(CheckpointError) as error:
                compare(grid, out)
            messages.append(str(error.value))
            status.running.clear()  # as if this process had been killed

    with monkeypatch.context() as patch:
        patch.setattr(peptrain.runs.lock, "_release", lambda path, descriptor: os.close(descriptor))
        compare(grid, out, 1, second)
    with pytest.raises(CheckpointError) as error:
        compare(grid, out)
    messages.append(str(error.value))
    orphan[0].kill()
    orphan[0].wait()
    assert all("in use by another compare, or by a run that one left" in m for m in messages)
    fakes.does = {}
    assert compare(grid, out).lines[0].finished == 1
    assert not (out / "lock").exists()


# What is refused.


def test_what_can_not_be_compared_is_named(
    fakes: Fakes, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, out = write_grid(tmp_path, corpus), tmp_path / "out"
    with pytest.raises(ConfigError, match=r"--workers: must be >= 1 \(got 0\)"):
        compare(grid, out, workers=0)
    with pytest.raises(ConfigError, match=r"^\[\[grid\]\] 1: method.rnak: unknown key"):
        compare(write_grid(tmp_path, corpus, {"method.rnak": 2}), out)
    with pytest.raises(DataError, match="nothing: not a prepared corpus"):
        compare(write_grid(tmp_path, tmp_path / "nothing"), out)
    (tmp_path / "empty.toml").touch()
    with pytest.raises(ConfigError, match="grid: empty"):
        compare(tmp_path / "empty.toml", out)
    launched = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    for name, value in (launched | {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE: must be unset.*got 2"):
        compare(grid, out)
    assert not out.exists() and not fakes.started


def test_a_place_that_can_not_be_made_is_named(fakes: Fakes, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"^--out .*/file: can't be created: Not a dir.*; "):
        compare(write_grid(tmp_path, corpus), tmp_path / "file")


@pytest.mark.parametrize(
    "name", ["table.md", "runs.json", "settings/{}.toml", "costs", "logs", "lock"]
)
def test_what_is_in_the_place_of_a_file_is_named_with_the_repair(
    name: str, fakes: Fakes, corpus: Path, tmp_path: Path
) -> None:
    grid = write_grid(tmp_path, corpus, {"train.seed": 0, "optim.lr": 1e-3})
    out = tmp_path / "out"
    path = out / name.format(load_grid(grid).runs[0].name)
    if "{" in name:
        compare(grid, out)
        path = next(out.glob("settings/*"))
        path.unlink()
        shutil.rmtree(next(out.glob("runs/*")))
    path.mkdir(parents=True)
    (path / "x").touch()
    if name in ("costs", "logs"):
        shutil.rmtree(path)
        path.touch()
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(path))}.*; .*run the same command"):
        compare(grid, out)


@pytest.mark.parametrize("part", ["runs", "logs", "settings", "costs", "figures"])
def test_nothing_is_written_through_a_link(
    part: str, fakes: Fakes, corpus: Path, tmp_path: Path
) -> None:
    for folder in ("out", "elsewhere"):
        (tmp_path / folder).mkdir()
    (tmp_path / "out" / part).symlink_to(tmp_path / "elsewhere")
    grid = write_grid(tmp_path, corpus, {"train.seed": 0, "optim.lr": 1e-3})
    with pytest.raises(CheckpointError, match=f"out/{part}: a link, which is never followed; "):
        compare(grid, tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_full_disk_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/table.md'"):
        write_atomically(tmp_path / "table.md", "text")
    assert not list(tmp_path.iterdir())


def test_a_run_whose_settings_were_changed_by_hand_is_refused(
    fakes: Fakes, corpus: Path, tmp_path: Path
) -> None:
    grid, out = write_grid(tmp_path, corpus), tmp_path / "out"
    compare(grid, out)
    run = out / "runs" / fakes.started[0]
    text = (run / "config.toml").read_text()
    (run / "config.toml").write_text(text.replace("lr = 0.001", "lr = 0.0005"))
    with pytest.raises(CheckpointError, match=r"config\.toml differs from the grid's settings"):
        compare(grid, out)


# What a person sees.


def test_lines_tell_what_begins_and_ends(
    fakes: Fakes, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes.does = {("full", 1e-3, 1): "crash"}
    grid, out = write_grid(tmp_path, corpus, optim__lr=1e-3), tmp_path / "out"
    assert main(["compare", str(grid), "--out", str(out), "--workers", "1"]) == 1
    said = capsys.readouterr().out.splitlines()
    one, other = fakes.started
    assert said[0] == f"started   {one}"
    assert said[1].startswith(
        f"finished  {one}  held-out loss 3.0000  (1 done, 1 running, 0 waiting"
    )
    assert re.search(r", left \d+:\d\d\)$", said[1]) and said[2] == f"started   {other}"
    assert said[3].startswith(f"failed    {other}  RuntimeError: out of memory  (1 done,")
    assert main(["compare", str(grid), "--out", str(out), "--workers", "1"]) == 1
    assert capsys.readouterr().out.startswith("finished before: 1\nstarted ")


def test_what_all_runs_are_warned_of_is_said_once(
    fakes: Fakes, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid = write_grid(tmp_path, corpus, schedule__decay=9)
    compare(grid, tmp_path / "out")
    longer = "schedule.decay: 9 is longer than the run of 8 steps"
    assert len(fakes.started) == 4 and caplog.messages.count(longer) == 1


def test_a_table_in_a_pipe_has_a_line_for_each_configuration(
    fakes: Fakes, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    block = {"method.name": "bpt", "method.rank": 2, "method.merge_every": 5}
    grid, out = write_grid(tmp_path, corpus, block), tmp_path / "out"
    grid.write_text(f'equal = "flops"\n{grid.read_text()}')
    assert main(["compare", str(grid), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^ bpt rank=2 merge_every=5 +3\.000 ± 0\.000 .* 2 +512 +\d", said, re.M)


def test_a_terminal_shows_what_is_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: 1120.5)
    monkeypatch.setattr(peptrain.comparison.workers, "time", clock)
    console = Console(force_terminal=True, width=100, record=True)
    job = Job("bpt-seed=0", tmp_path, tmp_path, tmp_path, steps=100)
    working = Working(job, subprocess.Popen(["true"]), 0, 20, step=60, loss=3.21)
    status = Status(deque([replace(job, name="next")]), begun={"next": 0})
    status.running, status.since = {0: working}, 1000.0
    with comparing(console) as show:
        show(status)
        assert "running   bpt-seed=0  60/100  loss 3.210" in console.export_text(clear=False)
    # 0.4 of a run in 120.5 s; 0.4 of one and a whole one are left: 421.75 s, rounded up.
    assert standing(status) == "0 done, 1 running, 1 waiting, left 7:02"
    working.process.wait()


# In earnest.


def test_another_start_in_the_same_place_is_another_run(
    fakes: Fakes, corpus: Path, tmp_path: Path
) -> None:
    start, one = tmp_path / "start", {"train__seed": 0, "optim__lr": 1e-3}
    train(tiny("full", corpus, start, train={"steps": 2}))
    grid, out = write_grid(tmp_path, corpus, init_from=str(start), **one), tmp_path / "out"
    compare(grid, out)
    compare(grid, out)
    assert len(fakes.started) == 1
    shutil.rmtree(start)
    train(tiny("full", corpus, start, train={"steps": 2, "seed": 1}))
    compare(grid, out)
    assert len(set(fakes.started)) == 2


def test_another_text_in_a_models_file_is_another_run(
    fakes: Fakes, corpus: Path, tmp_path: Path
) -> None:
    file = tmp_path / "config.json"
    hf_config(ModelConfig(**MODEL), seq_len=16).to_json_file(file)
    block = {"model.config": str(file), "train.seed": 0, "optim.lr": 1e-3}
    grid, out = write_grid(tmp_path, corpus, block), tmp_path / "out"
    compare(grid, out)
    file.write_text(file.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    compare(grid, out)
    assert len(set(fakes.started)) == 2


def planned(grid: Path, corpus: Path) -> list[GridRun]:
    fingerprint = Corpus.open(corpus).fingerprint
    return [replace(run, data=fingerprint) for run in load_grid(grid).runs]


def test_finished_runs_are_read_killed_ones_resumed_and_missing_ones_trained(
    corpus: Path, tmp_path: Path, importable: None
) -> None:
    grid, out = write_grid(
        tmp_path, corpus, {"method.name": "bpt", "method.rank": 2},
        train__checkpoint_every=2, train__seed=[0, 1, 2], optim__lr=1e-3,
    ), tmp_path / "out"  # fmt: skip
    runs = planned(grid, corpus)
    whole: list[Result] = []
    for run in runs:
        whole.append(train(replace(run.config, run=tmp_path / run.name)))
    train(replace(runs[0].config, run=out / "runs" / runs[0].name))
    before = (out / "runs" / runs[0].name / "metrics.jsonl").read_bytes()
    with pytest.raises(Killed):
        train(replace(runs[1].config, run=out / "runs" / runs[1].name), kill_at("step", 5))
    statuses: list[Status] = []
    (line,) = compare(grid, out, 2, statuses.append).lines
    assert statuses[-1].begun == {runs[1].name: 5, runs[2].name: 0} and not statuses[-1].failed
    assert (out / "runs" / runs[0].name / "metrics.jsonl").read_bytes() == before
    for run, alone in zip(runs, whole, strict=True):
        (end,) = rows(out / "runs" / run.name, "end")
        assert end["held_out_loss"] == alone.held_out.loss
        assert end["state_bytes"] == alone.state_bytes and end["trainable"] == alone.trainable
        assert newest(out / "runs" / run.name).step == 8
    assert line.loss == pytest.approx(sum(r.held_out.loss for r in whole) / 3, rel=1e-12)
    assert (line.seeds, line.state_bytes) == (3, whole[0].state_bytes)
    said = (out / "logs" / f"{runs[1].name}.log").read_text()
    assert "from step 4" in said, "resumed, and not trained anew"


@pytest.mark.slow
def test_three_methods_and_two_seeds_through_the_command_with_a_ctrl_c_between(
    corpus: Path, tmp_path: Path, importable: None
) -> None:
    blocks = ({"method.name": ["bpt", "loro"], "method.rank": 2}, {"optim.lr": [1e-3, 1e30]})
    grid, out = write_grid(tmp_path, corpus, *blocks, optim__lr=1e-3), tmp_path / "out"
    call = [sys.executable, "-m", "peptrain", "compare", str(grid), "--out", str(out)]
    first = subprocess.Popen([*call, "--workers", "2"], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    while not (line := first.stdout.readline()).startswith("finished"):
        assert line
    first.send_signal(signal.SIGINT)
    assert "run the same command to continue" in first.communicate(timeout=900)[0]
    assert first.returncode == 130
    second = subprocess.run([*call, "--workers", "2"], capture_output=True, text=True, timeout=900)
    assert second.returncode == 0 and second.stdout.count("diverged: full-") == 2
    runs = {run.name: run for run in planned(grid, corpus)}
    for path in (out / "runs").iterdir():
        run = runs.pop(path.name)
        assert len(rows(path, "end")) == (run.lr < 1)
    assert not runs
    kept = json.loads((out / "runs.json").read_text())
    lines = {line["method"]: line for line in kept["configurations"]}
    assert [lines[m]["finished"] for m in ("full", "bpt", "loro")] == [2, 2, 2]
    assert lines["full"]["place"] == "lowest", "the rate that diverged was tried"
    third = subprocess.run([*call, "--workers", "2"], capture_output=True, text=True, timeout=900)
    assert third.stdout.startswith("finished before: 8\n") and "begun" not in third.stdout


def test_the_end_of_a_run_says_how_much_it_holds_also_after_a_resume(
    corpus: Path, tmp_path: Path
) -> None:
    """The warm start holds the most, and it was another process that saw it."""
    from peptrain.training.loop import resume

    grid = write_grid(
        tmp_path, corpus, {"method.name": "relora", "method.rank": 2, "method.warm_start_steps": 4},
        train__seed=0, optim__lr=1e-3, train__checkpoint_every=2,
    )  # fmt: skip
    (run,) = load_grid(grid).runs
    whole = train(replace(run.config, run=tmp_path / "whole"))
    with pytest.raises(Killed):
        train(replace(run.config, run=tmp_path / "killed"), kill_at("step", 7))
    assert resume(tmp_path / "killed").state_bytes == whole.state_bytes
    trainable = rows(tmp_path / "whole", "phase")[0]["trainable"]
    (end,) = rows(tmp_path / "killed", "end")
    assert end["state_bytes"] == whole.state_bytes > 2 * 8 * trainable
    assert end["trainable"] == trainable < end["parameters"]


def test_the_settings_of_a_run_are_kept_beside_it(
    fakes: Fakes, corpus: Path, tmp_path: Path
) -> None:
    grid, out = write_grid(tmp_path, corpus), tmp_path / "out"
    compare(grid, out)
    for run in planned(grid, corpus):
        text = toml.read(out / "settings" / f"{run.name}.toml")
        assert text["optim"]["lr"] == run.lr and text["train"]["seed"] == run.seed


def test_a_comparison_draws_beside_its_table_and_again_when_it_is_resumed(
    fakes: Fakes,
    corpus: Path,
    tmp_path: Path,
    drawn: None,
) -> None:
    fakes.does = {("full", 1e-3, 0): 3.5, ("full", 2e-3, 1): "killed"}
    out = tmp_path / "out"
    compare(write_grid(tmp_path, corpus), out, workers=4)
    figures = out / "figures"
    names = {path.name for path in figures.iterdir()}
    assert names == {f"{n}.{s}" for n in ("rates", "frontier", "loss") for s in ("svg", "csv")}
    before = (figures / "rates.csv").read_text()
    fakes.does = {}
    compare(write_grid(tmp_path, corpus), out, workers=4)
    after = (figures / "rates.csv").read_text()
    assert "3.5" in before and before != after and after.count("one seed") == 4


def test_a_comparison_of_settings_is_drawn_over_them(
    fakes: Fakes, corpus: Path, tmp_path: Path, drawn: None
) -> None:
    varied = {"method.name": "bpt", "method.rank": [1, 2], "train.seed": 0, "optim.lr": 1e-3}
    compare(write_grid(tmp_path, corpus, varied), tmp_path / "out", workers=2)
    with (tmp_path / "out/figures/grid.csv").open() as file:
        found = [(row["line"], float(row["x"])) for row in csv.DictReader(file)]
    assert found == [("bpt", 1), ("bpt", 2)]


def test_without_matplotlib_it_says_so_in_one_line_and_goes_on(
    fakes: Fakes, corpus: Path, tmp_path: Path, drawn: None,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level(logging.WARNING, "peptrain"):
        made = compare(write_grid(tmp_path, corpus), tmp_path / "out", workers=4)
    assert made.lines[0].loss == 3.0 and (tmp_path / "out" / "table.md").is_file()
    (line,) = [m for m in caplog.messages if "figures" in m]
    assert line.endswith("install it with: pip install 'peptrain[report]'")
    assert not (tmp_path / "out" / "figures").exists()


def test_a_comparison_is_not_written_into_a_run(fakes: Fakes, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").touch()
    with pytest.raises(CheckpointError, match=r"--out .*run: is a run; choose another directory"):
        compare(write_grid(tmp_path, corpus), tmp_path / "run")
    assert not fakes.started
