"""`peptrain watch`: it says how a run stands, whatever became of it, and only reads."""

import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support import Killed, kill_at, tiny

import peptrain.cli.watching as watching
import peptrain.runs.lock as locks
from peptrain.cli.app import main
from peptrain.display.terminal import Console
from peptrain.errors import CheckpointError, Diverged, Interrupted, PeptrainError
from peptrain.runs.directory import LOCK, RunDir
from peptrain.runs.tail import Tail
from peptrain.training.loop import resume, train

EVERY = {"eval_every": 2, "checkpoint_every": 2}
HERE = locks._me()
ALIVE = f"gpu7 {os.getpid()} 2026-01-01T00:00:00Z {HERE.machine} abcd\n"
BUSY = f"running, process {os.getpid()} on gpu7 since 2026-01-01T00:00:00Z"


@pytest.fixture(scope="module")
def stopped(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after step 5."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Killed):
        train(tiny("bpt", corpus, run, train=EVERY), kill_at("step", 5))
    return run


@pytest.fixture
def run(stopped: Path) -> Iterator[Path]:
    """The same, put back afterwards."""
    rows = RunDir(stopped).metrics_file.read_bytes()
    yield stopped
    (stopped / LOCK).unlink(missing_ok=True)
    RunDir(stopped).metrics_file.write_bytes(rows)


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[[Path], tuple[int, list[str], str]]:
    def call(run: Path) -> tuple[int, list[str], str]:
        capsys.readouterr()
        code = main(["watch", str(run)])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return call


def ended(run: Path, event: str, **values: Any) -> None:
    RunDir(run).record({"event": event, "step": 8, **values})


def files(run: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in run.rglob("*")}


def test_a_run_in_progress_is_shown_once_in_a_pipe_and_left_alone(run: Path, said: Any) -> None:
    (run / LOCK).write_text(ALIVE)
    before = files(run)
    code, lines, err = said(run)
    assert (code, err) == (0, "") and files(run) == before
    assert lines[0] == f"{run}: {BUSY}"
    assert lines[1] == (
        "bpt  tiny (hidden size 16, layers 2, intermediate size 24, heads 2)  512 tokens"
        "  64 a step  fp64"
    )
    assert re.fullmatch(r"step 5 of 8  left \d+:\d\d", lines[2])
    rows = list(RunDir(run).metrics())
    step = next(row for row in reversed(rows) if row["event"] == "step")
    held = next(row for row in reversed(rows) if row["event"] == "eval")
    assert lines[3] == (
        f"loss {step['loss']:.3f}  held-out loss {held['held_out_loss']:.3f}  held-out perplexity"
        f" {held['perplexity']:,.2f}  lr {step['lr']:.1e}  grad norm {step['grad_norm']:.2f}"
        f"  {step['tokens_per_second']:,.0f} tokens/s"
    )
    assert lines[4] == "1 merge  evaluated at step 4  saved at step 4"
    assert lines[6] == "loss, steps 1 to 5" and len(lines) == 15


def test_it_waits_for_the_first_row(run: Path, said: Any) -> None:
    (run / LOCK).write_text(ALIVE)
    RunDir(run).metrics_file.unlink()
    code, lines, err = said(run)
    assert (code, err) == (0, "")
    assert lines[0].startswith(f"{run}: waiting for its first row, process")
    assert lines[2:] == ["step 0 of 8"]


def test_a_finished_run_is_said_with_0(run: Path, said: Any) -> None:
    sizes = {"trainable": 1, "state_bytes": 1, "tokens_per_second": 10.0}
    ended(run, "end", held_out_loss=2.0, perplexity=7.39, held_out_tokens=9, **sizes)
    code, lines, err = said(run)
    assert (code, err, lines[0]) == (0, "", f"{run}: finished")
    assert "held-out loss 2.000  held-out perplexity 7.39" in lines[3]
    assert lines[4] == "1 merge  evaluated at step 8  saved at step 4"


def test_what_ended_otherwise_is_one_line_of_error_and_1(run: Path, said: Any) -> None:
    code, lines, err = said(run)
    assert (code, lines[0]) == (1, f"{run}: not running")
    how = f"resume it with `peptrain resume {run}`"
    assert err == f"error: {run}: not running, at step 5 of 8; {how}\n"
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (run / LOCK).write_text(ALIVE.replace(str(os.getpid()), str(gone.pid)))
    code, lines, err = said(run)
    assert (code, lines[0]) == (1, f"{run}: crashed")
    holder = f"process {gone.pid} on gpu7 since 2026-01-01T00:00:00Z"
    assert err == f"error: {run}: crashed at step 5 of 8: {holder} is gone; {how}\n"
    ended(run, "diverged", error="step 6: the loss is nan")
    code, lines, err = said(run)
    assert (code, lines[0]) == (1, f"{run}: diverged")
    assert err == f"error: {run}: diverged: step 6: the loss is nan\n"
    code, lines, err = said(run / "none")
    assert (code, lines) == (1, [])
    assert err == f"error: {run / 'none'}: not a run directory (there is no such directory)\n"


@pytest.mark.parametrize("beats", [True, False])
def test_a_process_of_another_machine_is_known_by_its_beats(
    beats: bool, run: Path, said: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock of our own. A beat comes a second after the first look, or never."""
    lock, now = run / LOCK, [0.0]
    lock.write_text("gpu9 12 2026-01-01T00:00:00Z boot9/pid:[9] abcd\n")
    os.utime(lock, (1e9, 1e9))

    def sleep(seconds: float) -> None:
        now[0] += seconds
        if beats and now[0] == seconds:
            os.utime(lock)

    ours = SimpleNamespace(sleep=sleep, monotonic=lambda: now[0], time=time.time)
    monkeypatch.setattr(watching, "time", ours)
    monkeypatch.setattr(locks, "time", ours)
    code, lines, _ = said(run)
    assert (code, lines[0].split(",")[0]) == (
        (0, f"{run}: running") if beats else (1, f"{run}: crashed")
    )
    assert now[0] == (1 if beats else 2 * locks.BEAT)


def test_a_pipe_in_the_place_of_a_lock_is_no_process(run: Path, said: Any) -> None:
    os.mkfifo(run / LOCK)
    assert said(run)[1][0] == f"{run}: not running"


def on_a_terminal(
    run: Path, monkeypatch: pytest.MonkeyPatch, then: Mapping[int, Callable[[], object]],
    width: int = 80, height: int = 24, encoding: str = "utf-8",
) -> str:  # fmt: skip
    """What a terminal gets while after look n `then[n]` happens."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    console = Console(file=file, force_terminal=True, width=width, height=height, color_system=None)
    monkeypatch.setattr(watching, "console", console)
    looks = iter(range(100))

    def sleep(seconds: float) -> None:
        then.get(next(looks), lambda: None)()

    monkeypatch.setattr(watching.time, "sleep", sleep)
    try:
        watching.watch(run)
    finally:
        text = raw.getvalue().decode(encoding)
    return text


def frames(text: str) -> list[list[str]]:
    """The lines of each frame that was drawn."""
    plain = re.sub(r"\x1b\[[?\d;]*[a-zA-Z]|\r", lambda m: "\f" if m[0] == "\x1b[2K" else "", text)
    return [part.splitlines() for part in re.split("\f+", plain) if part.strip()]


def test_a_terminal_follows_a_run_to_its_end(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / LOCK).write_text(ALIVE)
    step = {"event": "step", "step": 6, "loss": 1.0, "lr": 1e-3, "tokens_per_second": 5.0}
    sizes = {"trainable": 1, "state_bytes": 1, "tokens_per_second": 10.0}
    happens = {
        0: lambda: RunDir(run).record({**step, "time": time.time(), "peak_bytes": 3 << 30}),
        1: lambda: ended(run, "end", held_out_loss=2.0, held_out_tokens=9, **sizes),
    }
    text = on_a_terminal(run, monkeypatch, happens)
    first, *_, last = frames(text)
    assert str(run) in first[0]
    joined = " ".join(" ".join(last).split())
    assert f"{run}: finished" in joined and "step 6 of 8" in joined
    assert "peak memory 3.00 GiB" in joined and "loss, steps 1 to 6" in joined
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor came back"


@pytest.mark.parametrize("width, height", [(80, 24), (120, 40), (60, 14), (30, 10)])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_frame_fits_into_the_terminal(
    width: int, height: int, encoding: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = Path(os.path.relpath(run))
    (run / LOCK).write_text(ALIVE)
    with pytest.raises(Interrupted, match=r"no longer watching .*, which continues") as left:
        on_a_terminal(short, monkeypatch, {1: _interrupt}, width, height, encoding)
    assert left.value.code == 130
    console = Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding), width=width,
                      height=height, color_system=None, force_terminal=True)  # fmt: skip
    watched = watching.Watched(run)
    watched.view.name = "runs/x"
    watched.look()
    with console.capture() as captured:
        console.print(watched.view.frame(console, watched.standing, 90.0))
    lines = captured.get().splitlines()
    assert len(lines) < height or (height < 20 and "loss, steps" not in captured.get())
    assert all(len(line) <= width for line in lines if "intermediate" not in line)
    assert encoding == "utf-8" or captured.get().isascii()
    assert ("loss, steps 1 to 5" in captured.get()) == (height >= 20)


def _interrupt() -> None:
    raise KeyboardInterrupt


def test_a_run_that_vanishes_or_stops_meanwhile_is_said(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run / LOCK).write_text(ALIVE)
    config = run / "config.toml"
    with pytest.raises(CheckpointError, match="the run has vanished"):
        on_a_terminal(run, monkeypatch, {0: lambda: config.rename(run / "gone.toml")})
    (run / "gone.toml").rename(config)
    with pytest.raises(PeptrainError, match="not running, at step 5 of 8; resume it"):
        on_a_terminal(run, monkeypatch, {0: lambda: (run / LOCK).unlink()})


def test_a_real_training_is_followed_and_its_resume_counts_its_rows_once(
    corpus: Path, tmp_path: Path
) -> None:
    run, seen = tmp_path / "run", []

    def observe(row: Mapping[str, Any]) -> None:
        if row["event"] == "step":
            watched = watching.Watched(run)
            assert watched.look() and watched.view.step == row["step"]
            seen.append(watched.standing.split(",")[0])

    with pytest.raises(Killed):
        train(tiny("bpt", corpus, run, train=EVERY), _both(observe, kill_at("step", 7)))
    whole = watching.Watched(run)
    whole.look()
    tail, steps = Tail(RunDir(run)), []

    def follow(row: Mapping[str, Any]) -> None:
        again, rows = tail.rows()
        if again:
            steps.clear()
        steps.extend(r["step"] for r in rows if r["event"] == "step")

    follow({})
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    resume(run, follow)
    whole.look()
    assert steps == [*range(1, 9)] and whole.standing == "finished" and whole.view.step == 8
    assert seen == ["running"] * 7


def _both(*observers: Callable[[Any], None]) -> Callable[[Any], None]:
    def observe(row: Any) -> None:
        for one in observers:
            one(row)

    return observe


def test_the_tail_reads_only_what_is_new_and_whole(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    tail = Tail(run)
    assert tail.rows() == (False, [])
    run.record({"event": "step", "step": 1, "loss": 1.0})
    again, rows = tail.rows()
    assert again and [row["step"] for row in rows] == [1]
    with run.metrics_file.open("ab") as file:
        file.write(b'damaged\n{"event": "step", "st')
    assert tail.rows() == (False, [])
    size = run.metrics_file.stat().st_size
    with run.metrics_file.open("r+b") as file:  # what was read is not read again
        file.write(b"#" * 20)
    with run.metrics_file.open("ab") as file:
        file.write(b'ep": 2, "loss": 0.5}\n')
    assert size < run.metrics_file.stat().st_size
    assert tail.rows() == (False, [{"event": "step", "step": 2, "loss": 0.5}])
    run.metrics_file.unlink()
    assert tail.rows() == (True, []) and tail.rows() == (False, [])


def test_the_time_left_is_that_of_the_process_and_not_of_the_night_before(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = watching.Watched(run).view
    row = {"event": "step", "loss": 1.0, "tokens_per_second": 64.0}
    view.add([{**row, "step": 1, "time": 0.0}, {**row, "step": 2, "time": 1.0}])
    monkeypatch.setattr("peptrain.display.watching.time.time", lambda: 1001.0)
    view.add([{**row, "step": 3, "time": 1000.0}])
    assert view.seconds_left(since=999.0) == 4.0, "one row: by its tokens/s, one step a second"
    view.add([{**row, "step": 4, "time": 1001.0}])
    view.add([{**row, "step": 5, "time": 1006.0}])
    monkeypatch.setattr("peptrain.display.watching.time.time", lambda: 1006.0)
    assert view.seconds_left(since=999.0) == 9.0, "3 steps at 3 s"
    view.add([{**row, "step": 8, "time": 1012.0}])
    assert view.seconds_left(since=999.0) is None


def test_a_diverged_run_of_the_trainer_is_one(corpus: Path, tmp_path: Path, said: Any) -> None:
    with pytest.raises(Diverged):
        train(tiny("full", corpus, tmp_path / "run", optim={"lr": 1e30, "clip": 0}))
    code, _, err = said(tmp_path / "run")
    assert code == 1 and ": diverged: step " in err
