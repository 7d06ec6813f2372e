"""What the corruption sweep damages, and how."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from peptrain.cli.app import main as peptrain
from peptrain.data import PrepareConfig, prepare
from peptrain.errors import Interrupted
from peptrain.methods import METHODS
from peptrain.testing import MODEL, small, small_corpus, small_run
from peptrain.training.loop import resume, train

STOP, SHARD, CORPUS = 5, 4000, "corpus"
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

    def _adapted(self, path: Path) -> None:
        """A run of an adapter around the model of a Hugging Face directory."""
        method = small(METHODS["lora"], warm_start_steps=0, train_rest=False)
        config = small_run(
            method,
            self.get(CORPUS),
            path,
            model=dict.fromkeys(MODEL),
            train={"checkpoint_every": 2, "precision": "fp32", "device": "cpu"},
        )
        train(replace(config, init_from=self.get("dense")))

    def _rows(self, path: Path) -> None:
        """The data of a task to fine-tune on."""
        (path / "cola").mkdir(parents=True)
        for split, sentences in (("train", 13), ("validation", 9)):
            rows = [{"sentence": f"eta {n} oin", "label": n % 2} for n in range(sentences)]
            text = "".join(f"{json.dumps(row)}\n" for row in rows)
            (path / "cola" / f"{split}.jsonl").write_text(text, encoding="utf-8")

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
