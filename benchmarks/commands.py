"""The commands that read what the corruption sweep damages, and what each of them leaves."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from subjects import CORPUS, SHARD, STOP, Subjects

from peptrain.cli.app import main as peptrain
from peptrain.errors import PeptrainError
from peptrain.exporting.card import CARD
from peptrain.exporting.factorised import load_factorised
from peptrain.testing import MODEL, TRAIN
from peptrain.training.metrics import MEASURED

UNDER = ("lock", "*.lock")
TEXTS = ("*.toml", "*.json", "*.jsonl", "*.md", "*.csv", "*.tex", "*.log")
NOT_COMPARED = (*MEASURED, "crc32")
"""Keys of rows: times, and the checksum of the row with them."""


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
    """Whether changed values can be noticed. A Hugging Face directory and the rows of a task have
    no checksums."""
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


def of_entries(copy: Copy, out: str) -> Any:
    """Return what `eval` wrote to the file of --out."""
    return json.loads(copy.made.read_text(encoding="utf-8"))


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


def moved(copy: Copy, name: str) -> Path:
    """Return a copy of a run that was made with the damaged corpus or model."""
    run = copy.made.with_name("moved")
    shutil.copytree(copy.subjects.get(name), run)
    config = run / "config.toml"
    text = config.read_text(encoding="utf-8")
    whole = str(copy.subjects.get(copy.path.name))
    config.write_text(text.replace(f'"{whole}"', f'"{copy.path}"'), encoding="utf-8")
    return run


def training(copy: Copy, *more: str, method: str = "full") -> list[str]:
    """Train two steps in a new run."""
    sizes = [f"--train.{k.replace('_', '-')}={v}" for k, v in {**TRAIN, "steps": 2}.items()]
    here = ["--train.device=cpu", "--train.precision=fp64", f"--run={copy.made}"]
    return ["train", method, *sizes, *here, *more]


def on(copy: Copy) -> str:
    return f"--data.path={copy.subjects.get(CORPUS)}"


def exporting(copy: Copy, form: str, run: Path | None = None) -> list[str]:
    return ["export", str(run or copy.path), "--out", str(copy.made), "--form", form]


def generating(copy: Copy) -> list[str]:
    """Draw 36 tokens in all: enough that other weights show in them."""
    drawn = ["--tokens=12", "--samples=3", "--temperature=1", "--device=cpu"]
    return ["generate", str(copy.path), "eta", *drawn]


def judging(copy: Copy) -> list[str]:
    data = f"--data={copy.subjects.get(CORPUS)}"
    return ["eval", str(copy.path), data, f"--out={copy.made}", "--device=cpu"]


def tuning(copy: Copy, run: Path, rows: Path) -> list[str]:
    """Fine-tune for three steps in a new run."""
    sizes = ["--epochs=1", "--train.batch-size=4", "--train.seq-len=16", "--train.device=cpu"]
    given = [f"--init-from={run}", "--task=cola", f"--tasks-data={rows}", f"--run={copy.made}"]
    return ["tune", "full", *given, "--train.precision=fp64", *sizes]


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
    Command("export --form gguf", "run", lambda c: exporting(c, "gguf"),
            lambda c, out: of_export(c.made)),
    Command("generate", "run", generating, lambda c, out: out),
    Command("tune --init-from", "run", lambda c: tuning(c, c.path, c.subjects.get("rows")),
            lambda c, out: of_run(c.made)),
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
    Command("export --form peft", "adapted", lambda c: exporting(c, "peft"),
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
    Command("export --form peft", "dense", lambda c: exporting(c, "peft", moved(c, "adapted")),
            lambda c, out: of_export(c.made), values=False),
    Command("eval --data", "dense", judging, of_entries, values=False),
    Command("generate", "dense", generating, lambda c, out: out, values=False),
    Command("load_factorised", "factorised", lambda c: [str(c.path)], printed, call=factors),
    Command("eval --data", "factorised", judging, of_entries),
    Command("generate", "factorised", generating, lambda c, out: out),
    Command("train", "corpus", lambda c: training(c, f"--data.path={c.path}", *SMALL),
            lambda c, out: of_run(c.made)),
    Command("resume", "corpus", lambda c: ["resume", str(moved(c, "begun"))],
            lambda c, out: of_run(c.path.with_name("moved"))),
    Command("eval --data", "corpus", lambda c: [
        "eval", str(c.subjects.get("run")), "--device=cpu", f"--data={c.path}"], printed),
    Command("tune", "rows", lambda c: tuning(c, c.subjects.get("run"), c.path),
            lambda c, out: of_run(c.made), values=False),
    Command("data prepare", "unfinished", preparing, lambda c, out: of_files(c.path)),
]  # fmt: skip
