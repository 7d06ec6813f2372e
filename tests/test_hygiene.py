"""What must hold of the repository as it lies there."""

import ast
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import peptrain

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "peptrain").rglob("*.py"))
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def requirements() -> Iterator[Requirement]:
    for line in [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]:
        if not line.startswith("peptrain["):
            yield Requirement(line)


def walked(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("requirement", list(requirements()), ids=lambda r: r.name)
def test_every_requirement_has_a_lower_and_an_upper_bound(requirement: Requirement) -> None:
    operators = {specifier.operator for specifier in requirement.specifier}
    assert operators == {"=="} or operators == {">=", "<"}, requirement


def test_the_extras_of_extras_exist() -> None:
    for line in (line for extra in EXTRAS.values() for line in extra):
        requirement = Requirement(line)
        if requirement.name == "peptrain":
            assert requirement.extras <= EXTRAS.keys()


def test_the_constraints_are_within_the_bounds() -> None:
    pinned = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            pinned[name] = Version(version)
    for requirement in requirements():
        if requirement.name in pinned:
            assert requirement.specifier.contains(pinned[requirement.name]), requirement
    assert {Requirement(line).name for line in PROJECT["dependencies"]} <= pinned.keys()


def test_the_version_is_in_the_package_and_the_changelog() -> None:
    assert "version" in PROJECT["dynamic"]
    release = Version(peptrain.__version__).base_version
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(release)}\b", changelog, re.MULTILINE)
    for file in (PROJECT["readme"], *PROJECT["license-files"]):
        assert (ROOT / file).is_file()


def test_every_public_class_and_function_has_a_docstring() -> None:
    bare = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in SOURCES
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_")
        if not ast.get_docstring(node)
    ]
    assert bare == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT / "src")))
def test_a_source_file_says_what_it_is_for_prints_nothing_and_loads_no_code(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    for node in walked(path):
        place = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("print", "eval", "exec", "torch.load", "torch.save"), place
            trust = [k.value for k in node.keywords if k.arg == "trust_remote_code"]
            assert all(isinstance(v, ast.Constant) and v.value is False for v in trust), place
            loads = re.fullmatch(r"Auto\w+\.from_\w+|load", called) and path.name == "auto.py"
            assert trust or not loads, place
        elif isinstance(node, ast.Import | ast.ImportFrom):
            modules = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            assert not {m.split(".")[0] for m in modules} & {"pickle", "dill", "shelve"}, place
            auto = [name for name in modules if name.startswith("Auto")]
            assert not auto or path.name == "auto.py", place


def test_no_tracked_file_is_larger_than_1_mib() -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no git checkout")
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    files = [ROOT / name for name in done.stdout.decode().split("\0") if name]
    assert len(files) > 50
    assert [f.name for f in files if f.is_file() and f.stat().st_size > 2**20] == []
