"""How a command fails: one line, and a traceback only with --debug."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import peptrain.cli.app
from peptrain.cli.app import main
from peptrain.errors import ConfigError

SMALLER = "; lower --train.micro-batch, --train.seq-len or the model's sizes"
MEMORY = "out of memory"
CPU = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes. Error"
CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 139 GiB"


def allocate() -> None:
    torch.empty(2**30, 2**30)


def recurse() -> None:
    recurse()


def raising(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    "cause, line",
    [
        (lambda: raising(KeyError("x")), "peptrain hit a bug: KeyError: 'x'"),
        (lambda: raising(AssertionError()), "peptrain hit a bug: AssertionError ("),
        (lambda: raising(RuntimeError("a\nb\x1b")), r"peptrain hit a bug: RuntimeError: a\nb\x1b"),
        (lambda: raising(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no")), "peptrain hit a bug"),
        (recurse, "peptrain hit a bug: RecursionError: maximum recursion depth exceeded"),
        (lambda: raising(RuntimeError(CPU)), f"{MEMORY}: tried to allocate 4096 bytes{SMALLER}"),
        (lambda: raising(torch.OutOfMemoryError(CUDA)), f"{MEMORY}: tried to allocate 20.00 GiB"),
        (lambda: raising(MemoryError()), f"out of memory{SMALLER}"),
        (allocate, f"out of memory: tried to allocate 4611686018427387904 bytes{SMALLER}"),
        (lambda: raising(OSError(28, "No space left", "x")), "x: No space left; free some space"),
        (lambda: raising(ConfigError("train.steps: no")), "train.steps: no"),
    ],
)  # fmt: skip
def test_every_error_is_one_line_and_debug_adds_the_traceback(
    cause: object, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peptrain.cli.app, "check_command", lambda args: cause())  # type: ignore[operator]
    assert main(["methods"]) == 1
    said = capsys.readouterr()
    assert not said.out and said.err.count("\n") == 1 and said.err.startswith(f"error: {line}")
    if "hit a bug" in line:
        assert "(peptrain/cli/app.py:" in said.err
        assert said.err.endswith("with the output of the same command and --debug\n")
    assert main(["--debug", "methods"]) == main(["methods", "--debug"]) == 1
    traced = capsys.readouterr().err
    assert traced.startswith("Traceback") and traced.count(said.err) == 2 and "\x1b" not in traced


def test_debug_alone_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--debug"]) == 0
    said = capsys.readouterr()
    assert main(["recipes"]) == 0 and capsys.readouterr() == said


def test_ctrl_c_is_not_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        peptrain.cli.app, "check_command", lambda args: raising(KeyboardInterrupt())
    )
    assert main(["methods"]) == 130
    assert capsys.readouterr() == ("stopped\n", "")


def test_a_working_directory_that_was_deleted_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before PyTorch is imported, which ends the process there."""
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(["methods"]) == 1
    said = "error: the working directory was deleted; change to one that exists with `cd`\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("line", [["\x1b[31mx"], ["--run"], ["--train.steps", "\x1b[2J"]])
def test_an_argument_that_is_not_understood_is_not_printed_raw(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["train", "full", *line, "\x9b1m"]
    if line == ["--run"]:
        args.append("--nonsense")
    assert main(args) == 1
    said = capsys.readouterr().err
    assert r"\x" in said and said.startswith("error: argument '\\x")
    assert "\x1b" not in said and "\x9b" not in said


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_utf_8_gets_what_it_can_show(encoding: str) -> None:
    env = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": os.pathsep.join(sys.path)}
    code = "import sys; from peptrain.cli.app import console; console.print('naïve → 漢')"
    code = code.replace("; console", "; from peptrain.cli.app import main; main(['x']); console")
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, timeout=900)
    shown = {"ascii": r"na\xefve \u2192 \u6f22", "latin-1": r"naïve \u2192 \u6f22"}[encoding]
    assert done.stdout.decode(encoding) == f"{shown}\n", done.stderr
    assert done.returncode == 0


def test_a_stream_that_can_not_be_changed_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["recipes", "loro-60m-loro"]) == 0 and out.getvalue().startswith("[recipe]")


def test_a_path_that_is_not_utf_8_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    for line in (["resume", odd], ["train", "full", "--data.path", odd], ["compare", odd, "--out",
                 "x"], ["train", "--config", odd]):  # fmt: skip
        assert main(line) == 1
        said = capsys.readouterr().err
        assert r"/\udcff" in said and said.count("\n") == 1 and "bug" not in said


def test_home_is_expanded_in_every_path_of_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for line in ("train full --data.path=~/x", "train full --init-from=~/x", "resume ~/x",
                 "train --config=~/x", "eval ~/x", "compare ~/x --out=y"):  # fmt: skip
        assert main(line.split()) == 1
        said = capsys.readouterr().err
        assert f"{tmp_path}/x" in said and said.count("\n") == 1
    assert main(["eval", "~nobody-at-all"]) == 1
    assert capsys.readouterr().err.startswith("error: path: ")


def test_an_unknown_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--tyro-print-completion", "ve"]) == 1
    wanted = "error: --tyro-print-completion: must be one of bash, zsh, fish (got 've')\n"
    assert capsys.readouterr().err == wanted


@pytest.mark.parametrize("given", ["", "n" * 256, "d/" * 2100, "~"])
@pytest.mark.parametrize(
    "args, flag",
    [(["eval", "A", "--data"], "--data"), (["export", "A", "--out="], "--out"), (["watch"], "path"),
     (["train", "full", "--run"], "--run"), (["train", "full", "--config"], "--config")],
)  # fmt: skip
def test_what_is_no_path_is_an_error_that_names_its_flag(
    args: list[str], flag: str, given: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(Path, "home", lambda: raising(RuntimeError("No home.")))
    monkeypatch.setattr(Path, "expanduser", lambda path: Path.home() if str(path) == "~" else path)
    *rest, last = args
    assert main([*rest, last + given] if last.endswith("=") else [*args, given]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {flag}: ") and said.count("\n") == 1
    assert len(said) < 600 and ".;" not in said
    assert said.strip().endswith((f"(got {given!r})", "give a shorter one", "the complete path"))


def test_help_that_nobody_reads_ends_without_a_word() -> None:
    line = f"{sys.executable} -m peptrain train cola --help | head -1"
    found = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
    assert found.stdout.startswith("usage") and found.stderr == ""
