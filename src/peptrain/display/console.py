"""The console that everything is printed on, and what happens when nobody can read it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import TextIO

import rich.console
from rich.table import Table
from rich.text import Text

from peptrain.display.terminal import NARROWEST, Console
from peptrain.distributed.launch import speaks
from peptrain.text import escaped, one_line


class Display(io.TextIOBase):
    """Standard output or error, until a write fails. Then what follows is discarded.

    A closed pipe (`| head -1`), a full disk or a terminal that hung up must not end a training. The
    loss of standard output is reported once, on standard error.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.lost: OSError | None = None

    @property
    def _stream(self) -> TextIO | None:
        stream = getattr(sys, self._name)  # tests and rich replace it
        found: TextIO | None = getattr(stream, "rich_proxied_file", stream)
        return found

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        if self._stream is None:
            raise OSError(f"{self._name} is closed")
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write `text` unless an earlier write failed."""
        if self._stream is not None and self.lost is None:
            try:
                return self._stream.write(text)
            except OSError as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Flush, also when Python has buffered what was printed by other libraries."""
        if self._stream is not None and self.lost is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._lose(error)

    def reopen(self) -> None:
        """Begin a command. Where the descriptor is closed, open it to /dev/null.

        Otherwise the next file that is opened, such as metrics.jsonl, would get its number.
        Characters that the stream's encoding lacks are written escaped.
        """
        self.lost = None
        if isinstance(self._stream, io.TextIOWrapper):
            self._stream.reconfigure(errors="backslashreplace")
        if getattr(sys, self._name) is None:
            setattr(sys, self._name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
            self._lose(OSError("closed"))

    def _lose(self, error: OSError) -> None:
        self.lost = error
        with contextlib.suppress(OSError, ValueError):  # ValueError: not a file, as in a notebook
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())  # so that what is buffered does not fail at exit
            os.close(nowhere)
        if self is stdout:
            stderr.write(
                f"standard output can't be written ({error.strerror or error}); the command"
                " continues without it\n"
            )
            stderr.flush()


stdout, stderr = Display("stdout"), Display("stderr")


@contextlib.contextmanager
def may_be_lost() -> Iterator[None]:
    """Let a command begin with working outputs and end without an error of what is buffered."""
    stdout.reopen()
    stderr.reopen()
    try:
        yield
    finally:
        stdout.flush()


def make(display: Display, *, quiet: bool = False, width: int | None = None) -> Console:
    """Return a console on `display`.

    In a notebook it is no terminal: what `!peptrain` prints there goes through a terminal of
    Jupyter's, and what Python prints would become HTML.
    """
    plain = False if "JPY_PARENT_PID" in os.environ else None
    return Console(
        file=display,  # type: ignore[arg-type]
        emoji=False,
        quiet=quiet,
        width=width,
        force_terminal=plain,
        force_jupyter=False,
    )


console = make(stdout, quiet=not speaks())
"""Only rank 0 prints. Errors are printed by every rank, to stderr."""


def say(
    text: str, *, to: rich.console.Console | None = None, lead: str = "", style: str = ""
) -> None:
    """Print sentences, in lines that end between words on a terminal, and unbroken elsewhere.

    A command in backticks is never broken, nor is a path, so both can be copied. lead: what comes
    before the text, in `style`.
    """
    on = console if to is None else to
    text = lead + escaped(text)
    if on.is_terminal:
        text = "\n".join(wrapped(line, on.width) for line in text.split("\n"))
    shown = Text(text)
    shown.stylize(style, 0, len(lead) or None)
    on.print(shown, soft_wrap=True)


def wrapped(line: str, width: int, whole: str = "`[^`]+`") -> str:
    """Break `line` between words, but not within what the pattern `whole` matches."""
    held = re.sub(whole, lambda found: found[0].replace(" ", "\0"), line)
    lines = textwrap.wrap(held, width, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ")


def print_wide(table: Table) -> None:
    """Print at the terminal's width; in a file or a pipe keep each row on one line."""
    (console if console.is_terminal else make(stdout, width=160)).print(table)


def silence_libraries() -> None:
    """Silence progress bars and notices of the Hugging Face libraries."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def widen() -> None:
    """Let libraries that print see at least `NARROWEST` columns. tyro never ends below 8."""
    if shutil.get_terminal_size().columns < NARROWEST:
        os.environ["COLUMNS"] = str(NARROWEST)


class LogHandler(logging.Handler):
    """Print each message of a log on `console`, as one line where that is no terminal."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Print the message of `record` after its level."""
        warns = record.levelno >= logging.WARNING
        lead, style = f"{record.levelname} ", "yellow" if warns else "blue"
        say(one_line(record.getMessage()), to=self.console, lead=lead, style=style)


def log_on(console: Console) -> None:
    """Print peptrain's log on `console`."""
    log = logging.getLogger("peptrain")
    log.handlers[:] = [LogHandler(console)]
    log.setLevel(logging.INFO)
