"""Names and texts of strangers on the terminal: nothing in them is obeyed."""

import io
import logging
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from peptrain.cli.app import main
from peptrain.display.console import log_on, say, widen
from peptrain.display.terminal import NARROWEST, Console
from peptrain.text import UNSAFE, escaped, one_line, quoted

BAD = "a\x1b[2Jb\x9b1mc\x85d\u202ee\udcfff\x1b]0;title\x1b\\"


@pytest.mark.parametrize("terminal", [True, False])
def test_control_characters_are_escaped_wherever_text_is_printed(terminal: bool) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=300, color_system=None)
    console.print(escape(BAD), highlight=False)
    console.print(BAD, markup=False, highlight=False, soft_wrap=True)
    console.print(Text(BAD))
    table = Table("name", box=None)
    table.add_row(Text(f"{BAD} \x1b[31m"))
    console.print(table)
    with Live(console=console, auto_refresh=False) as live:
        live.update(Text(BAD), refresh=True)
    before = logging.getLogger("peptrain").handlers[:]
    try:
        log_on(console)
        # Not the whole of it: a report of pytest can't have the bytes of a path in it.
        logging.getLogger("peptrain").warning("%s\nerror: forged", BAD.replace("\udcff", ""))
    finally:
        logging.getLogger("peptrain").handlers[:] = before
    said = out.getvalue()
    assert said.count(r"a\x1b[2Jb\x9b1mc\x85d\u202ee\udcfff\x1b]0;title\x1b") >= 4 + terminal
    assert "\x1b[2J" not in said and not UNSAFE.search(said.replace("\x1b", "").replace("\r", ""))
    assert r"\nerror: forged" in said
    assert terminal or "\x1b" not in said


def test_other_text_is_printed_as_it_is() -> None:
    text = "tab\tumlaut ä 漢字 👩‍🚀 [brackets] back\\slash\n"
    assert escaped(text) == text and one_line("a\nb") == r"a\nb"


def test_the_name_of_a_stranger_s_file_is_escaped_in_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "a\x1b[31m\nerror: b"
    assert main(["eval", str(odd)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and r"a\x1b[31m\nerror: b: not a run" in said


def test_a_name_that_is_not_utf_8_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", os.fsdecode(os.fsencode(tmp_path) + b"/\xff\x1b")]) == 1
    assert r"/\udcff\x1b: not a run" in capsys.readouterr().err


LONG = (
    "runs/a: the corpus is missing; make one with `peptrain data prepare TEXT --out data/c4`, or"
    f" train on /a/path/{'that-is-longer-than-a-line/' * 5} which is copied whole"
)


@pytest.mark.parametrize("width", [30, 80, 120])
def test_a_terminal_gets_lines_that_end_between_words_and_commands_whole(width: int) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, color_system=None)
    say(f"{LONG}\n\n  {LONG}", to=console, lead="error: ")
    first, empty, second = re.split(r"\n(?=\n)|\n(?=  )", out.getvalue())
    assert not empty.strip() and second.startswith("  runs/a: ")
    lines = first.splitlines()
    assert " ".join(lines) == f"error: {LONG}"
    assert all(len(line) <= width or " " not in line or "`" in line for line in lines)
    assert any("`peptrain data prepare TEXT --out data/c4`" in line for line in lines)
    assert len(lines) > 2


def test_a_pipe_gets_each_sentence_on_one_line() -> None:
    out = io.StringIO()
    say(f"{LONG}\nmore", to=Console(file=out, width=80), lead="error: ", style="bold red")
    assert out.getvalue() == f"error: {LONG}\nmore\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_a_log_message_has_its_level_and_breaks_between_words(terminal: bool) -> None:
    out, log = io.StringIO(), logging.getLogger("peptrain")
    before = log.handlers[:]
    try:
        log_on(Console(file=out, force_terminal=terminal, width=80, color_system=None))
        log.warning("%s", LONG)
        log.info("prepared")
    finally:
        log.handlers[:] = before
    *warning, info = out.getvalue().splitlines()
    assert (" ".join(warning), info) == (f"WARNING {LONG}", "INFO prepared")
    assert (len(warning) > 1) is terminal


@pytest.mark.parametrize("columns", ["0", "1", "5"])
def test_a_terminal_of_no_width_is_one_of_twenty_columns(
    columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system=None)
    assert console.width == NARROWEST
    say("one two three four five six", to=console)
    assert out.getvalue() == "one two three four\nfive six\n"
    widen()
    assert shutil.get_terminal_size().columns >= NARROWEST
    monkeypatch.setenv("COLUMNS", "33")
    widen()
    assert os.environ["COLUMNS"] == "33"


@pytest.mark.parametrize("name", ["a", "a b", "-dash", "it's", "$x", "new\nline", "\x1b[1mred",
                                  "\\'\t\x1b", "\N{PARTY POPPER}", "x\u2028y", "\x85a",
                                  "\udcff1", "a\U000e0001b"])  # fmt: skip
def test_a_path_in_a_command_that_is_printed_is_read_by_a_shell_as_it_is(
    name: str, tmp_path: Path
) -> None:
    text = quoted(name)
    assert not UNSAFE.search(text) and "\n" not in text
    (tmp_path / name).write_text("found")
    found = subprocess.run(
        ["bash", "-c", f"cat {text}"], cwd=tmp_path, capture_output=True, timeout=900, text=True,
        env=os.environ | {"LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    assert found.stdout == "found", found.stderr
