"""A file imports from its own level or a lower one, and a few promises that a search can check."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import peptrain
from peptrain.methods import METHODS

ROOT = Path(peptrain.__file__).parent
FILES = {str(p.relative_to(ROOT)): p for p in sorted(ROOT.rglob("*.py"))}

LEVELS = (
    "errors.py, files.py, rng.py, text.py",
    "settings",
    "distributed",
    "display",
    "ops",
    "models",
    "kernels",
    "optim",
    "methods",
    "data",
    "sections.py",
    "config.py",
    "loggers",
    "execution",
    "runs",
    "exporting",
    "eval",
    "analysis",
    "figures",
    "tasks",
    "generation",
    "tuning",
    "estimation",
    "training",
    "comparison",
    "reporting",
    "recipes",
    "adaptation.py, testing.py, hf.py",
    "cli",
    "__main__.py, __init__.py",
)
"""The rooms, lowest first: a file imports from its own room and from lower ones."""
OF_DATA = ("errors.py", "settings/fields.py", "files.py", "text.py", "settings/__init__.py")
"""What data may import of the rest: it could be a package of its own."""


def level(file: str) -> int:
    room = file.partition("/")[0]
    found = [i for i, rooms in enumerate(LEVELS) if room in rooms.split(", ")]
    assert len(found) == 1, f"{file}: give {room} one line in LEVELS"
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
def test_a_file_imports_from_its_own_room_or_a_lower_one(file: str) -> None:
    if file == "__init__.py":
        return
    for other in imports(file):
        assert level(other) <= level(file), f"{file} imports {other}"
        if file.startswith("data/") and not other.startswith("data/"):
            assert other in OF_DATA, f"{file} imports {other}"


def test_no_file_imports_itself_by_way_of_others() -> None:
    def visit(file: str, way: tuple[str, ...]) -> None:
        assert file not in way, " -> ".join([*way[way.index(file) :], file])
        if file not in done:
            for other in set(imports(file)):
                visit(other, (*way, file))
            done.add(file)

    done = {"__init__.py"}
    for file in FILES:
        visit(file, ())


def test_a_room_has_about_a_dozen_files() -> None:
    many = ("methods", "ops", "recipes")
    for folder in {path.parent for path in FILES.values()}:
        files = [path for path in folder.iterdir() if path.suffix == ".py"]
        assert len(files) <= 13 or folder.name in many, folder


def test_the_levels_see_imports() -> None:
    seen = {"methods/base.py", "training/state.py", "training/signals.py", "config.py"}
    assert seen <= set(imports("training/loop.py"))


TYRO = "app flags generating parsing reading training"


@pytest.mark.parametrize(
    "module, user",
    [
        ("tyro", {f"cli/{name}.py" for name in TYRO.split()}),
        ("argparse", {"cli/parsing.py"}),
    ],
)
def test_only_the_command_line_parses_arguments(module: str, user: set[str]) -> None:
    pattern = re.compile(rf"^\s*(import|from) {module}\b", re.MULTILINE)
    assert {f for f, path in FILES.items() if pattern.search(path.read_text())} <= user


def test_the_trainer_names_no_method() -> None:
    blind = ("loop", "state", "metrics", "signals")
    runs = ("runs/build.py", "runs/checkpoint.py", "models/dense.py")
    for file in (*(f"training/{name}.py" for name in blind), *runs):
        text = FILES[file].read_text()
        for name, cls in METHODS.items():
            names = {cls.__name__} | ({name} if name != "full" else set())  # "in full" is English
            assert not [n for n in names if re.search(rf"\b{n}\b", text)], file


@pytest.mark.parametrize("file", FILES)
def test_a_file_has_at_most_400_lines_and_a_function_60(file: str) -> None:
    text = FILES[file].read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{file}: {node.name}"


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


HEAVY = ("transformers", "tyro", "tokenizers", "rich", "datasets", "pyarrow",
         "tensorboard", "trackio", "wandb")  # fmt: skip


def test_importing_the_package_is_cheap() -> None:
    code = f"""
import sys
import peptrain
print([m for m in {HEAVY!r} if m in sys.modules])
import peptrain.config, peptrain.runs.checkpoint, peptrain.runs.build, peptrain.data
import peptrain.loggers.sending
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


def test_architecture_names_every_file_of_every_room() -> None:
    page = (ROOT.parents[1] / "ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)/` \| (.+?) \|", page, re.M))
    assert list(rows) == [room for room in LEVELS if not room.endswith(".py")]
    for room, cell in rows.items():
        named = set(re.findall(r"`(\w+)`", cell))
        files = {p.stem for p in (ROOT / room).glob("*.py")} - {"__init__"}
        assert named == files if room != "methods" else named < files, room
