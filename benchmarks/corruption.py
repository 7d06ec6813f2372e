"""Damage every file of runs, corpora, comparisons and exports, one at a time, and run each command.

    python benchmarks/corruption.py [--only 'run/config.toml' 'corpus/*'] [--flips 8]
                                    [--workers 1] [--out FILE] [--table]

Each case is a fresh copy with one damaged file, in which one command runs in this process. Its
outcome is one of

    harmless     the result is that of the undamaged copy: the bytes of weights, moments and
                 exports without their cards, the rows of metrics except for times, the printed
                 values
    refused      exit status 1 and one line that names the file or the setting
    reported     another result, after a message that names the file or the setting
    as written   another result, because a configuration given to `train` has other, valid settings.
                 They are in the config.toml of the new run
    silent, unclear, traceback, hang
                 what must not happen: another result without a message, an error that names
                 neither file nor setting, an exception, no end within a minute

Everything is tiny and runs on the CPU. The exit status is 1 if anything happened that must not.

--out gets a line as soon as a command has read every damage of a file. Repeated with the same file,
after it was interrupted or with other --only, the sweep continues with what is not in it. The table
is of the whole file, and --table prints it without running anything.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import torch
from commands import COMMANDS, Command, Copy, files_in
from subjects import Subjects, checked, damages, put

from peptrain.config import load

BAD = ("silent", "unclear", "traceback", "hang")
CLASSES = ("harmless", "refused", "reported", "as written", *BAD)
SECONDS = 60
"""After which a command hangs."""
SETTING = re.compile(r"--[\w.-]+|\w+(\.\w+)+|init_from|data\b|\w+: unknown key")
"""How a message that names a setting begins."""


class Hang(BaseException):
    """No end within the time limit."""


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang


@dataclass
class Ran:
    """What a command did in a copy."""

    status: int | None = None
    out: str = ""
    err: str = ""
    result: Any = None
    raised: str = ""
    """"hang", or the traceback of an exception."""


def ran(command: Command, copy: Copy) -> Ran:
    """Run the command; return what it printed and left."""
    out, err, one = io.StringIO(), io.StringIO(), Ran()
    words = command.words(copy)
    before = signal.signal(signal.SIGALRM, _hang)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            one.status = command.call(words)
    except Hang:
        one.raised = "hang"
    except SystemExit as left:
        one.status = left.code if isinstance(left.code, int) else 1
    except Exception:  # the border: whatever a command raises is what is looked for
        one.raised = traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    one.out, one.err = out.getvalue(), err.getvalue()
    if one.status == 0:
        one.result = command.result(copy, one.out)
    return one


def classify(command: Command, one: Ran, whole: Ran, file: Path, copy: Copy) -> str:
    """Return the class of what happened, given what happens in an undamaged copy."""
    if one.raised or "Traceback" in one.err or "--debug" in one.err:
        return "hang" if one.raised == "hang" else "traceback"
    if one.status != 0:
        lines = one.err.strip().splitlines() or [""]  # transformers' progress bars before it
        told = sum(line.startswith("error: ") for line in lines) == 1
        line = lines[-1].removeprefix("error: ")
        return "refused" if told and names(line, file) else "unclear"
    if one.result == whole.result:
        return "harmless"
    said, usual = (f"{it.out}\n{it.err}" for it in (one, whole))
    if any(names(line.strip(), file) for line in news(said, usual)):
        return "reported"
    return "as written" if "--config" in command.name and replayed(copy, file) else "silent"


def names(line: str, file: Path) -> bool:
    """Return whether a message names the file, its checkpoint or a setting."""
    return file.name in line or file.parent.name in line or SETTING.match(line) is not None


def news(out: str, usual: str) -> Iterator[str]:
    """Yield the paragraphs of `out` that are warnings, with the wrapped lines joined."""
    known = set(usual.splitlines())
    lines = [line for line in out.splitlines() if line not in known]
    text = "\n".join(lines)
    for part in re.split(r"\n(?=\S)", text):
        if part.startswith(("WARNING", "INFO")):
            yield re.sub(r"^(WARNING|INFO) +|\n +", "", part)


def replayed(copy: Copy, file: Path) -> bool:
    """Return whether `train` made a run with the settings of a damaged configuration."""
    given, made = load(file), load(copy.made / "config.toml")
    return replace(given, run=None) == replace(made, run=None)


@dataclass(frozen=True)
class Sweep:
    """What is damaged, and how. Each process copies subjects into a folder of its own."""

    subjects: Subjects
    folder: Path
    flips: int
    seed: int

    def jobs(self, only: list[str]) -> Iterator[tuple[int, Path]]:
        """Yield (number of the command, file of its subject) for each that `only` selects."""
        for number, command in enumerate(COMMANDS):
            if only and not any(fnmatch(command.subject, p.partition("/")[0]) for p in only):
                continue  # without making the subject
            subject = self.subjects.get(command.subject)
            for file in (f.relative_to(subject) for f in files_in(subject)):
                read = any(fnmatch(str(file), name) for name in command.only)
                if read and selected(command, file, only):
                    yield number, file

    def copy(self, command: Command) -> Copy:
        folder = self.folder / f"case-{os.getpid()}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        path = folder / command.subject
        shutil.copytree(self.subjects.get(command.subject), path)
        return Copy(self.subjects, path)

    def undamaged(self, command: Command) -> Ran:
        whole = ran(command, self.copy(command))
        checked(whole.status or bool(whole.raised))
        return whole

    def damage(self, job: tuple[int, Path]) -> list[dict[str, str]]:
        """Run a command on a file, damaged in every way."""
        number, file = job
        command, cases = COMMANDS[number], []
        place = f"{command.subject}/{file}"
        content = (self.subjects.get(command.subject) / file).read_bytes()
        draw = random.Random(f"{self.seed} {file}")
        flipped = self.flips if command.values else 0
        whole = self.undamaged(command)
        for name, damaged in damages(content, file.suffix, flipped, draw).items():
            copy = self.copy(command)
            put(copy.path / file, damaged)
            one = ran(command, copy)
            found = classify(command, one, whole, copy.path / file, copy)
            said = one.raised or one.err or one.out
            cases.append({"file": place, "command": command.name, "damage": name,
                          "class": found, "said": said[-2000:]})  # fmt: skip
            if found in BAD:
                last = said.strip().splitlines()[-1:] or [""]
                print(f"{found}: {place}, {name}, {command.name}: {last[0][:200]}", flush=True)
        total = Counter(case["class"] for case in cases)
        print(f"{place}, {command.name}: {counted(total)}", flush=True)
        return cases


def counted(total: Counter[str]) -> str:
    return ", ".join(f"{n} {name}" for name, n in total.most_common())


def selected(command: Command, file: Path, only: list[str]) -> bool:
    return not only or any(fnmatch(f"{command.subject}/{file}", pattern) for pattern in only)


class Found:
    """The cases so far, also those that are in `path` already.

    It has a line of JSON for each command and damaged file. A line whose writing was interrupted is
    ignored, and so are lines of another seed or number of flips.
    """

    def __init__(self, path: Path | None, seed: int, flips: int) -> None:
        self.path, self.settings = path, {"seed": seed, "flips": flips}
        self.by_job: dict[tuple[int, str], list[dict[str, str]]] = {}
        if path is None or not path.exists():
            return
        text = path.read_text(encoding="utf-8")
        if text and not text.endswith("\n"):
            self._append("\n")
        for line in text.splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                read = json.loads(line)
                if read.items() >= self.settings.items():
                    self._take(read["cases"])

    def _take(self, cases: list[dict[str, str]]) -> None:
        for number, command in enumerate(COMMANDS):
            place = cases[0]["file"]
            if (command.name, command.subject) == (cases[0]["command"], place.partition("/")[0]):
                self.by_job[number, lasting(place)] = cases

    def _append(self, text: str) -> None:
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)

    def add(self, cases: list[dict[str, str]]) -> None:
        """Keep the cases of a command and a file, and write them."""
        self._take(cases)
        self._append(json.dumps({**self.settings, "cases": cases}) + "\n")

    def has(self, number: int, file: Path) -> bool:
        return (number, lasting(f"{COMMANDS[number].subject}/{file}")) in self.by_job

    @property
    def cases(self) -> list[dict[str, str]]:
        """All cases, in the order of the commands and files."""
        return [case for job in sorted(self.by_job) for case in self.by_job[job]]


def lasting(file: str) -> str:
    """Return the name that a file has in every sweep.

    A comparison's names end in a hash of settings, such as the path of the corpus.
    """
    return re.sub(r"-[0-9a-f]{8}(?=[/.])", "", file)


# The table.

KINDS = [
    (r"/runs/[^/]+/", "/runs/NAME/"),
    (r"(costs|settings|logs)/(.*)\.", r"\1/NAME."),
    (r"train-\d+\.bin", "train-NNNNN.bin"),
]


def kind(file: str, latest: dict[str, str]) -> str:
    """Return the name of a file in the table, the same for all runs and checkpoints."""
    folder, step, rest = file.partition("step-")
    if step:
        newest = file.startswith(latest[folder])
        file = folder + ("latest/" if newest else "earlier/") + rest.partition("/")[2]
    for pattern, name in KINDS:
        file = re.sub(pattern, name, file)
    return file


def table(cases: list[dict[str, str]]) -> Iterator[str]:
    """Yield a row of the table for each file, with the commands that ran on it."""
    found = (re.match(r"((.*)step-\d+)/", case["file"]) for case in cases)
    latest = {m[2]: m[1] for m in sorted((m for m in found if m), key=lambda m: m[1])}
    counts: dict[str, Counter[str]] = {}
    commands: dict[str, dict[str, None]] = {}
    for case in cases:
        file = kind(case["file"], latest)
        counts.setdefault(file, Counter())[case["class"]] += 1
        commands.setdefault(file, {})[case["command"]] = None
    good = CLASSES[: -len(BAD)]
    yield f"| file | commands | {' | '.join(good)} | must not happen |"
    yield f"|---|---|{'---:|' * (len(good) + 1)}"
    for file, of in counts.items():
        numbers = [*(of[name] for name in good), sum(of[name] for name in BAD)]
        cells = " | ".join(str(n or "") for n in numbers[:-1])
        yield f"| `{file}` | {', '.join(commands[file])} | {cells} | {numbers[-1]} |"


def run(args: argparse.Namespace, found: Found) -> None:
    """Damage what `args` select and `found` does not have yet."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="peptrain-corruption-") as name:
        folder = Path(name).resolve()
        sweep = Sweep(Subjects(folder), folder, args.flips, args.seed)
        with patch.dict(os.environ, PEPTRAIN_CACHE=str(folder / "cache")):
            jobs = [job for job in sweep.jobs(args.only) if not found.has(*job)]
            for number in {number for number, _ in jobs}:
                sweep.undamaged(COMMANDS[number])  # makes what it reads, before any fork
            if args.workers == 1:
                for job in jobs:
                    found.add(sweep.damage(job))
                return
            with multiprocessing.get_context("fork").Pool(args.workers) as pool:
                for cases in pool.imap_unordered(sweep.damage, jobs):
                    found.add(cases)


def main(argv: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--only", nargs="+", default=[], metavar="FILE",
                      help="patterns of SUBJECT/FILE, such as 'run/*' (default: all)")  # fmt: skip
    made.add_argument("--flips", type=int, default=8, help="of bits, digits and keys, per file")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--workers", type=int, default=1, help="processes")
    made.add_argument("--out", type=Path, metavar="FILE",
                      help="lines of JSON with every case; continued where it exists")  # fmt: skip
    made.add_argument("--table", action="store_true", help="only print the table of --out")
    args = made.parse_args(argv)
    if args.table and args.out is None:
        made.error("--table: needs --out, the file of an earlier sweep")
    found = Found(args.out, args.seed, args.flips)
    if not args.table:
        run(args, found)
    print("\n".join(table(found.cases)))
    total = Counter(case["class"] for case in found.cases)
    print(f"\n{len(found.cases)} cases: {counted(total)}")
    return 1 if any(total[c] for c in BAD) else 0


if __name__ == "__main__":
    sys.exit(main())
