"""Damage every file of runs, corpora, comparisons and exports, one at a time, and run each command.

    python benchmarks/corruption.py [--only 'run/config.toml' 'corpus/*'] [--flips 8] [--json FILE]

Each case is a fresh copy with one damaged file, in which one command runs in this process. Its
outcome is one of

    harmless     the result is that of the undamaged copy: the bytes of weights, moments and exports,
                 the rows of metrics except for times, the printed values
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
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from peptrain.cli.app import main as peptrain
from peptrain.config import load
from peptrain.errors import Interrupted, PeptrainError
from peptrain.exporting.factorised import load_factorised
from peptrain.methods import METHODS
from peptrain.testing import MODEL, TRAIN, small, small_corpus, small_run
from peptrain.training.loop import train

BAD = ("silent", "unclear", "traceback", "hang")
CLASSES = ("harmless", "refused", "reported", "as written", *BAD)
SECONDS = 60
"""After which a command hangs."""
TIMES = ("tokens_per_second",)
STOP, CORPUS = 5, "corpus"
UNDER = ("lock", "*.lock", "*.safetensors.index.json")
SETTING = re.compile(r"--[\w.-]+|[a-z_]+(\.\w+)+|init_from|data\b")
"""How a message that names a setting begins."""
TEXTS = ("*.toml", "*.json", "*.jsonl", "*.md", "*.csv", "*.tex", "*.log")
GRID = """equal = "flops"
[base]
data.path = "{corpus}"
optim.lr = 1e-3
train = {{ steps = 4, batch_size = 4, seq_len = 16, log_every = 1, precision = "fp64", device = "cpu" }}
model = {{ hidden_size = 16, intermediate_size = 24, layers = 1, heads = 2, vocab_size = 320 }}
[[grid]]
method.name = "full"
[[grid]]
method = {{ name = "lowrank", rank = 2 }}
"""


# What is damaged.


class Subjects:
    """Directories to damage, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.get = cache(self._make)

    def _make(self, name: str) -> Path:
        path = self.folder / name
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            getattr(self, f"_{name}")(path)
        return path

    def _corpus(self, path: Path) -> None:
        small_corpus(self.folder)

    def _train(self, method: str, path: Path, observe: Callable[[Any], None], **model: Any) -> None:
        """Train 8 steps with a checkpoint every two: ReLoRA has a phase and merges in them."""
        config = small_run(
            small(METHODS[method]),
            self.get(CORPUS),
            path,
            model=model,
            train={"checkpoint_every": 2, "device": "cpu"},
        )
        train(config, observe)

    def _run(self, path: Path) -> None:
        self._train("relora", path, lambda row: None)
        checked(peptrain(["eval", str(path)]))  # writes eval.json

    def _begun(self, path: Path) -> None:
        def stop(row: Any) -> None:
            if (row["event"], row["step"]) == ("step", STOP):
                signal.raise_signal(signal.SIGTERM)

        with contextlib.suppress(Interrupted):
            self._train("relora", path, stop)

    def _loro(self, path: Path) -> None:
        self._train("loro", path, lambda row: None)

    def _copied(self, path: Path) -> None:
        """A run whose model is in a file of its own, model.json."""
        self._train("full", path, lambda row: None, **dict.fromkeys(MODEL),
                    config=self.get("dense"))  # fmt: skip

    def _grid(self, path: Path) -> None:
        self.grid_file.write_text(GRID.format(corpus=self.get(CORPUS)), encoding="utf-8")
        checked(peptrain(["compare", str(self.grid_file), "--out", str(path)]))

    @property
    def grid_file(self) -> Path:
        return self.folder / "grid.toml"

    def _dense(self, path: Path) -> None:
        checked(peptrain(["export", str(self.get("run")), "--out", str(path)]))

    def _factorised(self, path: Path) -> None:
        words = ["export", str(self.get("loro")), "--out", str(path), "--form", "factorised"]
        checked(peptrain(words))


def checked(status: int) -> None:
    if status:
        raise SystemExit(f"the undamaged command failed with status {status}")


# How it is damaged.


def damages(
    content: bytes, suffix: str, flips: int, draw: random.Random
) -> dict[str, bytes | None]:
    """Return damaged contents by name. None stands for a deleted file, b"/" for a directory."""
    found: dict[str, bytes | None] = {"deleted": None, "a directory": b"/", "emptied": b""}
    found["half"], found["last byte off"] = content[: len(content) // 2], content[:-1]
    found["random bytes"] = draw.randbytes(len(content))
    bits = range(8 * len(content))
    for bit in draw.sample(bits, min(flips, len(bits))):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        found[f"bit {bit}"] = bytes(flipped)
    if suffix in (".toml", ".json", ".jsonl"):
        places = [m.start() for m in re.finditer(rb"\d", content)]
        for at in draw.sample(places, min(flips, len(places))):
            digit = b"%d" % ((content[at] - ord("0") + draw.randrange(1, 10)) % 10)
            found[f"digit {at}"] = content[:at] + digit + content[at + 1 :]
        numbers = [m.span() for m in re.finditer(rb"(?<![\w.\"])\d[\d.e-]*", content)]
        for begin, end in draw.sample(numbers, min(2, len(numbers))):
            for digits in (400, 5000):
                huge = content[:begin] + b"9" * digits + content[end:]
                found[f"{digits} digits at {begin}"] = huge
    if suffix in (".json", ".jsonl"):
        found |= {"null": b"null", "[]": b"[]", "{}": b"{}", "brackets": b"[" * 100_000}
        found["a huge integer"] = b"9" * 5000
        keys = list(re.finditer(rb'"[^"\n]*": *(?:"[^"\n]*"|[\w.+-]+),?', content))
        for key in draw.sample(keys, min(flips, len(keys))):
            found[f"without {key.start()}"] = content[: key.start()] + content[key.end() :]
    return {name: made for name, made in found.items() if made != content}


def put(path: Path, content: bytes | None) -> None:
    path.unlink()
    if content == b"/":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)


# Which commands read it.


@dataclass
class Copy:
    """A copy of a subject, in a folder of its own, in which one command runs."""

    subjects: Subjects
    path: Path

    @property
    def made(self) -> Path:
        """Where the command writes, if not into the copy."""
        return self.path.parent / "made"


@dataclass(frozen=True)
class Command:
    """A command, and what it leaves: its result, except for times."""

    name: str
    subject: str
    words: Callable[[Copy], list[str]]
    result: Callable[[Copy, str], Any]
    only: tuple[str, ...] = ("*",)
    """Files of the subject to damage."""
    call: Callable[[list[str]], int] = peptrain


def of_run(path: Path) -> Any:
    """Return the weights and moments of the last checkpoint, and the rows."""
    files = sorted(sorted((path / "checkpoints").glob("step-*"))[-1].glob("*.safetensors"))
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k not in UNTOLD} for line in lines]
    return [(str(f.relative_to(path)), digest(f)) for f in files], rows


UNTOLD = (*TIMES, "crc32")


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def of_files(path: Path) -> Any:
    return {str(f.relative_to(path)): digest(f) for f in files_in(path)}


def files_in(path: Path) -> list[Path]:
    found = (f for f in sorted(path.rglob("*")) if f.is_file())
    return [f for f in found if not any(fnmatch(f.name, name) for name in UNDER)]


def of_table(path: Path) -> Any:
    """Return the values in a comparison's runs.json."""
    text = (path / "runs.json").read_text(encoding="utf-8")
    return json.loads(text, object_hook=lambda d: {k: d[k] for k in d if k not in TIMES})


def printed(copy: Copy, out: str) -> str:
    return "\n".join(line for line in out.splitlines() if line.startswith("perplexity"))


def factors(words: list[str]) -> int:
    """Load a factorised model as the command would: print a hash of it, or one line of error."""
    try:
        model = load_factorised(Path(words[0]))
    except (PeptrainError, OSError) as error:
        print("error:", str(error).replace("\n", "\\n"), file=sys.stderr)
        return 1
    hashed = hashlib.sha256(repr(model.config).encode())
    with torch.no_grad():
        logits = model(torch.arange(32)[None]).logits
    for tensor in (*model.parameters(), logits):
        hashed.update(tensor.detach().numpy().tobytes())
    print("perplexity", hashed.hexdigest())
    return 0


def moved(copy: Copy) -> list[str]:
    """Resume a copy of the begun run, on the damaged corpus."""
    shutil.copytree(copy.subjects.get("begun"), copy.made)
    config = copy.made / "config.toml"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace(str(copy.subjects.get(CORPUS)), str(copy.path)), "utf-8")
    return ["resume", str(copy.made)]


def training(copy: Copy, *more: str, method: str = "full") -> list[str]:
    """Train two steps in a new run."""
    sizes = [f"--train.{k.replace('_', '-')}={v}" for k, v in {**TRAIN, "steps": 2}.items()]
    here = ["--train.device=cpu", "--train.precision=fp64", f"--run={copy.made}"]
    return ["train", method, *sizes, *here, *more]


def on(copy: Copy) -> str:
    return f"--data.path={copy.subjects.get(CORPUS)}"


def exporting(copy: Copy, form: str) -> list[str]:
    return ["export", str(copy.path), "--out", str(copy.made), "--form", form]


def preparing(copy: Copy) -> list[str]:
    text = str(copy.subjects.folder / "text.txt")
    return ["data", "prepare", text, "--out", str(copy.path), "--vocab-size=300",
            "--held-out=0.02"]  # fmt: skip


SMALL = [f"--model.{key.replace('_', '-')}={value}" for key, value in MODEL.items()]
COMMANDS = [
    Command("resume", "begun", lambda c: ["resume", str(c.path)], lambda c, out: of_run(c.path)),
    Command("resume", "run", lambda c: ["resume", str(c.path)], lambda c, out: of_run(c.path)),
    Command("eval", "run", lambda c: ["eval", str(c.path), "--device=cpu"], printed),
    Command("eval --data", "run", lambda c: [
        "eval", str(c.path), "--device=cpu", f"--data={c.subjects.get(CORPUS)}"], printed),
    Command("export", "run", lambda c: exporting(c, "dense"), lambda c, out: of_files(c.made)),
    Command("train --init-from", "run", lambda c: training(c, on(c), f"--init-from={c.path}"),
            lambda c, out: of_run(c.made)),
    Command("train --config", "run", lambda c: [
        "train", f"--config={c.path}/config.toml", f"--run={c.made}"],
        lambda c, out: of_run(c.made), ("config.toml",)),
    Command("export", "loro", lambda c: exporting(c, "factorised"),
            lambda c, out: of_files(c.made)),
    Command("resume", "copied", lambda c: ["resume", str(c.path)],
            lambda c, out: of_run(c.path), ("model.json",)),
    Command("eval", "copied", lambda c: ["eval", str(c.path), "--device=cpu"], printed,
            ("model.json",)),
    Command("compare", "grid", lambda c: [
        "compare", str(c.subjects.grid_file), f"--out={c.path}"],
        lambda c, out: of_table(c.path), TEXTS),
    Command("train --init-from", "dense", lambda c: training(c, on(c), f"--init-from={c.path}"),
            lambda c, out: of_run(c.made)),
    Command("load_factorised", "factorised", lambda c: [str(c.path)], printed, call=factors),
    Command("train", "corpus", lambda c: training(c, f"--data.path={c.path}", *SMALL),
            lambda c, out: of_run(c.made)),
    Command("resume", "corpus", moved, lambda c, out: of_run(c.made)),
    Command("eval --data", "corpus", lambda c: [
        "eval", str(c.subjects.get("run")), "--device=cpu", f"--data={c.path}"], printed),
    Command("data prepare", "corpus", preparing, lambda c, out: of_files(c.path)),
]  # fmt: skip


# What happens.


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
        lines = one.err.strip().splitlines()
        line = lines[-1].removeprefix("error: ") if lines else ""
        return "refused" if len(lines) == 1 and names(line, file) else "unclear"
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


@dataclass
class Sweep:
    """All cases, and what happened in them."""

    subjects: Subjects
    folder: Path
    cases: list[dict[str, str]] = field(default_factory=list)

    def copy(self, command: Command) -> Copy:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        path = self.folder / command.subject
        shutil.copytree(self.subjects.get(command.subject), path)
        return Copy(self.subjects, path)

    def damage(self, command: Command, only: list[str], flips: int, seed: int) -> None:
        """Run the command on every damaged file of its subject that `only` selects."""
        if only and not any(fnmatch(command.subject, p.partition("/")[0]) for p in only):
            return
        copy = self.copy(command)
        files = [f.relative_to(copy.path) for f in files_in(copy.path)]
        asked = [f for f in files if any(fnmatch(str(f), name) for name in command.only)]
        asked = [f for f in asked if selected(command, f, only)]
        if not asked:
            return
        whole = ran(command, copy)
        checked(whole.status or bool(whole.raised))
        for file in asked:
            content = (self.subjects.get(command.subject) / file).read_bytes()
            draw = random.Random(f"{seed} {file}")
            for name, damaged in damages(content, file.suffix, flips, draw).items():
                copy = self.copy(command)
                put(copy.path / file, damaged)
                one = ran(command, copy)
                found = classify(command, one, whole, copy.path / file, copy)
                said = one.raised or one.err or one.out
                place = f"{command.subject}/{file}"
                self.cases.append({"file": place, "command": command.name, "damage": name,
                                   "class": found, "said": said[-2000:]})  # fmt: skip
                if found in BAD:
                    last = said.strip().splitlines()[-1:] or [""]
                    print(f"{found}: {place}, {name}, {command.name}: {last[0][:200]}", flush=True)


def selected(command: Command, file: Path, only: list[str]) -> bool:
    return not only or any(fnmatch(f"{command.subject}/{file}", pattern) for pattern in only)


# The table.

KINDS = [
    (r"runs/[^/]+/", "runs/NAME/"),
    (r"(costs|settings|logs)/(.*)\.", r"\1/NAME."),
    (r"train-\d+\.bin", "train-NNNNN.bin"),
]


def kind(file: str, latest: str) -> str:
    """Return the name of a file in the table, the same for all runs and checkpoints."""
    found = file.replace(latest, "latest")
    for pattern, name in [*KINDS, (r"step-\d+", "earlier")]:
        found = re.sub(pattern, name, found)
    return found


def table(cases: list[dict[str, str]]) -> Iterator[str]:
    """Yield a row of the table for each file and command."""
    steps = sorted(set(re.findall(r"begun/.*(step-\d+)", "\n".join(c["file"] for c in cases))))
    latest = {"begun": steps[-1] if steps else "none"}
    counts: dict[tuple[str, str], Counter[str]] = {}
    for case in cases:
        subject = case["file"].partition("/")[0]
        key = kind(case["file"], latest.get(subject, "step-00000008")), case["command"]
        counts.setdefault(key, Counter())[case["class"]] += 1
    shown = [c for c in CLASSES if c not in BAD[1:]]
    yield f"| file | command | {' | '.join(shown[:-1])} | must not happen |"
    yield f"|---|---|{'---:|' * len(shown)}"
    for (file, command), of in counts.items():
        numbers = [*(of[c] for c in shown[:-1]), sum(of[c] for c in BAD)]
        yield f"| `{file}` | {command} | {' | '.join(str(n or '') for n in numbers)} |"


def main(argv: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--only", nargs="+", default=[], metavar="FILE",
                      help="patterns of SUBJECT/FILE, such as 'run/*' (default: all)")  # fmt: skip
    made.add_argument("--flips", type=int, default=8, help="of bits, digits and keys, per file")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--json", type=Path, help="write every case to this file")
    args = made.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="peptrain-corruption-") as name:
        folder = Path(name).resolve()
        sweep = Sweep(Subjects(folder), folder / "case")
        with cached_in(folder / "cache"):
            for command in COMMANDS:
                sweep.damage(command, args.only, args.flips, args.seed)
    print("\n".join(table(sweep.cases)))
    total = Counter(case["class"] for case in sweep.cases)
    print(f"\n{len(sweep.cases)} cases: " + ", ".join(f"{n} {c}" for c, n in total.most_common()))
    if args.json:
        args.json.write_text(json.dumps({"cases": sweep.cases}, indent=1), encoding="utf-8")
    return 1 if any(total[c] for c in BAD) else 0


@contextlib.contextmanager
def cached_in(folder: Path) -> Iterator[None]:
    """Keep the stamps of verified corpora out of the user's cache."""
    before = os.environ.get("PEPTRAIN_CACHE")
    os.environ["PEPTRAIN_CACHE"] = str(folder)
    try:
        yield
    finally:
        del os.environ["PEPTRAIN_CACHE"]
        if before is not None:
            os.environ["PEPTRAIN_CACHE"] = before


if __name__ == "__main__":
    sys.exit(main())
