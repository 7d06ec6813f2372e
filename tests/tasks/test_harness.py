"""The own scorer is the lm-evaluation-harness, on made-up items of every task that both measure."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from task_rows import ROWS, write_data
from torch import Tensor
from transformers import GenerationMixin

from peptrain.cli.app import main
from peptrain.exporting.export import export
from peptrain.models.auto import load_tokenizer
from peptrain.tasks.harness import measure_by_harness
from peptrain.tasks.measure import measure
from peptrain.tasks.run import read_tasks
from peptrain.tasks.subject import open_subject
from peptrain.tasks.table import SCORED, TASKS
from peptrain.training.loop import train

pytestmark = pytest.mark.slow
WANTED = "lm-eval is not installed: pip install 'peptrain[eval]'"


@pytest.mark.parametrize("kind", ["run", "directory"])
def test_the_scorer_is_the_harness(
    kind: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason=WANTED)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    write_data(tmp_path / "data", times=3)
    train(tiny("lowrank", corpus, tmp_path / "run", train={"seq_len": 64}))
    if kind == "directory":
        export(tmp_path / "run", tmp_path / "directory")
    subject = open_subject(tmp_path / kind)
    assert subject.model.dtype == torch.float64
    judge = subject.judge(torch.device("cpu"), positions=48)  # shorter than some items
    for one in read_tasks([TASKS[name] for name in SCORED], tmp_path / "data"):
        own = measure(judge, one.task, one.items)
        other = measure_by_harness(subject, judge, one.task, one.rows, one.items)
        for a, b in zip(own.rows, other.rows, strict=True):
            assert a["log_likelihoods"] == pytest.approx(b["log_likelihoods"], abs=1e-6)
            kept = {key: a[key] for key in ("correct", "correct_norm") if key in b}
            assert kept == {key: b[key] for key in kept}
        resampled = ("perplexity_stderr",)
        wanted = {k: v for k, v in other.values.items() if k not in resampled}
        assert {k: own.values[k] for k in wanted} == pytest.approx(wanted), one.task.name
        for name, values in other.groups.items():
            assert own.groups[name] == pytest.approx(values)


@pytest.fixture(scope="module")
def made(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up data, a run and its export."""
    pytest.importorskip("lm_eval", reason=WANTED)
    folder = tmp_path_factory.mktemp("generated")
    write_data(folder / "data")
    train(tiny("lowrank", corpus, folder / "run", train={"seq_len": 64}))
    export(folder / "run", folder / "directory")
    return folder


def judged(folder: Path, model: str, *given: str) -> int:
    asked = ("--tasks", "swde", "--tasks-data", str(folder / "data"), "--harness")
    return main(["eval", str(folder / model), *asked, *given])


def test_swde_is_kept_like_other_tasks(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The texts are the model's own, which end before the end of a line."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    assert judged(made, "run", "--positions", "160") == 0
    [entry] = json.loads((made / "run" / "eval.json").read_text())
    kept = [json.loads(x) for x in (made / "run" / "eval" / "swde.jsonl").read_text().splitlines()]
    assert [row["id"] for row in kept] == list(range(20)) and entry["scorer"] == "harness"
    for row, asked in zip(kept, ROWS["swde"], strict=True):
        assert row["correct"] == (asked["value"].strip() in row["generated"])
        assert "\n" not in row["generated"]
    assert any(row["generated"] for row in kept)
    assert entry["acc"] == sum(row["correct"] for row in kept) / 20 and "acc_stderr" in entry


@pytest.mark.parametrize(
    "said, acc",
    [("It is {0} in all\n", 1.0), ("of course 9{0}0", 1.0), ("none\n{0}", 0.0), ("{1}", 0.5)],
)
def test_a_model_scores_by_the_values_in_the_first_line_that_it_generates(
    said: str, acc: float, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it reads are the ends of the pages."""
    tokenizer = load_tokenizer(made / "directory")
    tokenizer.pad_token = tokenizer.eos_token

    def generate(self: Any, input_ids: Tensor, max_length: int, **given: Any) -> Tensor:
        assert input_ids.shape[1] + 48 == max_length <= 80
        ends = [re.search(r"f (\d+) in cm</dt>$", x) for x in tokenizer.batch_decode(input_ids)]
        values = [150 + int(end[1]) for end in ends if end]
        texts = [said.format(n, n if n % 2 else "none") for n in values]
        more = tokenizer(texts, padding="longest", padding_side="right", return_tensors="pt")
        return torch.cat([input_ids, more["input_ids"]], 1)

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    out = tmp_path / "out.json"
    assert judged(made, "directory", "--positions", "80", "--out", str(out)) == 0
    [entry] = json.loads(out.read_text())
    assert entry["acc"] == acc and entry["items"] == 20
    assert entry["acc_stderr"] == pytest.approx(math.sqrt(acc * (1 - acc) / 19))


def test_a_model_without_room_for_what_is_generated_is_told(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judged(made, "directory", "--positions", "48") == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "swde: generates 48 tokens, but the model reads only 48 positions" in said
