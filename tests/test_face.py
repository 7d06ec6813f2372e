"""What `import peptrain` offers: lazily, exactly, and whatever else was imported before."""

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import peptrain
from peptrain.methods import METHODS

NAMES = {"train", "resume", "adapt", "estimate", "compare", "evaluate", "export", "generate"}
NAMES |= {"plot", "report", "load_factorised", "Corpus", "RunConfig", "TrainConfig", "TuneConfig"}
NAMES |= {"ModelConfig", "OptimConfig", "ScheduleConfig", "DataConfig", "EvalConfig", "METHODS"}
CLASSES = {cls.__name__ for cls in METHODS.values()}
SOME = {"LORO"}
"""For the default run, where a test below uses the functions."""
LATER = {"analyze", "tune"}
"""Functions of commands to come, whose names no room may take."""


def python(code: str) -> str:
    """What a new process prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:peptrain", "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def modules() -> list[str]:
    found = pkgutil.walk_packages([str(Path(peptrain.__file__).parent)], "peptrain.")
    return [module.name for module in found if module.name != "peptrain.__main__"]


def test_importing_it_imports_nothing_heavy() -> None:
    """Counted in modules, since a clock would measure the machine: a few of the standard library,
    where torch alone is two thousand. Its rooms are not what imports them."""
    code = """
import sys
before = {*sys.modules}
import peptrain
print(len({*sys.modules} - before) < 60, sorted({"torch", "numpy", "rich"} & {*sys.modules}))
assert not hasattr(peptrain, "nothing") and "torch" not in sys.modules
"""
    assert python(code) == "True []"


def test_what_is_offered_is_exact() -> None:
    assert set(peptrain.__all__) == NAMES | CLASSES
    assert set(peptrain.__all__) <= set(dir(peptrain))
    assert "__version__" in dir(peptrain)
    for name in ("nothing", "Nothing", "log", "entry_points"):
        with pytest.raises(AttributeError, match=f"module 'peptrain' has no attribute '{name}'"):
            getattr(peptrain, name)
    python("from peptrain import *; train, METHODS, LORO")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in SOME else [pytest.mark.slow])
        for name in sorted(NAMES | CLASSES)
    ],
)
def test_a_name_is_there_in_a_new_process_twice(name: str) -> None:
    code = f"import peptrain; a = peptrain.{name}; assert a is peptrain.{name}; print(type(a))"
    said = python(code)
    kind = "dict" if name == "METHODS" else "type" if name[0].isupper() else "function"
    assert said == f"<class '{kind}'>"


def test_no_module_stands_in_the_place_of_a_name() -> None:
    """Once imported, a module is an attribute of the package that holds it."""
    code = f"""
import importlib, types, peptrain
for module in {modules()!r}:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as missing:
        assert missing.name.split(".")[0] != "peptrain", missing
    for name in {sorted(NAMES | CLASSES)!r}:
        assert not isinstance(getattr(peptrain, name), types.ModuleType), (module, name)
print("done")
"""
    assert python(code) == "done"
    top = {name.split(".")[1] for name in modules()}
    assert top.isdisjoint(NAMES | LATER)


def test_a_run_from_the_face(corpus: Path, tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
import peptrain as pt
from peptrain.sections import DataConfig

folder = Path({str(tmp_path)!r})
short = pt.TrainConfig(steps=2, batch_size=2, seq_len=16, device="cpu")
data = DataConfig(path=Path({str(corpus)!r}))
config = pt.RunConfig(method=pt.LORO(rank=4), train=short, data=data, run=folder / "run")
print(pt.train(config).run.name, pt.estimate(config).tokens, pt.Corpus.open(data.path).vocab_size)
print(pt.evaluate(config.run).loss > 0, pt.export(config.run, folder / "out").name)
"""
    assert python(code).splitlines()[-2:] == ["run 64 300", "True out"]
