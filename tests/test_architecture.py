"""A file imports from its own level or a lower one, and a few promises that a search can check."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import peptrain
from peptrain.methods import METHODS

ROOT = Path(peptrain.__file__).parent
FILES = {str(p.relative_to(ROOT)): p for p in sorted(ROOT.rglob("*.py"))}

LEVELS: list[tuple[str, ...]] = [
    ("errors.py", "ops/*.py"),
    ("settings.py", "files.py", "rng.py", "optim.py", "schedule.py", "distributed.py", "rundir.py",
     "signals.py", "toml.py", "counting.py"),
    ("methods/*.py",),
    ("model.py", "execution.py", "loss.py", "padding.py", "recomputation.py", "stacking.py",
     "data/*.py", "checkpoint.py", "dense.py", "eval/__init__.py", "eval/perplexity.py"),
    ("config.py", "build.py", "journal.py"),
    ("adapt.py", "environment.py", "progress.py", "export.py", "initial.py", "control.py",
     "recipes/*.py", "report.py", "eval/run.py", "grid.py", "summary.py", "table.py",
     "workers.py"),
    ("passes.py", "trainee.py"),
    ("rehearsal.py", "candidate.py", "fit.py", "estimate.py", "estimate_table.py"),
    ("train.py",),
    ("timing.py",),
    ("budget.py",),
    ("compare.py", "testing.py"),
    ("flags.py",),
    ("cli.py",),
    ("__main__.py", "__init__.py"),
]  # fmt: skip
"""Lowest first. A new file needs a place here; what reads runs stands below the trainer."""
OF_DATA = ("errors.py", "settings.py", "files.py")
"""What data may import of the rest: it could be a package of its own."""


def level(file: str) -> int:
    found = [i for i, names in enumerate(LEVELS) if any(fnmatchcase(file, name) for name in names)]
    assert len(found) == 1, f"{file}: give it one level in LEVELS"
    return found[0]


def source(module: str) -> str | None:
    """The file of a dotted module of ours."""
    stem = "/".join(module.split(".")[1:])
    candidates = (f"{stem}.py", f"{stem}/__init__.py" if stem else "__init__.py")
    return next((c for c in candidates if c in FILES), None)


def imports(file: str) -> Iterator[str]:
    """The files of ours that `file` imports: lazily and for type checking too."""
    for node in ast.walk(ast.parse(FILES[file].read_text())):
        if isinstance(node, ast.Import):
            targets = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: write absolute imports"
            # The version is a string, and no import of what the package offers.
            named = [a.name for a in node.names if a.name != "__version__"]
            dotted = [f"{node.module}.{name}" for name in named]
            targets = [d if source(d) else str(node.module) for d in dotted]
        else:
            continue
        for target in targets:
            if target.split(".")[0] == "peptrain":
                found = source(target)
                assert found, f"{file}:{node.lineno}: {target} is no module"
                yield found


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_from_its_own_level_or_a_lower_one(file: str) -> None:
    if file == "__init__.py":
        return
    for other in imports(file):
        assert level(other) <= level(file), f"{file} imports {other}"
        if file.startswith("data/") and not other.startswith("data/"):
            assert other in OF_DATA, f"{file} imports {other}"


def test_every_place_in_the_levels_is_a_level_of_its_own() -> None:
    for file in FILES:
        level(file)


def test_the_levels_see_imports() -> None:
    assert {"methods/base.py", "trainee.py", "signals.py", "data/__init__.py"} <= set(
        imports("train.py")
    )


@pytest.mark.parametrize(
    "module, user", [("tyro", {"cli.py", "flags.py"}), ("argparse", {"flags.py"})]
)
def test_only_the_command_line_parses_arguments(module: str, user: set[str]) -> None:
    pattern = re.compile(rf"^\s*(import|from) {module}\b", re.MULTILINE)
    assert {f for f, path in FILES.items() if pattern.search(path.read_text())} <= user


def test_the_trainer_names_no_method() -> None:
    for file in ("train.py", "trainee.py", "build.py", "journal.py", "checkpoint.py", "dense.py"):
        text = FILES[file].read_text()
        for name, cls in METHODS.items():
            names = {cls.__name__} | ({name} if name != "full" else set())  # "in full" is English
            assert not [n for n in names if re.search(rf"\b{n}\b", text)], file


@pytest.mark.parametrize("file", FILES)
def test_a_file_has_at_most_400_lines(file: str) -> None:
    assert len(FILES[file].read_text().splitlines()) <= 400


DRAWS = {
    *("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "normal", "bernoulli"),
    *("multinomial", "normal_", "uniform_", "random_", "bernoulli_", "trunc_normal_"),
    *("kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_", "orthogonal_"),
}


@pytest.mark.parametrize("file", FILES)
def test_every_random_number_has_an_address(file: str) -> None:
    for node in ast.walk(ast.parse(FILES[file].read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            drawn = node.func.attr in DRAWS
            assert not drawn or "generator" in {k.arg for k in node.keywords}, (
                f"{file}:{node.lineno}: a draw from the global generator"
            )
            of = node.func.value
            of_random = isinstance(of, ast.Name) and of.id == "random"
            assert not of_random or node.func.attr == "Random", f"{file}:{node.lineno}"


HEAVY = ("transformers", "tyro", "tokenizers", "rich", "datasets", "pyarrow")


def test_importing_the_package_is_cheap() -> None:
    code = f"""
import sys
import peptrain
print([m for m in {HEAVY!r} if m in sys.modules])
import peptrain.config, peptrain.checkpoint, peptrain.build, peptrain.data
print([m for m in {HEAVY!r} if m in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["[]", "[]"]
