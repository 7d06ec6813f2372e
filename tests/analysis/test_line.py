"""The loss along the line between two models: its ends, its middle, and what has no line."""

import json
from pathlib import Path

import pytest
from support import tiny

from peptrain.analysis.line import losses_along, write_line
from peptrain.analysis.table import read_table
from peptrain.cli.app import main
from peptrain.errors import CheckpointError, ConfigError
from peptrain.eval.run import evaluate
from peptrain.testing import QWEN
from peptrain.training.loop import train


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, method, seed in (("full", "full", 0), ("loro", "loro", 0), ("again", "loro", 1)):
        settings = {"device": "cpu", "seed": seed, "precision": "fp32"}
        train(tiny(method, corpus, folder / name, train=settings))
    return folder


def test_the_ends_of_the_line_are_the_two_models(runs: Path) -> None:
    one, other = runs / "loro", runs / "full"
    points = losses_along(one, other, alphas=(0, 0.5, 1))
    assert [p.alpha for p in points] == [0, 0.5, 1]
    for point, run in ((points[0], one), (points[2], other)):
        assert point.loss == pytest.approx(evaluate(run).loss, rel=1e-5)
        assert point.tokens == evaluate(run).tokens
    back = losses_along(other, one, alphas=(0.5,))
    assert back[0].loss == pytest.approx(points[1].loss, rel=1e-6)
    assert points[1].loss not in (points[0].loss, points[2].loss)


def test_the_command_writes_the_line_between_two_seeds(runs: Path, tmp_path: Path) -> None:
    pair = [str(runs / name) for name in ("loro", "again")]
    limits = ["--tokens=40", "--device=cpu"]
    assert main(["analyze", *pair, "--line", f"--out={tmp_path}", *limits]) == 0
    found = read_table(tmp_path / "line.csv")
    assert [x["alpha"] for x in found] == pytest.approx([i / 10 for i in range(11)])
    assert {x["tokens"] for x in found} == {40}
    about = json.loads((tmp_path / "line.json").read_text())
    assert about["dtype"] == "float32"
    names = [f"{run}@8" for run in pair]
    assert [about["one"], about["other"]] == names and len(set(about["weights"])) == 2
    assert {(row["one"], row["other"]) for row in found} == {tuple(names)}


def test_a_line_is_not_overwritten_by_that_between_two_others(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peptrain.analysis.line.ALPHAS", (0, 1))
    one, other, third = (runs / name for name in ("loro", "again", "full"))
    table = write_line([one, other], tmp_path, tokens=40)
    written = table.read_bytes()
    with pytest.raises(ConfigError, match=r"--out .*: has the line between .*loro@8 and .*again@8,"
                       r" not between .*loro@8 and .*full@8; choose another"):  # fmt: skip
        write_line([one, third], tmp_path, tokens=40)
    assert table.read_bytes() == written
    write_line([one, other], tmp_path, tokens=80)
    assert {row["tokens"] for row in read_table(table)} == {80}


def test_a_limit_that_only_the_line_has_is_refused_without_it(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for tokens in ("40", "-1"):
        assert main(["analyze", str(runs / "full"), f"--tokens={tokens}"]) == 1
        said = f"error: --tokens: must be given with --line (got {tokens})\n"
        assert capsys.readouterr().err == said


def test_models_of_different_shapes_have_no_line(runs: Path, corpus: Path, tmp_path: Path) -> None:
    train(tiny("full", corpus, tmp_path / "other", train={"device": "cpu"}, model=QWEN))
    with pytest.raises(
        CheckpointError, match=r"other@8: has \[8, 16\] for .*k_proj, but .* \[16, 16\]"
    ):
        losses_along(runs / "full", tmp_path / "other")
    with pytest.raises(ConfigError, match="--line: must be given two runs"):
        write_line([runs / "full"], None)
