"""Damage every file of runs, corpora, comparisons and exports, one at a time, and run each command.

    python benchmarks/corruption.py [--only 'run/config.toml' 'corpus/*'] [--flips 8]
                                    [--workers 1] [--json FILE]

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
from subjects import COMMANDS, Command, Copy, Subjects, checked, damages, files_in, put

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
    if any(names(line.strip(), file) for line in news(one.out, whole.out)):
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

    def damage(self, number: int, file: Path) -> list[dict[str, str]]:
        """Run a command on a file, damaged in every way."""
        command, cases = COMMANDS[number], []
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
            place = f"{command.subject}/{file}"
            cases.append({"file": place, "command": command.name, "damage": name,
                          "class": found, "said": said[-2000:]})  # fmt: skip
            if found in BAD:
                last = said.strip().splitlines()[-1:] or [""]
                print(f"{found}: {place}, {name}, {command.name}: {last[0][:200]}", flush=True)
        total = Counter(case["class"] for case in cases)
        print(f"{command.subject}/{file}, {command.name}: {counted(total)}", flush=True)
        return cases


def counted(total: Counter[str]) -> str:
    return ", ".join(f"{n} {name}" for name, n in total.most_common())


def selected(command: Command, file: Path, only: list[str]) -> bool:
    return not only or any(fnmatch(f"{command.subject}/{file}", pattern) for pattern in only)


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


def main(argv: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--only", nargs="+", default=[], metavar="FILE",
                      help="patterns of SUBJECT/FILE, such as 'run/*' (default: all)")  # fmt: skip
    made.add_argument("--flips", type=int, default=8, help="of bits, digits and keys, per file")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--workers", type=int, default=1, help="processes")
    made.add_argument("--json", type=Path, help="write every case to this file")
    args = made.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="peptrain-corruption-") as name:
        folder = Path(name).resolve()
        sweep = Sweep(Subjects(folder), folder, args.flips, args.seed)
        with patch.dict(os.environ, PEPTRAIN_CACHE=str(folder / "cache")):
            jobs = list(sweep.jobs(args.only))
            for number in {number for number, _ in jobs}:
                sweep.undamaged(COMMANDS[number])  # makes what it reads, before any fork
            if args.workers == 1:
                found = [sweep.damage(*job) for job in jobs]
            else:
                with multiprocessing.get_context("fork").Pool(args.workers) as pool:
                    found = pool.starmap(sweep.damage, jobs, chunksize=1)
    cases = [case for of_file in found for case in of_file]
    print("\n".join(table(cases)))
    total = Counter(case["class"] for case in cases)
    print(f"\n{len(cases)} cases: {counted(total)}")
    if args.json:
        args.json.write_text(json.dumps({"cases": cases}, indent=1), encoding="utf-8")
    return 1 if any(total[c] for c in BAD) else 0


if __name__ == "__main__":
    sys.exit(main())
