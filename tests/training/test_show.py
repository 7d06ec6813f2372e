"""Training from Python: the command's progress, observers, and the rows as a table."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support import rows, tiny

from peptrain.runs.directory import RunDir
from peptrain.training.loop import resume, train

EVERY_STEP = {"log_every": 1, "steps": 3, "eval_every": 0}


def test_show_prints_what_the_command_prints_beside_an_observer(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    seen: list[Mapping[str, Any]] = []
    train(tiny("full", corpus, run, train=EVERY_STEP), seen.append, show=True)
    said = capsys.readouterr()
    start, *steps = said.out.splitlines()
    assert start.startswith(
        f"full  {run}: 0.01M of 0.01M parameters trainable, 3 steps of 64 tokens"
    )
    assert [line.split("  loss")[0] for line in steps if " of 3  loss" in line] == [
        f"full  step {n} of 3" for n in (1, 2, 3)
    ]
    assert steps[-1].startswith("full  finished: held-out perplexity ") and not said.err
    assert [row["step"] for row in seen if row["event"] == "step"] == [1, 2, 3]
    resume(run, show=True)
    assert f"full  {run} is finished at step 3 of 3" in capsys.readouterr().out


def test_without_it_nothing_is_printed(
    corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = train(tiny("full", corpus, tmp_path / "run", train=EVERY_STEP))
    resume(result.run)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("pandas", [True, False])
def test_the_rows_are_a_table_where_pandas_is_installed(
    pandas: bool, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = train(tiny("full", corpus, tmp_path / "run", train=EVERY_STEP))
    if pandas:
        found = result.metrics()
        steps = found[found["event"] == "step"]
        assert steps["loss"].tolist() == [row["loss"] for row in rows(result.run)]
        assert len(found) == len(list(RunDir(result.run).metrics()))
    else:
        real = importlib.util.find_spec
        monkeypatch.setattr(
            "peptrain.training.result.find_spec", lambda n: None if n == "pandas" else real(n)
        )
        assert result.metrics() == list(RunDir(result.run).metrics())
