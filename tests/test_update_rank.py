"""examples/update_rank.py on made-up images: the ranks, the files, and CIFAR-10's format."""

import csv
import runpy
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from byhand import seeded

SCRIPT = Path(__file__).parents[1] / "examples" / "update_rank.py"
SIDE, ROWS, STEPS = 8, 60, 4


@pytest.fixture
def example() -> dict[str, Any]:
    """Its functions, for a narrow MLP, a batch of one and the batch of the third panel."""
    found = runpy.run_path(str(SCRIPT))
    small = {"WIDTH": 24, "RANK": 2, "BATCHES": (1, 16), "MERGES": 2}
    found["measure"].__globals__.update(small, digits=made_up)
    return found


def made_up() -> tuple[torch.Tensor, ...]:
    draw = seeded(3)
    x = torch.rand(2 * ROWS, SIDE, generator=draw)
    y = torch.randint(10, (2 * ROWS,), generator=draw)
    return x[:ROWS], y[:ROWS], x[ROWS:], y[ROWS:]


def test_the_ranks_of_the_first_update_are_those_that_the_algebra_allows(
    example: dict[str, Any],
) -> None:
    rank = {
        (name, batch): example["measure"](made_up(), name, batch, 1)[0]["rank_0.001"]
        for name in ("sgd", "adam", "bpt", "relora")
        for batch in (1, 4)
    }
    assert rank["sgd", 1] == rank["adam", 1] == rank["relora", 1] == 1
    assert 1 < rank["sgd", 4] <= 4 < rank["adam", 4]
    assert rank["relora", 4] == 2 and rank["bpt", 1] > 10


def test_relora_gains_its_rank_at_each_merge(example: dict[str, Any]) -> None:
    rows = example["measure"](made_up(), "relora", 16, STEPS)
    ranks = [row["rank_0.001"] for row in rows]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert ranks[:2] == [2, 2] and 2 < ranks[-1] <= 4


def test_the_table_the_csv_and_the_panels_have_the_same_ranks(
    example: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ranks.csv"
    example["main"](["--steps", str(STEPS), "--out", str(out)])
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * (2 + STEPS)
    said = capsys.readouterr().out
    for row in rows:
        if row["step"] == str(STEPS):
            ends = f"-> {row['rank_0.01']:>3} | {row['rank_0.001']:>3}"
            line = next(s for s in said.splitlines() if f"{row['batch']:>3}  {row['method']}" in s)
            assert ends in line
    texts = {node.text for node in ElementTree.parse(tmp_path / "ranks.svg").iter()}
    assert {"rank of W_1 - W_0", "rank of W_T - W_0", "rank at batch 16", "relora"} <= texts


def test_cifars_files_are_read_as_bytes_of_a_class_and_its_pixels(
    example: dict[str, Any], tmp_path: Path
) -> None:
    for n, name in enumerate([*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]):
        image = bytes([n]) + bytes([255 - n]) * 3072
        (tmp_path / name).write_bytes(image * 2)
    x, y, test_x, test_y = example["cifar"](tmp_path)
    assert x.shape == (10, 3072) and test_x.shape == (2, 3072)
    assert y.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] and test_y.tolist() == [5, 5]
    assert x[2].unique().tolist() == [pytest.approx(254 / 255)]
