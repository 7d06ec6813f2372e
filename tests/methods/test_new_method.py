"""A method inside peptrain is one file and one line: shown on a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from peptrain.testing import MODEL, TRAIN

ROOT = Path(__file__).parents[2]
LINE = "from peptrain.methods.spectral import Spectral as Spectral\n"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with the method of docs/new-method.md: its file, and the line it needs."""
    root = tmp_path_factory.mktemp("copy")
    for name in ("src", "tests", "docs", "examples", "benchmarks"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ROOT.glob("*.*"):
        if file.is_file():
            shutil.copyfile(file, root / file.name)
    page = (ROOT / "docs" / "new-method.md").read_text(encoding="utf-8")
    source = re.search(r"^```python\n(# spectral\.py\n.*?)^```", page, re.M | re.S)
    assert source and LINE in page
    methods = root / "src" / "peptrain" / "methods"
    (methods / "spectral.py").write_text(source[1], encoding="utf-8")
    registry = (methods / "__init__.py").read_text(encoding="utf-8")
    last = max(m.end() for m in re.finditer(r"^from peptrain\.methods\..*\n", registry, re.M))
    (methods / "__init__.py").write_text(registry[:last] + LINE + registry[last:], "utf-8")
    return root


def run(copy: Path, *command: str) -> str:
    """What a command prints that sees the copy in the place of this repository."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy / "src")},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_laws_and_documentation_hold_with_it(copy: Path) -> None:
    names = ("methods/test_laws", "settings/test_config", "test_docs", "test_architecture")
    files = [f"tests/{name}.py" for name in names]
    chosen = "(spectral and not two_ranks) or page or architecture"
    said = run(copy, "pytest", "-n0", "-p", "no:cacheprovider", *files, "-k", chosen)
    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed[1]) > 100, said[-300:]


@pytest.mark.slow
def test_it_is_estimated_trained_exported_and_compared(
    copy: Path, corpus: Path, tmp_path: Path
) -> None:
    values = {f"model.{k}": v for k, v in MODEL.items()} | {
        f"train.{k}": v for k, v in TRAIN.items()
    }
    values |= {"data.path": corpus, "method.rank": 2}
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in values.items()]
    out, grid = tmp_path / "run", tmp_path / "grid.toml"
    assert "trainable" in run(copy, "peptrain", "estimate", "spectral", *flags)
    run(copy, "peptrain", "train", "spectral", *flags, f"--run={out}")
    assert "perplexity" in run(copy, "peptrain", "eval", str(out))
    run(copy, "peptrain", "export", str(out), f"--out={tmp_path / 'exported'}")
    base = [f'{k} = "{v}"' if k == "data.path" else f"{k} = {v}" for k, v in values.items()]
    grid.write_text("\n".join(["[base]", *base, "[[grid]]", 'method.name = "spectral"']))
    table = run(copy, "peptrain", "compare", str(grid), f"--out={tmp_path / 'table'}")
    assert re.search(r"^ spectral +\d", table, re.M)
