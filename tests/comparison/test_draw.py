"""The figures that compare writes beside its table."""

import logging
import sys
from pathlib import Path

import pytest
from support import write_grid
from test_compare import Fakes, fakes  # noqa: F401

from peptrain.comparison.compare import compare


def test_a_comparison_draws_beside_its_table_and_again_when_it_is_resumed(
    fakes: Fakes,
    corpus: Path,
    tmp_path: Path,
    drawn: None,
) -> None:
    fakes.does = {("full", 1e-3, 0): 3.5, ("full", 2e-3, 1): "killed"}
    out = tmp_path / "out"
    compare(write_grid(tmp_path, corpus), out, workers=4)
    figures = out / "figures"
    names = {path.name for path in figures.iterdir()}
    assert names == {f"{n}.{s}" for n in ("rates", "frontier", "loss") for s in ("svg", "csv")}
    before = (figures / "rates.csv").read_text()
    fakes.does = {}
    compare(write_grid(tmp_path, corpus), out, workers=4)
    after = (figures / "rates.csv").read_text()
    assert "3.5" in before and before != after and after.count("one seed") == 4


def test_without_matplotlib_it_says_so_in_one_line_and_goes_on(
    fakes: Fakes, corpus: Path, tmp_path: Path, drawn: None,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level(logging.WARNING, "peptrain"):
        made = compare(write_grid(tmp_path, corpus), tmp_path / "out", workers=4)
    assert made.lines[0].loss == 3.0 and (tmp_path / "out" / "table.md").is_file()
    (line,) = [m for m in caplog.messages if "figures" in m]
    assert line.endswith("install it with: pip install 'peptrain[report]'")
    assert not (tmp_path / "out" / "figures").exists()
