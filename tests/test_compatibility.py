"""What commit d33fb5c computed, from before the modules were rearranged, we compute to the bit.

Both sides run here, since the last bits differ between machines: the old one from its own source,
in one other process and by the command line, whose flags and files are what has to stay.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest import approx
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import peptrain
from peptrain.cli.app import main
from peptrain.config import essence, load
from peptrain.eval.run import evaluate
from peptrain.exporting.export import export
from peptrain.exporting.factorised import load_factorised
from peptrain.testing import EVENT, MODEL, STEPS, TRAIN, same
from peptrain.training.loop import resume

pytestmark = pytest.mark.slow  # the old side is a process of its own
ROOT = Path(__file__).parents[1]
COMMIT = "d33fb5c4cbda3cb93a2b82565578a78d2f8b77c8"
IDS = torch.arange(32).view(2, 16) * 7 % 300
WARM = 2
"""Steps before ReLoRA's phase boundary."""

COMMON = {f"train.{key}": value for key, value in TRAIN.items()}
COMMON |= {"train.device": "cpu", "train.micro_batch": 2}
COMMON |= {"train.checkpoint_every": 1, "train.keep": 99}
COMMON |= {"schedule.kind": "cosine", "schedule.warmup": 2}
COMMON |= {"optim.clip": 0.5, "optim.weight_decay": 0.01}
SIZES = {f"model.{key}": value for key, value in MODEL.items()}
MERGING = SIZES | {"method.rank": 2, "method.merge_every": EVENT}


@dataclass(frozen=True)
class Case:
    """A run, what a row of its metrics counts, and the steps after which it is stopped."""

    method: str
    settings: Mapping[str, Any]
    counts: str | None = None
    stops: tuple[int, ...] = (EVENT, EVENT + 1)


CASES = {
    "full": Case("full", {"model.config": "config.json"}, stops=(EVENT + 1,)),
    "bpt": Case("bpt", MERGING, "merges"),
    "bpt-bf16": Case("bpt", MERGING | {"train.precision": "bf16"}, "merges"),  # rounds by chance
    "relora": Case(
        "relora",
        MERGING | {"method.warm_start_steps": WARM, "train.precision": "fp64"},
        "merges",
        stops=(WARM, EVENT + 2),
    ),
    "loro": Case("loro", SIZES | {"method.rank": 2, "method.exact_every": EVENT}, "exact_steps"),
}
STOPS = [(name, step) for name, case in CASES.items() for step in case.stops]
EXPORTS = [("bpt", "dense"), ("loro", "dense"), ("loro", "factorised")]
EVALUATED = ["bpt", "relora", "loro"]

OLD_SIDE = """
import json, runpy, sys
from importlib import import_module
import peptrain, torch
from safetensors.torch import save_file

print(peptrain.__file__, flush=True)
torch.set_num_threads(1)  # as conftest.py does on our side
given = json.loads(sys.argv[1])
for line in given["commands"]:  # each as `python -m peptrain` runs it
    sys.argv[1:] = line
    try:
        runpy.run_module("peptrain", run_name="__main__")
    except SystemExit as left:
        if left.code:
            sys.exit(f"{line}: exit code {left.code}")
# Relative, so that a search that renames our modules passes over this one: it is the old tree's.
model = import_module(".export", "peptrain").load_factorised(given["factorised"])
with torch.no_grad():
    save_file({"logits": model(torch.tensor(given["ids"])).logits}, given["logits"])
"""


@dataclass(frozen=True)
class Old:
    """What the old side left."""

    folder: Path
    corpus: Path

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def export(self, name: str, form: str) -> Path:
        return self.folder / form / name

    @property
    def logits(self) -> Path:
        """Of the factorised model, as the old side loads it."""
        return self.folder / "logits.safetensors"

    def training(self, name: str, run: Path) -> list[str]:
        """The command that trains a case."""
        settings = COMMON | CASES[name].settings | {"data.path": self.corpus, "run": run}
        if "model.config" in settings:
            settings["model.config"] = self.folder / settings["model.config"]
        flags = [(f"--{k.replace('_', '-')}", str(v)) for k, v in settings.items()]
        return ["train", CASES[name].method, *(part for flag in flags for part in flag)]

    def commands(self) -> list[list[str]]:
        """All that the old side does."""
        exports = [
            ["export", str(self.run(name)), "--out", str(self.export(name, form)), "--form", form]
            for name, form in EXPORTS
        ]
        evals = [["eval", str(self.run(name)), "--device", "cpu"] for name in EVALUATED]
        return [*(self.training(name, self.run(name)) for name in CASES), *exports, *evals]


@pytest.fixture(scope="module")
def old_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source of the commit; without the commit there is nothing to compare with."""
    why = f"nothing is compared with commit {COMMIT}: fetch the history (git fetch --unshallow)"
    if not shutil.which("git"):
        pytest.skip(f"{why} and install git")
    archive = ["git", "-C", str(ROOT), "archive", "--format=tar", COMMIT, "src"]
    made = subprocess.run(archive, capture_output=True)
    if made.returncode:
        pytest.skip(f"{why} in a clone; {made.stderr.decode(errors='replace').strip()}")
    folder = tmp_path_factory.mktemp("old-tree")
    with tarfile.open(fileobj=BytesIO(made.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder / "src"


@pytest.fixture(scope="module")
def old(old_tree: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Old:
    """The old side's runs, exports and evaluations, made by one process."""
    made = Old(tmp_path_factory.mktemp("old"), corpus)
    (made.folder / "config.json").write_text(json.dumps(with_dropout()))
    given = {"commands": made.commands(), "factorised": str(made.export("loro", "factorised"))}
    given |= {"ids": IDS.tolist(), "logits": str(made.logits)}
    done = subprocess.run(
        [sys.executable, "-c", OLD_SIDE, json.dumps(given)],
        env=os.environ | {"PYTHONPATH": str(old_tree)},
        cwd=made.folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert Path(done.stdout.splitlines()[0]).is_relative_to(old_tree)
    assert not Path(peptrain.__file__).is_relative_to(old_tree)
    return made


def with_dropout() -> dict[str, Any]:
    """A config.json of MODEL's sizes: dropout draws from the generator that each step reseeds."""
    return {
        "model_type": "llama",
        "attention_dropout": 0.2,
        "vocab_size": MODEL["vocab_size"],
        "hidden_size": MODEL["hidden_size"],
        "intermediate_size": MODEL["intermediate_size"],
        "num_hidden_layers": MODEL["layers"],
        "num_attention_heads": MODEL["heads"],
    }


def checkpoints(run: Path) -> list[Path]:
    """Oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def rows(run: Path, event: str) -> list[dict[str, Any]]:
    """Read without our code: the file's form is what has to stay."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["event"] == event]


def recorded(run: Path) -> dict[str, Any]:
    """The state of the last checkpoint and the rows of the metrics, the speeds left out."""
    state = json.loads((checkpoints(run)[-1] / "state.json").read_text())
    steps = [
        [row[key] for key in ("step", "loss", "lr", "grad_norm", "tokens")]
        for row in rows(run, "step")
    ]
    found = {key: state[key] for key in ("step", "phase", "end", "groups")}
    return found | {
        "steps": steps,
        "held out": [f"{r['held_out_loss']:.12g}" for r in rows(run, "end")],
    }


def differences(run: Path, other: Path) -> list[str]:
    """What is not the same in two finished runs, the weights and moments by their bytes."""
    ours, theirs = (checkpoints(path)[-1] for path in (run, other))
    files = ("model.safetensors", "optimizer.safetensors")
    found = [name for name in files if (ours / name).read_bytes() != (theirs / name).read_bytes()]
    a, b = recorded(run), recorded(other)
    return found + [key for key in a if a[key] != b[key]]


def stopped(run: Path, copy: Path, step: int) -> Path:
    """A copy of `run` as it stood when the checkpoint of `step` was its newest."""
    shutil.copytree(run, copy)
    for path in checkpoints(copy):
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)
    return copy


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("name", CASES)
def test_the_old_runs_did_what_is_to_be_kept(name: str, old: Old) -> None:
    run, case = old.run(name), CASES[name]
    assert [row["step"] for row in rows(run, "step")] == list(range(1, STEPS + 1))
    assert [int(path.name[5:]) for path in checkpoints(run)] == list(range(1, STEPS + 1))
    counted = [row["step"] for row in rows(run, "step") if case.counts in row]
    assert counted == ([EVENT, 2 * EVENT] if case.counts else [])
    assert [row["step"] for row in rows(run, "phase")] == ([WARM] if name == "relora" else [])


@pytest.mark.parametrize("name, step", STOPS)
def test_a_run_that_the_old_code_began_goes_on_to_the_same_bytes(
    name: str, step: int, old: Old, tmp_path: Path
) -> None:
    run = stopped(old.run(name), tmp_path / "run", step)
    assert checkpoints(run)[-1].name == f"step-{step:08d}"
    resume(run)
    assert differences(run, old.run(name)) == []


@pytest.mark.parametrize("name", CASES)
def test_a_run_from_the_start_comes_to_the_same_bytes(name: str, old: Old, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(old.training(name, run)) == 0
    assert differences(run, old.run(name)) == []
    written = (essence(load(run / "config.toml")), (old.run(name) / "config.toml").read_text())
    ours, theirs = (re.sub("eval_tokens = .*", "", text) for text in written)  # another default
    assert ours == theirs


@pytest.mark.parametrize("name", CASES)
def test_the_configuration_of_an_old_run_is_read_and_written_unchanged(name: str, old: Old) -> None:
    """But for settings added since, which have the value of that time."""
    file = old.run(name) / "config.toml"
    assert essence(load(file)) == file.read_text()


@pytest.mark.parametrize("name", [name for name, form in EXPORTS if form == "dense"])
def test_a_dense_export_has_the_same_files(name: str, old: Old, tmp_path: Path) -> None:
    theirs, ours = old.export(name, "dense"), export(old.run(name), tmp_path / "out")
    names = sorted(path.name for path in theirs.iterdir())
    assert sorted(path.name for path in ours.iterdir()) == sorted([*names, "README.md"])
    # The tokenizer's files now say that it adds nothing, and the weights how they were trained.
    said = ("tokenizer.json", "tokenizer_config.json", "model.safetensors")
    kept = [n for n in names if n not in said]
    assert [n for n in kept if (ours / n).read_bytes() != (theirs / n).read_bytes()] == []
    before, now = (json.loads((d / "tokenizer.json").read_bytes()) for d in (theirs, ours))
    assert now.pop("post_processor") in (None, before["post_processor"])
    assert now == {k: v for k, v in before.items() if k != "post_processor"}
    before, now = (json.loads((d / "tokenizer_config.json").read_bytes()) for d in (theirs, ours))
    assert now == before | {"add_bos_token": False, "add_eos_token": False}
    weights, before = load_file(ours / said[2]), load_file(theirs / said[2])
    assert weights.keys() == before.keys()
    assert all(torch.equal(weights[n], before[n]) for n in before)
    with safe_open(ours / said[2], "pt") as opened:
        assert opened.metadata().items() >= {"format": "pt", "method": name}.items()


@pytest.mark.parametrize("name", [name for name, form in EXPORTS if form == "dense"])
def test_a_dense_export_has_the_same_logits(name: str, old: Old, tmp_path: Path) -> None:
    folders = export(old.run(name), tmp_path / "out"), old.export(name, "dense")
    ours, theirs = (logits(AutoModelForCausalLM.from_pretrained(folder)) for folder in folders)
    assert same(ours, theirs)


def test_a_factorised_export_of_the_old_code_has_the_same_logits(old: Old, tmp_path: Path) -> None:
    wanted, theirs = (
        load_file(old.logits)["logits"],
        load_factorised(old.export("loro", "factorised")),
    )
    assert same(logits(theirs), wanted)
    theirs.save_pretrained(tmp_path / "saved")
    export(old.run("loro"), tmp_path / "out", "factorised")
    for folder in ("saved", "out"):
        assert same(logits(load_factorised(tmp_path / folder)), wanted)


@pytest.mark.parametrize("name", EVALUATED)
def test_an_old_run_is_evaluated_to_the_same_loss(name: str, old: Old, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(old.run(name), run)
    result, row = evaluate(run), json.loads((run / "eval.json").read_text())[0]
    assert (result.loss, result.tokens) == (approx(row["loss"], rel=1e-12), row["tokens"])
    again = json.loads((run / "eval.json").read_text())[1]
    numbers = {key: approx(row[key], rel=1e-12) for key in ("loss", "perplexity")}
    assert row["step"] == STEPS and again == {**row, **numbers}


def last_bit(run: Path, name: str) -> None:
    file = checkpoints(run)[-1] / name
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))


def without_clocks(run: Path) -> None:
    file = checkpoints(run)[-1] / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"groups": []}))


def without_a_row(run: Path) -> None:
    file = run / "metrics.jsonl"
    file.write_text(file.read_text().partition("\n")[2])


def another_end(run: Path) -> None:
    file = run / "metrics.jsonl"
    file.write_text(file.read_text().replace('"held_out_loss": ', '"held_out_loss": 1'))


SPOILS: dict[str, Callable[[Path], None]] = {
    "model.safetensors": lambda run: last_bit(run, "model.safetensors"),
    "optimizer.safetensors": lambda run: last_bit(run, "optimizer.safetensors"),
    "groups": without_clocks,
    "steps": without_a_row,
    "held out": another_end,
}


@pytest.mark.parametrize("what", SPOILS)
def test_the_comparison_sees_a_difference(what: str, old: Old, tmp_path: Path) -> None:
    run = stopped(old.run("loro"), tmp_path / "run", STEPS)
    assert differences(run, old.run("loro")) == []
    SPOILS[what](run)
    assert differences(run, old.run("loro")) == [what]
