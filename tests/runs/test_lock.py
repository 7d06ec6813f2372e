"""One process at a time, on file systems with flock and without, and a holder that died."""

import errno
import fcntl
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import tiny

import peptrain.runs.lock as locks
from peptrain.errors import CheckpointError
from peptrain.runs.directory import LOCK
from peptrain.runs.lock import lock
from peptrain.testing import losses
from peptrain.training.loop import resume, train


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "BEAT", 0.02)
    monkeypatch.setattr(locks, "PATIENCE", 0.3)
    monkeypatch.setattr(locks, "SETTLE", 0.05)
    monkeypatch.setattr(locks, "POLL", 0.02)


@pytest.fixture(params=["flock", "no flock", "flock of one machine only"])
def files(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kinds of file systems."""

    def missing(descriptor: int, how: int) -> None:
        raise OSError(37, "No locks available")

    if request.param == "no flock":
        monkeypatch.setattr(fcntl, "flock", missing)
    elif request.param != "flock":
        monkeypatch.setattr(fcntl, "flock", lambda descriptor, how: None)
    return str(request.param)


def busy(holder: str) -> str:
    return f"busy: {holder}"


def elsewhere(monkeypatch: pytest.MonkeyPatch, **changes: str) -> None:
    """From now on this process is another one."""
    me = locks._me
    given = {"host": "gpu7", "machine": "boot7/pid:[7]"} | changes
    monkeypatch.setattr(locks, "_me", lambda: replace(me(), **given))


def test_the_holder_is_named_and_releases(
    files: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lock"
    with lock(path, busy):
        if files == "flock of one machine only":
            elsewhere(monkeypatch)
        with pytest.raises(CheckpointError) as error, lock(path, busy):
            pass
    here = rf"busy: process {os.getpid()} on {os.uname().nodename} since 20\d\d-\d\d-\d\dT"
    assert re.match(here, str(error.value))
    assert not path.exists()
    with lock(path, busy):
        pass


DYING = """
import fcntl, os, sys
from pathlib import Path
if sys.argv[2] == "no flock":
    def missing(*_): raise OSError(37, "No locks available")
    fcntl.flock = missing
from peptrain.runs.lock import lock
with lock(Path(sys.argv[1]), str):
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("kind", ["flock", "no flock"])
def test_a_dead_holder_of_this_machine_is_replaced_at_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, importable: None
) -> None:
    path = tmp_path / "lock"
    subprocess.run([sys.executable, "-c", DYING, str(path), kind])
    assert path.stat().st_size
    monkeypatch.setattr(locks, "_renewed", lambda *_: pytest.fail("waited"))
    with lock(path, busy):
        assert f" {os.getpid()} " in path.read_text()


def test_a_silent_holder_of_another_machine_is_replaced(
    files: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lock"
    path.write_text("gpu9 12 2026-01-01T00:00:00Z boot9/pid:[9] abcd\n")
    with lock(path, busy):
        assert "gpu9" not in path.read_text()
    assert "left by process 12 on gpu9 since 2026-01-01T00:00:00Z; waiting up to" in caplog.text


@pytest.mark.parametrize("beats", [True, False])
def test_a_holder_that_was_stopped_with_the_whole_machine_may_still_beat(
    beats: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine was suspended for an hour within the first of several looks."""
    path, now, looks = tmp_path / "lock", [0.0], []
    path.write_text("gpu9 12 2026-01-01T00:00:00Z boot9/pid:[9] abcd\n")

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        now[0] += seconds if len(looks) > 1 else 3600
        if beats and len(looks) == 2:
            os.utime(path, (1e9, 1e9))

    monkeypatch.setattr(locks, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: now[0]))
    assert locks._renewed(path, locks.PATIENCE) == beats
    assert beats or sum(looks) == pytest.approx(locks.PATIENCE, abs=locks.POLL)


@pytest.mark.parametrize("content", ["", "\0" * 50, "[" * 1000, "a 1 b\n"])
def test_what_names_nobody_is_no_lock(content: str, files: str, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text(content)
    with lock(path, busy):
        pass
    assert not path.exists()


def test_of_many_at_a_time_one_holds_it_and_all_get_it(
    files: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, inside, most = tmp_path / "lock", [], []
    monkeypatch.setattr(locks, "PATIENCE", 60.0)  # none of them is ever dead
    if files == "no flock":
        monkeypatch.setattr(locks, "SETTLE", 60.0)

    def once() -> None:
        with lock(path, busy, wait=600):
            inside.append(1)
            most.append(len(inside))
            inside.pop()

    threads = [threading.Thread(target=once) for _ in range(6)]
    if files == "flock of one machine only":
        threads = threads[:1]  # threads are of one machine
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * len(threads)


def test_a_lock_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with (
        pytest.raises(CheckpointError, match="lock: can't be written"),
        lock(tmp_path / "lock", busy),
    ):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_disk_without_room_for_the_holder_is_no_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", lambda descriptor, content, at: 7)
    told = "lock: can't be written: No space left"
    with pytest.raises(CheckpointError, match=told), lock(tmp_path / "lock", busy):
        pass


def test_a_pipe_in_the_place_of_a_lock_is_no_holder(tmp_path: Path) -> None:
    """To read it would take forever."""
    os.mkfifo(tmp_path / "lock")
    told = "lock: can't be written: not a regular file"
    with pytest.raises(CheckpointError, match=told), lock(tmp_path / "lock", busy):
        pass


# Of a run.


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("locked") / "run"
    train(tiny("full", corpus, path, train={"steps": 2}))
    yield path


def test_a_run_in_training_is_not_resumed(corpus: Path, tmp_path: Path) -> None:
    run, said = tmp_path / "run", []

    def another(row: object) -> None:
        with pytest.raises(CheckpointError) as error:
            resume(run)
        said.append(str(error.value))

    train(tiny("full", corpus, run, train={"steps": 2}), another)
    assert len(losses(run)) == 2 and not (run / LOCK).exists()
    wanted = rf"{run}: in use by process {os.getpid()} on .*; wait .* `peptrain resume {run}`"
    assert all(re.fullmatch(wanted, line) for line in said) and said


def test_a_lock_that_was_left_behind_is_no_hindrance(run: Path) -> None:
    holder = replace(locks._me(), pid=2**22 + 1)
    (run / LOCK).write_text(holder.line)
    resume(run)
    assert not (run / LOCK).exists()


def test_a_run_on_a_read_only_file_system_is_not_resumed_in_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = os.open

    def read_only(path: object, flags: int, *rest: object, **given: object) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return original(path, flags, *rest, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", read_only)
    told = "lock: can't be written: Read-only file system; make its directory writable, or copy"
    with pytest.raises(CheckpointError, match=told):
        resume(run)
