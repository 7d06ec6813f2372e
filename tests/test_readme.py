"""README's table and figure follow from docs/figures/readme.json."""

import importlib.util
import json
import re
import shlex
from pathlib import Path
from statistics import mean, stdev
from types import ModuleType
from typing import Any

import matplotlib
import pytest

from peptrain.cli.app import main
from peptrain.runs.directory import RunDir

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "docs" / "figures"
NUMBERS: dict[str, Any] = json.loads((FIGURES / "readme.json").read_text(encoding="utf-8"))
T_OF_3_SEEDS = 4.302653  # Student's t, 2 degrees of freedom, 97.5 %


def interval(values: list[float]) -> str:
    assert len(values) == 3
    return f"{mean(values):.3f} ± {T_OF_3_SEEDS * stdev(values) / 3**0.5:.3f}"


def rows(file: Path) -> dict[str, list[str]]:
    lines = re.findall(r"^\| (.+) \|$", file.read_text(encoding="utf-8"), re.MULTILINE)
    cells = [[cell.strip() for cell in line.split("|")] for line in lines]
    return {name.lower(): of for name, *of in cells}


@pytest.mark.parametrize("name", ["full", "bpt", "relora", "loro"])
def test_a_row_of_the_table_is_what_was_measured(name: str) -> None:
    run = NUMBERS["loss"][name]
    ends = [seed[-1] for seed in run["held_out_loss"]]
    full = [seed[-1] for seed in NUMBERS["loss"]["full"]["held_out_loss"]]
    differences = [a - b for a, b in zip(ends, full, strict=True)]
    trainable, total = (f"{run[key] / 1e6:.1f}M" for key in ("trainable", "parameters"))
    speeds = [f"{speed['over_full'][name]:.2f}" for speed in NUMBERS["speed"]]
    assert rows(ROOT / "README.md")[name] == [
        *(interval(ends), "" if name == "full" else interval(differences)),
        *(f"{trainable} / {total}", f"{run['state_bytes'] / 1e6:.0f} MB", *speeds),
        f"{NUMBERS['speed'][1]['held_gib'][name]:.1f} GiB",
    ]
    assert run["tokens"][-1] == 39_321_600


def test_the_page_of_the_figure_has_its_speeds_and_memory() -> None:
    table = [of for name, of in rows(FIGURES / "README.md").items() if "r =" in name]
    memory = re.findall(r"^\| memory held, GiB \| (.+) \|$", (FIGURES / "README.md").read_text(),
                        re.MULTILINE)  # fmt: skip
    assert len(table) == len(memory) == len(NUMBERS["speed"])
    for speed, shown, held in zip(NUMBERS["speed"], table, memory, strict=True):
        names = ("full", "bpt", "relora", "loro")
        assert shown[2:] == [f"{speed['over_full'][name]:.2f}" for name in names]
        assert [c.strip() for c in held.split("|")[2:]] == [
            f"{speed['held_gib'][n]:.1f}" for n in names
        ]


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_figure", FIGURES / "readme.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_figure_is_what_the_script_draws(
    theme: str, script: ModuleType, tmp_path: Path
) -> None:
    committed = (FIGURES / f"readme-{theme}.svg").read_text(encoding="utf-8")
    if f"Matplotlib v{matplotlib.__version__}," not in committed:
        pytest.skip("drawn by another version of matplotlib")
    script.draw(NUMBERS, theme, tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_text(encoding="utf-8") == committed


def test_the_numbers_are_collected_from_runs_and_benchmarks(
    script: ModuleType, tmp_path: Path
) -> None:
    for name in ("full", "bpt", "relora", "loro"):
        for seed in (0, 1):
            run = tmp_path / "runs" / f"{name}-seed={seed}"
            run.mkdir(parents=True)
            sizes = {"parameters": 9, "trainable": 5, "state_bytes": 40}
            events: list[dict[str, Any]] = [
                {"event": "step", "step": 2, "tokens": 64},
                {"event": "eval", "step": 2, "held_out_loss": 3.0 + seed},
                {"event": "end", "step": 4, "held_out_loss": 2.00004, **sizes},
            ]
            (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, events)))
    times = {"full": [4.0, 4.0, 100.0], "bpt": [2.0, 2.0, 2.0]}
    measured = [{"method": n, "ms": ms, "reserved_bytes": 3 << 29} for n, ms in times.items()]
    arguments = {"preset": "tiny", "precision": "bf16", "tokens": [8], "rows": ["bpt"]}
    speed = tmp_path / "speed.json"
    speed.write_text(json.dumps({"arguments": arguments, "rows": measured}))
    made = script.collect(tmp_path, speed)
    assert made["loss"]["bpt"] == {"tokens": [64, 128], "held_out_loss": [[3.0, 2.0], [4.0, 2.0]],
                                   **sizes}  # fmt: skip
    assert made["speed"] == [
        {**arguments, "over_full": {"full": 1.0, "bpt": 2.0}, "held_gib": {"full": 1.5, "bpt": 1.5}}
    ]


@pytest.mark.slow
def test_the_examples_train_longer_than_they_evaluate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^peptrain (train .*--run runs/first)$", text, re.M)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)) == 0
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    for run in (Path("runs/first"), Path("runs/relora-1")):
        found = list(RunDir(run).metrics())
        trained = max(row["tokens"] for row in found if row["event"] == "step")
        evaluated = sum(row.get("held_out_tokens", 0) for row in found)
        print(f"{run}: {trained:,} tokens trained, {evaluated:,} evaluated")
        assert trained > evaluated
