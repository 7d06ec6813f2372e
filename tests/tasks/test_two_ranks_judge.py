"""Two ranks share the items of a task."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import rows
from task_rows import write_data

from peptrain.distributed.world import World
from peptrain.tasks.score import scores
from peptrain.tasks.spans import Span

SCRIPT = Path(__file__).with_name("two_ranks.py")


@pytest.mark.slow
def test_two_ranks_are_one(corpus: Path, tmp_path: Path, importable: None) -> None:
    data = write_data(tmp_path / "data")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for name, launcher in (("one", []), ("two", torchrun)):
        line = [sys.executable, *launcher, SCRIPT, corpus, tmp_path / name, data]
        subprocess.run(list(map(str, line)), check=True, timeout=900)
    names = ("blimp_acc", "piqa_acc", "piqa_acc_norm", "wikitext_byte_perplexity")
    for event in ("eval", "end"):
        [one], [two] = rows(tmp_path / "one", event), rows(tmp_path / "two", event)
        assert {k: one[k] for k in names} == pytest.approx({k: two[k] for k in names}, rel=1e-9)


def test_ranks_score_the_batches_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit: the batches are the same, and each rank takes some of them."""
    from test_tasks import Model

    given = [Span(tuple(range(n, n + 2 + n % 7)), 1 + n % 2) for n in range(23)]
    whole = scores(Model(), given, tokens=20)  # type: ignore[arg-type]
    parts: list[dict[int, object]] = []
    monkeypatch.setattr(World, "gather", lambda self, found: parts.append(dict(found)) or parts)
    for rank in range(3):
        world = World(rank, 3, torch.device("cpu"))
        try:
            found = scores(Model(), given, tokens=20, world=world)  # type: ignore[arg-type]
        except KeyError:  # the ranks after this one are missing
            assert rank < 2
    assert sorted(n for part in parts for n in part) == list(range(23))
    assert found == whole
