"""Kill runs at random moments, resume them, and compare them with runs that nobody killed.

    python benchmarks/soak.py [--runs 100] [--seed 0] [--only NUMBER ...] [--json FILE]

Every run is killed by SIGKILL one to three times: by the clock, in a save, between a save and its
row of metrics, at a change of phase, while the run is created, while it is resumed, while it is
made longer. In the end every file of every checkpoint must have the same bytes as in the run that
nobody killed, and metrics.jsonl the same rows, apart from the throughput. All methods take turns,
on the CPU, with accumulation, clipping, evaluations and periodic events. The schedule is cosine, or
wsd in runs that are made longer, which are compared with one that had all its steps from the
beginning. The exit status is 1 if any run differs. --only repeats single runs. Their moments depend
on --seed and their number alone, except for what the clock decides. A run that ended before the
clock killed it is repeated with an earlier moment, so that each is killed at least once.

A killed process is a fork of this one, so that it need not import PyTorch again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import announce, table, write

from peptrain.config import RunConfig
from peptrain.files import SUFFIX
from peptrain.methods import METHODS
from peptrain.methods.base import Method
from peptrain.runs.checkpoint import available
from peptrain.runs.directory import RunDir
from peptrain.testing import small, small_corpus, small_run
from peptrain.training.loop import resume, train
from peptrain.training.metrics import MEASURED

STEPS = 18
TRAIN = {"steps": STEPS, "batch_size": 4, "micro_batch": 2, "seq_len": 16, "log_every": 2,
         "eval_every": 5, "eval_tokens": 64, "checkpoint_every": 3, "keep": 2,
         "device": "cpu"}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in METHODS},
    "relora, magnitude": ("relora", {"reset": "magnitude", "reset_step": "keep"}),
    "relora, random": ("relora", {"reset": "random", "warm_start_steps": 7}),
    "bpt, random": ("bpt", {"reset": "random", "reset_fraction": 0.5}),
    "loro, preconditioned": ("loro", {"update": "precond", "refresh": "factors"}),
    "galore, rotated": ("galore", {"moments": "rotate"}),
}
"""Method and settings, by name. ReLoRA's warm start is a phase of its own."""
PRECISIONS = ("fp32", "bf16", "bf16-mixed", "fp64")
MAY_DIFFER = {*MEASURED, "crc32"}
"""Values of a row that measure time, and the checksum over them."""
LONGEST = 120.0
"""Seconds after which a process has hung."""
PLANNED = 12
"""Steps of a run before it is made longer."""
WSD = {"kind": "wsd", "decay": 4, "warmup": 2}
LENGTHENING = r"open .*/\.longer\.json\..*"
SAVED, SAVING = r"os\.rename .*/checkpoints/step-\d+", r"os\.mkdir .*/checkpoints/\.step-.*"
HEADER = ("killed", "runs", "kills", "same weights, moments and state", "same rows")


@dataclass(frozen=True)
class Moment:
    """When a process is killed: `events` accesses to files of the run after the `nth` that matches.

    With `seconds` it is killed by the clock instead: that long after its start, or, if `scratch` is
    set, after the `nth` unfinished checkpoint appeared.
    """

    kind: str
    after: str | None = None
    nth: int = 1
    events: int = 0
    seconds: float | None = None
    scratch: bool = False


def moment(kind: str, draw: random.Random, duration: float, ends: Sequence[int]) -> Moment:
    """Draw a moment of a kind, for a run of `duration` seconds with changes of phase at `ends`."""
    nth = draw.randint(1, STEPS // TRAIN["checkpoint_every"])
    if kind == "by the clock":
        return Moment(kind, seconds=draw.uniform(0, duration))
    if kind == "in a save":
        if draw.random() < 0.5:
            return Moment(kind, seconds=draw.uniform(0, 0.004), nth=nth, scratch=True)
        return Moment(kind, after=SAVING, nth=nth, events=draw.randint(1, 9))
    if kind == "between a save and its row":
        return Moment(kind, after=SAVED, nth=nth, events=draw.randint(1, 3))
    if kind == BOUNDARY:
        end = rf"os\.rename .*/checkpoints/step-0*{draw.choice(ends)}"
        return Moment(kind, after=end, events=draw.randint(1, 16))
    if kind == "while it is created":
        return Moment(kind, events=draw.randint(1, 12))
    if kind == LENGTHENED:
        return Moment(kind, after=LENGTHENING, events=draw.randint(1, 36))
    assert kind == "while it is resumed"
    return Moment(kind, events=draw.randint(1, 24))


def earlier(when: Moment) -> Moment:
    """Return an earlier moment than one that the clock decides, for a run that ended before it."""
    assert when.seconds is not None
    return replace(when, seconds=when.seconds / 2, nth=max(1, when.nth - 1))


BOUNDARY, LENGTHENED = "at a change of phase", "while it is made longer"
KINDS = (BOUNDARY, "by the clock", "in a save", "between a save and its row",
         "while it is created", "while it is resumed", LENGTHENED)  # fmt: skip


def kill_self_at(when: Moment, run: Path) -> None:
    """Watch the accesses of this process to files of `run`, and kill it at the moment."""
    seen, counted = 0, -1

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen, counted
        if not (event == "open" or event.startswith(("os.", "shutil."))):
            return
        paths = [str(a) for a in args[:2] if isinstance(a, str | os.PathLike)]
        if not any(path.startswith(str(run)) for path in paths):
            return
        if counted >= 0 or when.after is None:
            counted = max(counted, 0) + 1
            if counted >= when.events:
                os.kill(os.getpid(), signal.SIGKILL)
        elif re.fullmatch(when.after, f"{event} {paths[-1]}"):
            seen += 1
            counted = 0 if seen == when.nth else counted

    sys.addaudithook(watch)


def process(action: Callable[[], object], when: Moment | None, run: Path) -> str:
    """Run `action` in a fork of this process. Return "killed", "finished" or what it printed."""
    log = run.with_suffix(".log")
    child = os.fork()
    if child == 0:
        with log.open("w", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            try:
                # Repairs PyTorch's pool in one thread: several that find it broken by the fork, as
                # in the first backward pass on fake tensors, abort the process.
                torch.set_num_threads(1)
                if when is not None and when.seconds is None:
                    kill_self_at(when, run)
                action()
            except BaseException:
                traceback.print_exc(file=file)
                file.flush()
                os._exit(1)
        os._exit(0)
    status = wait(child, when, run)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return "killed"
    return "finished" if status == 0 else log.read_text(encoding="utf-8", errors="replace")


def wait(child: int, when: Moment | None, run: Path) -> int:
    """Wait for the process, kill it at a moment that the clock decides, and return its status."""
    began = time.perf_counter()
    strike = LONGEST
    if when is not None and when.seconds is not None and not when.scratch:
        strike = when.seconds
    seen: set[str] = set()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status
        if (
            when is not None
            and when.scratch
            and len(seen) < when.nth
            and (run / "config.toml").exists()
        ):
            seen |= {p.name for p in (run / "checkpoints").glob(f".step-*{SUFFIX}")}
            if len(seen) == when.nth:
                assert when.seconds is not None
                strike = time.perf_counter() - began + when.seconds
        if time.perf_counter() - began >= strike:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
            if strike == LONGEST:
                raise TimeoutError(f"{run}: no end after {LONGEST:g} s")
            return status
        time.sleep(0.0005)


@dataclass(frozen=True)
class Case:
    """One run: what it trains, and the kinds of moments at which it is killed."""

    number: int
    variant: str
    precision: str
    kinds: tuple[str, ...]

    @property
    def longer(self) -> bool:
        """Whether the run is made longer."""
        return LENGTHENED in self.kinds

    @property
    def reference(self) -> str:
        return f"{self.variant}, {self.precision}" + ", wsd" * self.longer

    @property
    def method(self) -> Method:
        name, settings = VARIANTS[self.variant]
        return small(METHODS[name], **settings)

    def config(self, corpus: Path, run: Path, steps: int = STEPS) -> RunConfig[Any]:
        return small_run(
            self.method,
            corpus,
            run,
            optim={"clip": 0.5, "weight_decay": 0.01},
            schedule=WSD if self.longer else {"kind": "cosine", "warmup": 2},
            train=TRAIN | {"precision": self.precision, "steps": steps},
        )

    def ends(self) -> tuple[int, ...]:
        """Return the steps at which the phase changes."""
        return self.method.phases(STEPS)


def cases(runs: int, seed: int) -> list[Case]:
    """Draw the runs. Variants and kinds take turns; half the runs with phases begin with those."""
    names, kinds, made = list(VARIANTS), [kind for kind in KINDS if kind != BOUNDARY], []
    for number in range(runs):
        draw = random.Random(f"{seed}/{number}")
        case = Case(number, names[number % len(names)], draw.choice(PRECISIONS), ())
        own = [kinds[(number + number // len(names)) % len(kinds)]]
        if own == ["while it is resumed"]:
            own = ["by the clock", *own]
        if case.ends() and draw.random() < 0.5:
            own = [BOUNDARY]
        anywhere = [k for k in kinds if k not in ("while it is created", LENGTHENED)]
        own += draw.choices(anywhere, k=draw.randint(0, 2))
        made.append(replace(case, kinds=tuple(own[:3])))
    return made


def reference(case: Case, folder: Path) -> float:
    """Train the run of a case without a kill. Return its seconds."""
    run, began = folder / "whole" / case.reference, time.perf_counter()
    ended = process(lambda: train(case.config(folder / "corpus", run)), None, run)
    assert ended == "finished", ended
    return time.perf_counter() - began


def begin(case: Case, corpus: Path, run: Path, steps: int = STEPS) -> object:
    """Train the run of a case, resume it, or make it longer."""
    if not (run / "config.toml").exists():
        return train(case.config(corpus, run, steps))
    return resume(run, steps=steps if case.longer else None)


def soak(case: Case, folder: Path, duration: float, seed: int) -> dict[str, Any]:
    """Kill, resume and compare one run."""
    run, draw = folder / "runs" / str(case.number), random.Random(f"{seed}/{case.number}/moments")
    found: dict[str, Any] = {"number": case.number, "variant": case.variant,
                             "precision": case.precision, "killed": []}  # fmt: skip
    for kind in (*case.kinds, None):
        when = moment(kind, draw, duration, case.ends()) if kind else None
        start = partial(begin, case, folder / "corpus", run)
        if kind == LENGTHENED:
            planned = process(partial(start, steps=PLANNED), None, run)
            assert planned == "finished", planned
        ended = process(start, when, run)
        while ended == "finished" and when and when.seconds is not None and not found["killed"]:
            shutil.rmtree(run)
            when = earlier(when)
            ended = process(start, when, run)
        if ended == "killed":
            found["killed"].append(kind)
        elif ended != "finished":
            return found | {"files": [ended], "rows": []}
    whole = folder / "whole" / case.reference
    found |= {"files": different_files(run, whole), "rows": different_rows(run, whole)}
    if not found["files"] and not found["rows"]:
        shutil.rmtree(run)
    return found


def different_files(run: Path, whole: Path) -> list[str]:
    """List the files of checkpoints that do not have the same bytes, and unfinished files."""

    def contents(of: Path) -> dict[str, bytes]:
        directories = available(RunDir(of).checkpoints)
        files = (file for directory in directories for file in directory.iterdir())
        return {str(file.relative_to(of)): file.read_bytes() for file in files}

    one, other = contents(run), contents(whole)
    strays = [str(path) for path in run.rglob(f".*{SUFFIX}")]
    return [n for n in sorted(one.keys() | other.keys()) if one.get(n) != other.get(n)] + strays


def different_rows(run: Path, whole: Path) -> list[Any]:
    """List pairs of rows that differ in more than a measured time."""

    def rows(of: Path) -> list[dict[str, Any]]:
        text = RunDir(of).metrics_file.read_text(encoding="utf-8")
        made = (json.loads(line) for line in text.splitlines())
        return [{k: v for k, v in row.items() if k not in MAY_DIFFER} for row in made]

    one, other = rows(run), rows(whole)
    if len(one) != len(other):
        places = [{f"{row['event']} {row['step']}" for row in rows} for rows in (one, other)]
        return [[len(one), len(other), *sorted(places[0] ^ places[1])]]
    return [[a, b] for a, b in zip(one, other, strict=True) if a != b]


def summary(found: Sequence[dict[str, Any]]) -> list[list[object]]:
    """Return a line of the table for each kind of moment, and one for all runs."""
    lines: list[list[object]] = []
    for kind in (*KINDS, "all"):
        of = [f for f in found if kind in (*f["killed"], "all")]
        kills = sum(len(f["killed"]) if kind == "all" else f["killed"].count(kind) for f in of)
        same = [sum(not f[what] for f in of) for what in ("files", "rows")]
        lines.append([kind, len(of), kills, *(f"{n} of {len(of)}" for n in same)])
    return lines


def main(argv: list[str] | None = None) -> None:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--runs", type=int, default=100)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--only", type=int, nargs="*", metavar="NUMBER")
    made.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    made.add_argument("--keep", type=Path, help="directory for the runs, which stays")
    made.add_argument("--json", type=Path, help="write all measurements to this file")
    args = made.parse_args(argv)
    torch.set_num_threads(1)  # before any fork: threads do not survive it
    wanted = [c for c in cases(args.runs, args.seed) if args.only is None or c.number in args.only]
    announce(torch.device("cpu"), {"runs": len(wanted), "steps": STEPS, "seed": args.seed})
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        for name in ("whole", "runs"):
            (folder / name).mkdir(parents=True)
        small_corpus(folder)
        found = all_soaked(wanted, folder, args.workers, args.seed)
    write(args, torch.device("cpu"), found)
    table(HEADER, summary(found))
    failed = [f for f in found if f["files"] or f["rows"]]
    for one in failed:
        print(json.dumps(one, indent=1))
    if failed:
        sys.exit(1)


def all_soaked(
    wanted: Sequence[Case], folder: Path, workers: int, seed: int
) -> list[dict[str, Any]]:
    """Train the references, then soak every case, in `workers` processes."""
    pool = multiprocessing.get_context("fork").Pool(workers)
    with pool:
        known = {case.reference: case for case in wanted}
        took = pool.starmap(reference, [(case, folder) for case in known.values()], chunksize=1)
        durations = dict(zip(known, took, strict=True))
        jobs = [(case, folder, durations[case.reference], seed) for case in wanted]
        return pool.starmap(soak, jobs, chunksize=1)


if __name__ == "__main__":
    main()
