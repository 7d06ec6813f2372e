"""Fine-tuning by the recipes, of small models on made-up rows of each task."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import rows
from tuned import sentence

import peptrain.cli.training
from peptrain import recipes
from peptrain.cli.app import main
from peptrain.training.loop import train
from peptrain.tuning.tasks import TASKS

NAMES = [name for name in recipes.names() if recipes.about(name).tunes]
RUNS = [(name, task) for name in NAMES for task in recipes.about(name).results.by_task()]
FIRST = [
    ("loro-roberta-base-r4", "cola"), ("loro-roberta-base-r8", "mnli"),
    ("relora-t5-base-full", "mrpc"), ("relora-t5-base-lora", "sst2"),
    ("relora-t5-base-relora", "stsb"), ("relora-t5-large-relora", "qqp"),
    ("relora-t5-large-qnli-every-1000", "qnli"), ("relora-350m-glue-fresh", "rte"),
]  # fmt: skip
"""Each task and each kind of recipe once; the others are slow."""


@pytest.fixture(scope="module")
def every_task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight rows of every task for each of its splits."""
    folder, draw = tmp_path_factory.mktemp("tasks"), random.Random(0)
    for name, task in TASKS.items():
        (folder / name).mkdir()
        made = [
            {column: sentence(draw) for column in task.texts}
            | {"label": n % len(task.labels) if task.labels else n % 5 + 0.4}
            for n in range(8)
        ]
        for split in (*task.train, *(split for (split,) in task.validation.values())):
            text = "".join(json.dumps(row) + "\n" for row in made)
            (folder / name / f"{split}.jsonl").write_text(text)
    return folder


@pytest.fixture
def starts(encoder: Path, t5: Path, decoder: Path) -> dict[str, Path]:
    """What stands for RoBERTa, for T5 and for the pre-trained LLaMA."""
    return {"loro-roberta": encoder, "relora-t5": t5, "relora-350m": decoder}


FEW: dict[str, Any] = {"rank": 2, "merge_every": 2, "exact_every": 2, "restart_warmup": 1}


@pytest.mark.parametrize(
    "name, task",
    [run if run in FIRST else pytest.param(*run, marks=pytest.mark.slow) for run in RUNS],
)
def test_a_recipe_fine_tunes_a_smaller_model(
    name: str, task: str, every_task: Path, starts: dict[str, Path], tmp_path: Path
) -> None:
    """All of its settings but the lengths, in its own precision."""
    config = recipes.load(name, task)
    (start,) = (path for prefix, path in starts.items() if name.startswith(prefix))
    fewer = {key: value for key, value in FEW.items() if getattr(config.method, key, None)}
    train(
        replace(
            config,
            method=replace(config.method, **fewer),
            schedule=replace(config.schedule, warmup=min(1, config.schedule.warmup or 0)),
            train=replace(config.train, batch_size=2, seq_len=24, log_every=1, device="cpu"),
            tune=replace(config.tune, epochs=1, tasks_data=every_task),
            init_from=start,
            run=tmp_path / "run",
        )
    )
    (end,) = rows(tmp_path / "run", "end")
    assert end["step"] == 4 and 0 <= end["held_out_loss"] < 50
    assert TASKS[task].best_by in end
    steps = rows(tmp_path / "run")
    counted = {"loro": "exact_steps", "relora": "merges"}.get(config.method.name)
    assert counted is None or any(counted in row for row in steps)


def test_the_first_runs_have_every_task() -> None:
    assert {*FIRST} <= {*RUNS} and {task for _, task in FIRST} == {*TASKS}


# --- the command


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The settings with which the command would have trained."""
    found: list[Any] = []
    monkeypatch.setattr(peptrain.cli.training, "watched", lambda training: training(None))
    monkeypatch.setattr(
        "peptrain.training.loop.train", lambda config, *_, **_k: found.append(config)
    )
    return found


def test_the_task_of_the_command_chooses_the_recipes_settings(
    asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, flags = "loro-roberta-base-r8", ["--tasks-data", "x", "--init-from", "y"]
    (tmp_path / "file.toml").write_text(recipes.text(name))
    file = str(tmp_path / "file.toml")
    for source in (["--recipe", name], ["loro", f"--recipe={name}"], ["--config", file]):
        assert main(["tune", *source, "--task", "qnli", *flags]) == 0
    assert "the source reports 92.75 %" in capsys.readouterr().out
    assert main(["tune", "--recipe", name, "--tune.task=cola", "--epochs", "2", *flags]) == 0
    wanted = recipes.load(name, "qnli")
    for config in asked[:3]:
        tune = replace(wanted.tune, tasks_data=Path("x"))
        assert config == replace(wanted, tune=tune, init_from=Path("y"))
    cola = asked[3]
    assert (cola.tune.task, cola.tune.epochs, cola.method.exact_every) == ("cola", 2, 20)


@pytest.mark.parametrize(
    "line, message",
    [
        ("tune --recipe loro-roberta-base-r8", "tune.task: must be one of cola, stsb, mrpc,"),
        ("tune --recipe loro-roberta-base-r8 --task x", "for which there are settings (got 'x')"),
        ("tune --recipe loro-60m-loro --task cola",
         "--recipe loro-60m-loro: pre-trains a model; give it to `peptrain train --recipe"
         " loro-60m-loro`"),
        ("train --recipe relora-t5-base-full",
         "--recipe relora-t5-base-full: fine-tunes a model; give it to `peptrain tune --recipe"
         " relora-t5-base-full --init-from DIR --task TASK --tasks-data DIR`"),
        ("estimate --recipe relora-t5-base-full", "relora-t5-base-full: fine-tunes a model"),
    ],
)  # fmt: skip
def test_a_recipe_for_something_else_is_refused(
    line: str, message: str, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line.split()) == 1 and not asked
    assert message in " ".join(capsys.readouterr().err.split())
