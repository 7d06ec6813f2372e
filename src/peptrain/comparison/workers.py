"""Run several trainings at a time, each in its own process, so that one failure is isolated."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

from peptrain.files import no_links
from peptrain.runs.directory import LOCK, RunDir
from peptrain.runs.lock import lock
from peptrain.training.signals import BY_SYSTEM, BY_USER, stop_on_signals

POLL = 0.2
"""Seconds between two polls of the processes."""


@dataclass(frozen=True)
class Job:
    """One training to start or resume."""

    name: str
    run: Path
    settings: Path
    """Configuration file to start it with."""
    log: Path
    """Output of the process, appended by each attempt."""
    steps: int
    debug: bool = False
    """Whether the log has the traceback of an error."""

    def command(self) -> list[str]:
        """The command line: `resume` if the run directory exists, else `train`.

        Paths are absolute, since one may begin with a dash, or with a tilde.
        """
        run, settings = str(self.run.absolute()), str(self.settings.absolute())
        peptrain = [sys.executable, "-m", "peptrain", *["--debug"] * self.debug]
        if RunDir(self.run).config_file.is_file():
            return [*peptrain, "resume", run]
        return [*peptrain, "train", "--config", settings, "--run", run]

    def result(self) -> str | None:
        """The result in words; None while it is not finished."""
        row = RunDir(self.run).newest("end")
        return f"held-out loss {row['held_out_loss']:.4f}" if row else None

    def progress(self) -> tuple[int, float | None]:
        """(steps done, last loss), as of the last metrics row."""
        row = RunDir(self.run).newest("step")
        return (row["step"], row["loss"]) if row else (0, None)


@dataclass
class Working:
    """A job whose process is running."""

    job: Job
    process: subprocess.Popen[bytes]
    said: int
    """Size of the log in bytes before this attempt."""
    begun: int
    """Steps done before this attempt."""
    step: int = 0
    loss: float | None = None

    def look(self) -> None:
        """Read the progress of the run."""
        self.step, self.loss = self.job.progress()

    @property
    def trained(self) -> float:
        """Fraction of the full run that this attempt has trained."""
        return max(0, self.step - self.begun) / self.job.steps  # a resume may drop rows


@dataclass
class Status:
    """State of all jobs of a call."""

    waiting: deque[Job]
    before: int = 0
    """Number of runs finished before the call."""
    begun: dict[str, int] = field(default_factory=dict)
    """Steps of each job done before the call."""
    running: dict[int, Working] = field(default_factory=dict)
    """By slot."""
    finished: dict[str, str] = field(default_factory=dict)
    """Result of each finished job, by name."""
    failed: dict[str, str] = field(default_factory=dict)
    """Error of each failed job, by name."""
    interrupted: int = 0
    """Exit code of the call once a signal has stopped it."""
    saved: list[str] = field(default_factory=list)
    """Names of jobs that a signal of others stopped. They are saved."""
    since: float = field(default_factory=time.monotonic)
    trained: float = 0.0
    """Runs trained in this call by processes that have ended, in fractions of full runs."""

    def seconds_left(self) -> float | None:
        """Estimate from the pace of this call; None before anything was trained."""
        trained = self.trained + sum(w.trained for w in self.running.values())
        rest = sum(1 - w.step / w.job.steps for w in self.running.values())
        rest += sum(1 - self.begun[job.name] / job.steps for job in self.waiting)
        return (time.monotonic() - self.since) / trained * rest if trained > 0 else None


def alone(directory: Path) -> AbstractContextManager[int]:
    """Return the lock of `directory` against other calls, which yields its file descriptor.

    Worker processes inherit the descriptor, so a worker that outlives its parent keeps the lock.
    Raises CheckpointError if the lock is held.
    """
    return lock(
        directory / LOCK,
        lambda holder: (
            f"--out {directory}: in use by another compare, or by a run that one left"
            f" behind ({holder}); wait for it to end, or stop it"
        ),
    )


def work(
    jobs: Sequence[Job],
    workers: int,
    gpus: Sequence[str],
    lock: int,
    before: int = 0,
    watch: Callable[[Status], None] = lambda status: None,
) -> Status:
    """Run the jobs, at most `workers` at a time, spread over the GPUs. Each inherits the `lock`.

    On Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 every running job saves and stops. A second Ctrl-C kills
    them. The runs can be resumed after both. Without a GPU a process uses one thread, unless
    OMP_NUM_THREADS is set.
    """
    status = Status(deque(jobs), before, {job.name: job.progress()[0] for job in jobs})
    with stop_on_signals() as stop:
        try:
            while status.waiting or status.running:
                if stop.code and not status.interrupted:
                    status.interrupted = stop.code
                    status.waiting.clear()
                    for working in status.running.values():
                        working.process.terminate()
                for slot in [s for s in range(workers) if s not in status.running]:
                    if status.waiting:
                        status.running[slot] = _start(status, slot, gpus, lock)
                watch(status)
                time.sleep(POLL)
                for slot in [s for s, w in status.running.items() if w.process.poll() is not None]:
                    _end(status, status.running.pop(slot))
                for working in status.running.values():
                    working.look()
            status.interrupted = stop.code  # also if it came when the last process had ended
        except KeyboardInterrupt:
            _stop(status, signal.SIGKILL)
            raise
        except BaseException:
            # For example a broken pipe in `watch`. The runs can still save.
            _stop(status, signal.SIGTERM)
            raise
    watch(status)
    return status


def _stop(status: Status, number: signal.Signals) -> None:
    """Send a signal to all processes and wait for them to end."""
    for working in status.running.values():
        working.process.send_signal(number)
    for working in status.running.values():
        working.process.wait()


def _start(status: Status, slot: int, gpus: Sequence[str], lock: int) -> Working:
    job = status.waiting.popleft()
    environment = dict(os.environ, NO_COLOR="1", TERM="dumb")  # _error parses the log
    for forced in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE"):
        environment.pop(forced, None)
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    else:
        environment.setdefault("OMP_NUM_THREADS", "1")
    begun = status.begun[job.name]
    with open(job.log, "ab", opener=no_links) as log:
        said = log.tell()  # before the process writes
        # In its own process group, so that it gets only our signal and not the terminal's Ctrl-C.
        process = subprocess.Popen(
            job.command(),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            process_group=0,
            pass_fds=[lock],
        )
        return Working(job, process, said, begun, begun)


def _end(status: Status, working: Working) -> None:
    job, code = working.job, working.process.returncode
    working.look()
    status.trained += working.trained
    result = job.result()
    if code == 0 and result is not None:
        status.finished[job.name] = result
    elif code == BY_SYSTEM:
        status.saved.append(job.name)
    elif not (status.interrupted and code in (BY_USER, -signal.SIGTERM)):
        status.failed[job.name] = _error(code, job.log, working.said)


def _error(code: int, log: Path, said: int) -> str:
    """Return one line on why a process ended."""
    if code < 0:
        often = "; often because the machine ran out of memory" if code == -signal.SIGKILL else ""
        return f"ended by {signal.Signals(-code).name}{often}"
    with log.open("rb") as file:
        file.seek(said)
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    own = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return own[-1] if own else lines[-1].strip() if lines else f"exit code {code}"


def visible_gpus(environment: Mapping[str, str], count: int) -> list[str]:
    """Return the value of CUDA_VISIBLE_DEVICES for each of `count` GPUs."""
    listed = environment.get("CUDA_VISIBLE_DEVICES", "")
    names = [name.strip() for name in listed.split(",") if name.strip()]
    return names[:count] if names else [str(n) for n in range(count)]
