"""The own scorer is the lm-evaluation-harness, on made-up items of every task."""

from pathlib import Path

import pytest
import torch
from support import tiny
from task_rows import write_data

from peptrain.exporting.export import export
from peptrain.tasks.harness import measure_by_harness
from peptrain.tasks.measure import measure
from peptrain.tasks.run import read_tasks
from peptrain.tasks.subject import open_subject
from peptrain.tasks.table import TASKS
from peptrain.training.loop import train


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run", "directory"])
def test_the_scorer_is_the_harness(
    kind: str, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'peptrain[eval]'")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    write_data(tmp_path / "data", times=3)
    train(tiny("lowrank", corpus, tmp_path / "run", train={"seq_len": 64}))
    if kind == "directory":
        export(tmp_path / "run", tmp_path / "directory")
    subject = open_subject(tmp_path / kind)
    assert subject.model.dtype == torch.float64
    judge = subject.judge(torch.device("cpu"), positions=48)  # shorter than some items
    for one in read_tasks(list(TASKS.values()), tmp_path / "data"):
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
