"""The run directory: the interface between training and everything that reads a run.

runs/NAME/config.toml      the resolved configuration
          env.json         versions, device and command line of each start
          metrics.jsonl    a row every few steps, with a checksum
          checkpoints/     step-00000600/, ...
          ends/            what was taken back when the run was made longer (runs/ends.py)
          lock             names the process that trains it, while it does (runs/lock.py)
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from zlib import crc32

from peptrain.errors import CheckpointError
from peptrain.files import leading_out, no_links, read_json, write_atomically
from peptrain.runs.lock import lock
from peptrain.text import quoted

log = logging.getLogger("peptrain")
NEWEST = 16_384  # bytes read from the end of the metrics: dozens of rows
CONTENTS = ("config.toml", "env.json", "metrics.jsonl", "eval.json", "model.json", "prompts.txt",
            "tokenizer", "checkpoints", "ends", "longer.json", "analysis", "eval", "observe.json",
            "tensorboard", "trackio.json", "wandb.json")  # fmt: skip
LAST = ("end", "diverged")
"""Events that end a run; a resumed run drops their rows."""
LOCK = "lock"
COMPARISON = "runs.json"
"""What makes a directory one that `compare` has written."""
NEW = ".config.toml.new"
"""Name of config.toml until the other first files of a run are written."""
CHECKSUM = "crc32"
"""Key of the checksum of a row, its last."""
LARGEST = 1 << 63
FOREIGN = "lost+found"
"""What an empty mount point contains."""


@dataclass(frozen=True)
class RunDir:
    """The directory of one run, with the paths of its files."""

    path: Path

    @property
    def config_file(self) -> Path:
        return self.path / "config.toml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def model_file(self) -> Path:
        return self.path / "model.json"

    @property
    def prompts_file(self) -> Path:
        return self.path / "prompts.txt"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def ends(self) -> Path:
        return self.path / "ends"

    @classmethod
    @contextlib.contextmanager
    def create(cls, path: Path, config: str, fill: Callable[[RunDir], None]) -> Iterator[RunDir]:
        """Create a run in a new or empty directory and hold its lock.

        The directory is filled in place, because a mount point cannot be replaced. `fill` writes
        the files other than config.toml, which appears last and makes the directory a run. What a
        killed creation left is replaced.

        Raises CheckpointError if the path is taken or cannot be written.
        """
        run = cls(path)
        try:
            run._check_free()
            Path(os.path.realpath(path)).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(path, error) from error
        with run.lock():
            run._check_free()
            try:
                run._clear()
                with open(path / NEW, "w", encoding="utf-8", opener=no_links) as file:
                    file.write(config)
                    file.flush()
                    os.fsync(file.fileno())
                run.checkpoints.mkdir()
                fill(run)
                (path / NEW).replace(run.config_file)
            except OSError as error:
                run._clear()
                raise _unwritable(path, error) from error
            yield run

    def lock(self) -> AbstractContextManager[int]:
        """Lock the run for training. Raises CheckpointError, naming the holder, if it is held."""
        return lock(
            self.path / LOCK,
            lambda holder: (
                f"{self.path}: in use by {holder}; wait for it to end, or stop it, then"
                f" continue with `peptrain resume {quoted(self.path)}`"
            ),
        )

    def _check_free(self) -> None:
        """Raise CheckpointError unless the path is free, empty, or left by a killed creation."""
        names = set()
        if self.path.is_dir():
            names = {entry.name for entry in self.path.iterdir()} - {LOCK, FOREIGN}
        taken = self.path.exists() and not self.path.is_dir()
        if taken or (names and not (NEW in names and names <= self._first_names)):
            how = "choose another"
            if self.config_file.is_file():
                how += f", or resume it with `peptrain resume {quoted(self.path)}`"
            raise CheckpointError(f"--run {self.path}: exists and is never overwritten; {how}")
        parts = self.path.parts
        for above in (Path(*parts[:n]) for n, part in enumerate(parts) if part == ".."):
            if not above.is_dir():
                raise CheckpointError(
                    f"--run {self.path}: {above} is not a directory, so the '..' after it leads"
                    " nowhere; write the path without it"
                )

    @property
    def _first_names(self) -> set[str]:
        """Names of what a creation writes before config.toml."""
        return {NEW, self.checkpoints.name, self.tokenizer.name, self.model_file.name,
                self.prompts_file.name}  # fmt: skip

    def _clear(self) -> None:
        for name in self._first_names - {NEW}:
            if (self.path / name).is_dir():
                shutil.rmtree(self.path / name, ignore_errors=True)
            else:
                (self.path / name).unlink(missing_ok=True)
        (self.path / NEW).unlink(missing_ok=True)  # last: it marks the others as ours

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """Open an existing run directory.

        Raises CheckpointError if `path` is not one, or if links in it lead elsewhere.
        """
        run = cls(path)
        if not path.exists():
            raise CheckpointError(f"{path}: not a run directory (there is no such directory)")
        if not run.config_file.is_file():
            refuse_known(path)
            raise CheckpointError(
                f"{path}: not a run directory (config.toml is missing){_instead(path)}"
            )
        if (outside := leading_out(path, CONTENTS)) is not None:
            raise CheckpointError(
                f"{outside}: a link out of the run, or not a regular file, which is never followed;"
                f" if you trust the run, copy it with `cp -rL {path} COPY`"
            )
        return run

    def record(self, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl."""
        try:
            with open(self.metrics_file, "a", encoding="utf-8", opener=no_links) as file:
                file.write(_line(row))
        except OSError as error:
            raise CheckpointError(
                f"{self.metrics_file}: can't be written: {error.strerror}; free some space and"
                f" resume with `peptrain resume {quoted(self.path)}`"
            ) from error

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Yield the rows of metrics.jsonl, skipping a last line that a kill cut off.

        Damaged lines before that are skipped with a warning.
        """
        for number, line, row in self._lines():
            if row is None:
                log.warning("%s:%d: damaged, skipped: %.60r", self.metrics_file, number, line)
            else:
                yield row

    def _lines(self) -> Iterator[tuple[int, bytes, dict[str, Any] | None]]:
        """Yield (number, line, its row) for each line, with None for the row of a damaged one."""
        if not self.metrics_file.exists():
            return
        # Only at \n: str.splitlines would also split at a damaged byte such as 0x0b or 0x85.
        content = self.metrics_file.read_bytes()
        *complete, last = content.split(b"\n")
        checked = f'"{CHECKSUM}": "'.encode() in content
        for number, line in enumerate(complete, 1):
            if line.strip():
                yield number, line, as_row(line, checked)
        if (row := as_row(last, checked)) is not None:
            yield len(complete) + 1, last, row

    def newest(self, event: str) -> dict[str, Any] | None:
        """Return the last row of an event, read cheaply from the end of the file, or None."""
        if not self.metrics_file.exists():
            return None
        with self.metrics_file.open("rb") as file:
            size, read = file.seek(0, os.SEEK_END), NEWEST
            while True:
                file.seek(max(0, size - read))
                lines = file.read(min(size, read)).split(b"\n")
                rows = map(as_row, reversed(lines))  # the first line may be cut off
                found = next((r for r in rows if r is not None and r["event"] == event), None)
                if found is not None or read >= size:
                    return found
                read *= 8  # many rows of train.observe may follow

    def count(self) -> int:
        """Return the number of rows, without parsing them."""
        return self.metrics_file.read_bytes().count(b"\n") if self.metrics_file.exists() else 0

    def rewind(self, step: int, written: int | None = None) -> None:
        """Drop the rows that a run resumed at `step` will write again.

        Damaged lines are moved to metrics.damaged, with a warning. Another warning says how many
        rows are missing of those `written` before the checkpoint of `step`, if that is known.
        """
        read = list(self._lines())
        if damaged := [line for _, line, row in read if row is None]:
            aside = self.metrics_file.with_suffix(".damaged")
            with open(aside, "ab", opener=no_links) as file:
                file.writelines(line + b"\n" for line in damaged)
            log.warning("%s: lines %s are damaged; moved to %s", self.metrics_file,
                        ", ".join(str(n) for n, _, row in read if row is None), aside)  # fmt: skip
        every = [row for _, _, row in read if row is not None]
        started = [r for r in every if r["step"] <= step and r["event"] not in LAST]
        rows = [r for r in started if r["event"] != "phase" or r["step"] < step]
        kept = sum(r["event"] != "checkpoint" or r["step"] < step for r in rows)
        if written is not None and kept < written:
            log.warning("%s: %d of %d rows up to step %d are missing", self.metrics_file,
                        written - kept, written, step)  # fmt: skip
        write_atomically(self.metrics_file, "".join(map(_line, rows)))

    def rows_after(self, step: int) -> str:
        """Return the lines that `rewind` drops for a run that continues after `step`."""
        every = [row for _, _, row in self._lines() if row is not None]
        return "".join(_line(r) for r in every if r["step"] > step or r["event"] in LAST)

    def append(self, name: str, entry: Mapping[str, Any]) -> None:
        """Append an entry to a JSON list of the run, such as env.json.

        A damaged file is moved to NAME.damaged, with a warning. Raises OSError.
        """
        file, entries = self.path / name, []
        if os.path.lexists(file):
            try:
                entries = read_json(file, list)
            except ValueError as error:
                aside = next(p for p in _asides(file) if not os.path.lexists(p))
                file.replace(aside)
                why = str(error).removeprefix(f"{name}: ")
                log.warning("%s: damaged (%s); moved to %s", file, why, aside)
        write_atomically(file, json.dumps([*entries, entry], indent=1) + "\n")


def is_comparison(path: Path) -> bool:
    """Return whether a directory is one that `compare` has written."""
    return (path / COMPARISON).is_file() and not RunDir(path).config_file.exists()


OTHER_FORMS = {"adapter_config.json": "an adapter", "model.gguf": "a model for llama.cpp"}
"""Forms of exports by a file in them."""


def refuse_known(path: Path) -> None:
    """Raise CheckpointError, saying what to give, for a directory that peptrain wrote and that is
    neither a run nor a model to read: of `compare`, or an export in a form of others."""
    if is_comparison(path):
        raise CheckpointError(
            f"{path}: is a comparison, not a run; give its runs, {quoted(path / 'runs')}/*, or one"
            " of them"
        )
    for name, what in OTHER_FORMS.items():
        if (path / name).is_file() and not (path / "config.json").exists():
            raise CheckpointError(
                f"{path}: contains {what} ({name}), which peptrain writes and does not read; give"
                " the run, or its export in another form"
            )


def _instead(path: Path) -> str:
    """Return what to give in place of a path that is no run, "" if it is nothing known."""
    if path.is_file():
        return "; it is a file"
    if (path / "state.json").is_file():
        return f"; it is a checkpoint: give the run, {quoted(path.parent.parent)}"
    if (path.parent / "config.toml").is_file() and (path.parent / "checkpoints").is_dir():
        return f"; it is a part of a run: give {quoted(path.parent)}"
    if (path / "config.json").is_file():
        return "; it is a Hugging Face model (config.json): give the run that it was exported from"
    if (path / "index.json").is_file():
        return "; it is a prepared corpus (index.json): give a run that was trained on it"
    return ""


def _asides(file: Path) -> Iterator[Path]:
    yield file.with_suffix(".damaged")
    yield from (file.with_suffix(f".damaged-{n}") for n in count(2))


REQUIRED = {
    "step": ("loss",),
    "end": ("held_out_loss", "trainable", "state_bytes", "tokens_per_second"),
}
"""Values of rows that are read again, all of them numbers."""


def _line(row: Mapping[str, Any]) -> str:
    """Return the line of a row, with the checksum of the row without it."""
    text = json.dumps(row, allow_nan=False)
    return f'{text[:-1]}, "{CHECKSUM}": "{crc32(text.encode()):08x}"}}\n'


def as_row(line: bytes, checked: bool = False) -> dict[str, Any] | None:
    """Parse a line of metrics.jsonl. Return None if it is damaged.

    checked: whether it must have a checksum, as all rows of a file or, of 0.1.0, none have.
    """
    try:
        row = json.loads(line, parse_constant=_finite, parse_float=_finite)
        if not isinstance(row, dict) or not isinstance(event := row.get("event"), str):
            return None
        expected = row.pop(CHECKSUM, None)
        if (checked or expected) and not _line(row).endswith(f' "{expected}"}}\n'):
            return None
    except (ValueError, RecursionError):
        return None
    values = [row.get(key) for key in REQUIRED.get(event, ())]
    values += [row[key] for key in row if key == "lr" or key.startswith("lr_")]
    sound = type(row.get("step")) is int and all(_is_number(v) for v in values)
    return row if sound and (event != "diverged" or type(row.get("error")) is str) else None


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not JSON")
    return number


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < LARGEST)


def first_free(parent: Path, stem: str) -> Path:
    """Create parent/stem-1, or the same with the next free number, and return its path.

    It is created so that no other process takes it. Raises CheckpointError if that fails.
    """
    for n in count(1):
        path = parent / f"{stem}-{n}"
        try:
            path.mkdir(parents=True)
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise _unwritable(path, error) from error
    return path


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"--run {path}: can't be written: {error.strerror}; choose another directory"
    )
