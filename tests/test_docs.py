"""What the documentation says is run: its commands, its Python and its TOML.

A bash line that ends in `# long` is parsed and not run, and so are the commands of blocks without
a language, whose inputs aren't here.
"""

import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import peptrain.cli
import peptrain.compare
import peptrain.data
from peptrain.cli import main
from peptrain.config import parse, resolved
from peptrain.data import PrepareConfig, embedded

ROOT = Path(__file__).parents[1]
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCS]
every_file = pytest.mark.parametrize("name", NAMES)
RUN = {"bash", "sh", "python", "toml"}


@dataclass(frozen=True)
class Block:
    """A fenced block, or one command of it."""

    place: str
    language: str
    text: str


def blocks(name: str) -> Iterator[Block]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    start, language = 0, ""
    for number, line in enumerate(lines, start=1):
        if not line.lstrip().startswith("```"):
            continue
        if start:
            yield Block(f"{name}:{start}", language, "\n".join(lines[start : number - 1]))
            start = 0
        else:
            start, language = number, line.strip().removeprefix("```")
    assert not start, f"{name}:{start}: a block that doesn't end"


def commands(block: Block) -> list[str]:
    """Its shell lines, those that end in a backslash joined with the next."""
    joined = block.text.replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip()]


def code(line: str) -> int:
    """The exit code of one `peptrain ...` line, its comment left out."""
    program, *arguments = shlex.split(line, comments=True)
    assert program == "peptrain"
    try:
        return main(arguments)
    except SystemExit as left:
        assert isinstance(left.code, int)
        return left.code


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the documents, and a small text as the default corpus."""
    monkeypatch.setenv("PEPTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embedded, "_sotu_texts", list)
    monkeypatch.setattr(embedded, "_source_roots", lambda: [Path(json.__file__).parent])
    work = tmp_path / "work"
    for name in NAMES:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, work / name)
    monkeypatch.chdir(work)
    return work


@every_file
def test_the_blocks_of_a_file_run_in_order(name: str, elsewhere: Path) -> None:
    for block in blocks(name):
        if block.language in ("bash", "sh"):
            for line in commands(block):
                if line.startswith("peptrain ") and not line.endswith("# long"):
                    assert code(line) == 0, f"{block.place}: {line}"
        elif block.language == "python":
            exec(compile(block.text, block.place, "exec"), {"__name__": "__main__"})
        elif block.language == "toml":
            resolved(parse(tomllib.loads(block.text)), world_size=1, on_gpu=False)


def only_parsed() -> list[tuple[str, str]]:
    """Commands that aren't run above, and where they stand."""
    found = []
    for name in NAMES:
        for block in blocks(name):
            for line in commands(block):
                whole = block.language in RUN and not line.endswith("# long")
                if line.startswith("peptrain ") and not whole:
                    found.append((block.place, line))
    for line in peptrain.compare.NEXT_STEPS.splitlines():
        if line.startswith("  peptrain "):
            found.append(("demo", re.split(r"\s{3,}", line.strip())[0]))
    return found


class Parsed(Exception):
    """Raised in the place of the work."""


@pytest.mark.parametrize("place, line", only_parsed())
def test_a_command_that_is_not_run_can_be_parsed(
    place: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*args: Any, **kwargs: Any) -> None:
        assert not args or not isinstance(args[0], PrepareConfig) or args[0].inputs
        raise Parsed

    for target in ("peptrain.cli._watched", "peptrain.data.prepare", "peptrain.export.export"):
        monkeypatch.setattr(target, work)
    if "--help" in line:
        assert code(line) == 0
    else:
        with pytest.raises(Parsed):
            code(line)


@every_file
def test_commands_in_the_text_exist(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert code("peptrain --help") == 0
    listed = re.search(r"\{([\w,]+)\}", capsys.readouterr().out)
    assert listed
    for words in re.findall(r"`peptrain (\w+)", (ROOT / name).read_text(encoding="utf-8")):
        assert words in listed[1].split(","), f"{name}: `peptrain {words}`"


@every_file
def test_relative_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            file = (ROOT / name).parent / target.partition("#")[0]
            assert file.exists(), f"{name}: {target}"


def test_the_extras_that_the_documents_install_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = set()
    for name in NAMES:
        text = (ROOT / name).read_text(encoding="utf-8")
        for extras in re.findall(r"(?:peptrain|-e\s+['\"]?\.)\[([\w,-]+)\]", text):
            named |= set(extras.split(","))
        for file in re.findall(r"-c\s+(\S+\.txt)", text):
            assert (ROOT / file).is_file(), f"{name}: {file}"
    assert named and named <= project["optional-dependencies"].keys()


def test_there_is_something_to_run() -> None:
    found = [block.language for block in blocks("README.md")]
    assert {"bash", "python", "toml"} <= set(found)
