"""What a command prints when it fails, and its exit code. No other place catches every error."""

from __future__ import annotations

import errno
import os
import re
import traceback
from pathlib import Path

from peptrain.display.console import make, say, stderr
from peptrain.display.terminal import Console
from peptrain.errors import Interrupted, PeptrainError
from peptrain.text import escaped, one_line

NO_MEMORY = re.compile(
    "out of memory|can't allocate memory|size calculation overflow|multiplication overflow"
    "|ALLOC_FAILED",
    re.IGNORECASE,
)
"""In messages of PyTorch, whose allocators mostly raise RuntimeError."""

REPAIRS = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EROFS: "choose another place, since this one is read-only",
    errno.ENAMETOOLONG: "give a shorter name",
}
"""What to do about an error of the operating system that no other place expects."""


def report(error: BaseException, console: Console, *, debug: bool) -> int:
    """Print one line about what ended a command, and return the exit code.

    debug: print the traceback first. A stopped command is reported on `console`, errors on stderr.
    """
    if debug:
        stderr.write(escaped("".join(traceback.format_exception(error))))
    if isinstance(error, Interrupted):
        say(one_line(str(error)), to=console, style="yellow")
        return error.code
    if isinstance(error, BrokenPipeError):  # as of `--help | head`: nobody reads
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python tells of it at its end
        return 1
    if isinstance(error, KeyboardInterrupt):
        say("stopped", to=console, style="yellow")
        return 130
    say(one_line(_message(error)), to=make(stderr), lead="error: ", style="bold red")
    return 1


def _message(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        repair = REPAIRS.get(error.errno or 0)
        return f"{error.filename}: {error.strerror}{f'; {repair}' if repair else ''}"
    if isinstance(error, PeptrainError | OSError):
        return str(error)
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and NO_MEMORY.search(str(error))
    ):
        size = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        return (
            f"out of memory{f': tried to allocate {size[1]}' if size else ''}; lower"
            " --train.micro-batch, --train.seq-len or the model's sizes, or --batch-size of eval;"
            " `peptrain estimate METHOD --gpu-memory 24GiB` prints what fits"
        )
    said = f"{type(error).__name__}: {error}".removesuffix(": ")
    return (
        f"peptrain hit a bug: {said}{_place(error)}; please report it to the project's issue"
        " tracker with the output of the same command and --debug"
    )


def _place(error: BaseException) -> str:
    """Return the last line of peptrain that the error passed through, in brackets."""
    ours = Path(__file__).parents[1]
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f for f in frames if Path(f.filename).is_relative_to(ours)]
    if not lines:
        return ""
    return f" ({Path(lines[-1].filename).relative_to(ours.parent)}:{lines[-1].lineno})"
