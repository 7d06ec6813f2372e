"""What the corruption sweep damages, how, and the commands that read it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from peptrain.cli.app import main as peptrain
from peptrain.data import PrepareConfig, prepare
from peptrain.errors import Interrupted, PeptrainError
from peptrain.exporting.card import CARD
from peptrain.exporting.factorised import load_factorised
from peptrain.methods import METHODS
from peptrain.testing import MODEL, TRAIN, small, small_corpus, small_run
from peptrain.training.loop import resume, train
from peptrain.training.metrics import MEASURED

STOP, SHARD, CORPUS = 5, 4000, "corpus"
UNDER = ("lock", "*.lock")
TEXTS = ("*.toml", "*.json", "*.jsonl", "*.md", "*.csv", "*.tex", "*.log")
NOT_COMPARED = (*MEASURED, "crc32")
"""Keys of rows: times, and the checksum of the row with them."""
GRID = """equal = "flops"
[base]
data.path = "{corpus}"
optim.lr = 1e-3
train = {{ steps = 4, batch_size = 4, seq_len = 16, precision = "fp64", device = "cpu" }}
model = {{ hidden_size = 16, intermediate_size = 24, layers = 1, heads = 2, vocab_size = 320 }}
[[grid]]
method.name = "full"
[[grid]]
method = {{ name = "lowrank", rank = 2 }}
"""


class Subjects:
    """Directories to damage, each made when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[str, Path] = {}

    def get(self, name: str) -> Path:
        """Return a subject's directory. Made once, also for processes forked after that."""
        if name not in self.made:
            self.made[name] = self._make(name)
        return self.made[name]

    def _make(self, name: str) -> Path:
        path = self.folder / name
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            getattr(self, f"_{name}")(path)
        return path

    def _corpus(self, path: Path) -> None:
        small_corpus(self.folder)

    def _unfinished(self, path: Path) -> None:
        """A preparation that was interrupted after a few shards."""
        self.get(CORPUS)

        def stop(done: Any) -> None:
            if done.tokens >= 3 * SHARD:
                raise KeyboardInterrupt

        config = PrepareConfig(
            inputs=(self.folder / "text.txt",), out=path, vocab_size=300, held_out=0.02,
            shard_tokens=SHARD,
        )  # fmt: skip
        batches = patch.object(sys.modules[prepare.__module__], "BATCH_CHARACTERS", 100)
        with batches, contextlib.suppress(KeyboardInterrupt):
            prepare(config, stop)

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

    def _longer(self, path: Path) -> None:
        """A run of 5 steps that was made longer, and then interrupted."""
        config = small_run(
            small(METHODS["lowrank"]),
            self.get(CORPUS),
            path,
            schedule={"kind": "wsd", "warmup": 0, "decay": 1},
            train={"steps": STOP, "checkpoint_every": 2, "keep": 3, "device": "cpu"},
        )
        train(config)

        def stop(row: Any) -> None:
            if (row["event"], row["step"]) == ("step", STOP + 2):
                signal.raise_signal(signal.SIGTERM)

        with contextlib.suppress(Interrupted):
            resume(path, stop, steps=STOP + 4)

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
        for begin, end in draw.sample(numbers, min(2, flips, len(numbers))):
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
    values: bool = True
    """Whether changed values can be noticed. A Hugging Face directory has no checksums."""
    call: Callable[[list[str]], int] = peptrain


def of_run(path: Path) -> Any:
    """Return the weights and moments of the last checkpoint, and the rows."""
    files = sorted(sorted((path / "checkpoints").glob("step-*"))[-1].glob("*.safetensors"))
    lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k not in NOT_COMPARED} for line in lines]
    return [(str(f.relative_to(path)), digest(f)) for f in files], rows


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def of_files(path: Path) -> Any:
    return {str(f.relative_to(path)): digest(f) for f in files_in(path)}


def of_export(path: Path) -> Any:
    """Return an export's files without its card, which repeats env.json and eval.json. These have
    no checksums, so that what was changed in them is unnoticed and changes the card."""
    return {name: found for name, found in of_files(path).items() if name != CARD}


def files_in(path: Path) -> list[Path]:
    found = (f for f in sorted(path.rglob("*")) if f.is_file())
    return [f for f in found if not any(fnmatch(f.name, name) for name in UNDER)]


def of_table(path: Path) -> Any:
    """Return the values in a comparison's runs.json."""
    text = (path / "runs.json").read_text(encoding="utf-8")
    return json.loads(text, object_hook=lambda d: {k: d[k] for k in d if k not in NOT_COMPARED})


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
            "--held-out=0.02", f"--shard-tokens={SHARD}"]  # fmt: skip


OF_LONGER = ("config.toml", "metrics.jsonl", "ends/*")
"""Files in which a run that was made longer differs from others."""
SMALL = [f"--model.{key.replace('_', '-')}={value}" for key, value in MODEL.items()]
COMMANDS = [
    Command("resume", "begun", lambda c: ["resume", str(c.path)], lambda c, out: of_run(c.path)),
    Command("resume", "run", lambda c: ["resume", str(c.path)], lambda c, out: of_run(c.path)),
    Command("eval", "run", lambda c: ["eval", str(c.path), "--device=cpu"], printed),
    Command("eval --data", "run", lambda c: [
        "eval", str(c.path), "--device=cpu", f"--data={c.subjects.get(CORPUS)}"], printed),
    Command("export", "run", lambda c: exporting(c, "dense"), lambda c, out: of_export(c.made)),
    Command("train --init-from", "run", lambda c: training(c, on(c), f"--init-from={c.path}"),
            lambda c, out: of_run(c.made)),
    Command("train --config", "run", lambda c: [
        "train", f"--config={c.path}/config.toml", f"--run={c.made}"],
        lambda c, out: of_run(c.made), ("config.toml",)),
    Command("resume", "longer", lambda c: ["resume", str(c.path)],
            lambda c, out: of_run(c.path), OF_LONGER),
    Command("resume --train.steps", "longer", lambda c: [
        "resume", str(c.path), f"--train.steps={STOP + 6}"],
        lambda c, out: of_run(c.path), OF_LONGER),
    Command("eval RUN@STEP", "longer", lambda c: ["eval", f"{c.path}@{STOP}", "--device=cpu"],
            printed, OF_LONGER),
    Command("train --continue-from", "longer", lambda c: training(
        c, on(c), f"--continue-from={c.path}@{STOP}", "--train.steps=7", method="lowrank"),
        lambda c, out: of_run(c.made), OF_LONGER),
    Command("export", "loro", lambda c: exporting(c, "factorised"),
            lambda c, out: of_export(c.made)),
    Command("resume", "copied", lambda c: ["resume", str(c.path)],
            lambda c, out: of_run(c.path), ("model.json",)),
    Command("eval", "copied", lambda c: ["eval", str(c.path), "--device=cpu"], printed,
            ("model.json",)),
    Command("compare", "grid", lambda c: [
        "compare", str(c.subjects.grid_file), f"--out={c.path}"],
        lambda c, out: of_table(c.path), TEXTS),
    Command("train --init-from", "dense", lambda c: training(c, on(c), f"--init-from={c.path}"),
            lambda c, out: of_run(c.made), values=False),
    Command("load_factorised", "factorised", lambda c: [str(c.path)], printed, call=factors),
    Command("train", "corpus", lambda c: training(c, f"--data.path={c.path}", *SMALL),
            lambda c, out: of_run(c.made)),
    Command("resume", "corpus", moved, lambda c, out: of_run(c.made)),
    Command("eval --data", "corpus", lambda c: [
        "eval", str(c.subjects.get("run")), "--device=cpu", f"--data={c.path}"], printed),
    Command("data prepare", "unfinished", preparing, lambda c, out: of_files(c.path)),
]  # fmt: skip
