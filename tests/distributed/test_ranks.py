"""What happens to one of two ranks ends both, in one line, and costs no saved step."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import rows, tiny

from peptrain.testing import close, newest
from peptrain.training.loop import resume, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def out(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ranks")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*run, str(Path(__file__).with_name("two_ranks.py")), str(corpus), str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 1, done.stderr[-4000:]
    assert "[rank0]: Traceback" not in done.stderr
    return out


@pytest.mark.parametrize(
    "case, named", [("longer", "train.steps: 9 on rank 1, 8 on rank 0"),
                    ("seeded", "train.seed: 1 on rank 1, 0 on rank 0")]
)  # fmt: skip
def test_a_rank_with_other_settings_ends_all_before_anything_is_written(
    case: str, named: str, out: Path
) -> None:
    said = {(out / f"{case}-rank{rank}").read_text() for rank in (0, 1)}
    assert len(said) == 1 and said.pop().startswith(f"ConfigError: {named}; start")
    assert not (out / case).exists()


def test_ranks_with_other_versions_end_before_anything_is_written(out: Path) -> None:
    said = {(out / f"versions-rank{rank}").read_text() for rank in (0, 1)}
    [line] = said
    assert line.startswith("ConfigError: the version of peptrain: '0.0.1' on rank 1, '")
    assert not (out / "versions").exists()


@pytest.mark.parametrize(
    "case, named",
    [("elsewhere", "run: not the directory that rank 0 trains in"),
     ("begun-elsewhere", "run: not a run directory")],
)  # fmt: skip
def test_a_run_that_is_not_on_a_shared_file_system_ends_all(
    case: str, named: str, out: Path
) -> None:
    said = {(out / f"{case}-rank{rank}").read_text() for rank in (0, 1)}
    [line] = said
    assert line.startswith(f"CheckpointError: rank 1: {named}")


@pytest.mark.parametrize(
    "case, named",
    [
        ("missing", r"DataError: rank 1: .*missing-data1/piqa/validation.jsonl .* is missing"),
        ("damaged", r"DataError: rank 1: .*damaged-data1/piqa/validation.jsonl:1: a JSON list"),
        ("shorter", r"ConfigError: eval.tasks_data: items of piqa: '\w+' on rank 1, '\w+' on r"),
        ("no-corpus", r"DataError: rank 1: .*nowhere"),
    ],
)
def test_data_that_one_rank_lacks_end_all_before_anything_is_written(
    case: str, named: str, out: Path
) -> None:
    said = {(out / f"{case}-rank{rank}").read_text() for rank in (0, 1)}
    [line] = said
    assert re.match(named, line) and "\n" not in line
    assert not (out / case).exists()


def test_two_ranks_make_a_run_longer_and_branch_it(out: Path, corpus: Path) -> None:
    train(tiny("loro", corpus, out / "alone", train={"steps": 10}))
    assert newest(out / "extended").step == 8 and (out / "extended" / "ends" / "5").is_dir()
    assert [row["step"] for row in rows(out / "branch")][-1] == 10
    for name, weight in newest(out / "alone").model.items():
        close(weight, newest(out / "branch").model[name], 1e-8)
    assert len(list((out / "extended" / "tensorboard").iterdir())) == 2, (
        "of rank 0, trained and resumed"
    )


def test_a_replica_that_differs_is_named_on_every_rank_and_not_saved(out: Path) -> None:
    """Adam's first moment of it stays the same, since the gradients are."""
    for rank in (0, 1):
        said = (out / f"differs-rank{rank}").read_text()
        assert said.startswith("CheckpointError: step 6: the processes differ in 1 of ")
        assert "first in model.layers.1.mlp.up_proj.weight; the state of rank 0 was not" in said
        assert "step-00000004 (resume from it with `peptrain resume" in said
    assert newest(out / "differs").step == 4


def test_the_death_of_a_rank_is_one_line_of_the_other_and_the_run_goes_on(
    out: Path, corpus: Path
) -> None:
    assert not (out / "killed-rank1").exists()
    said = (out / "killed-rank0").read_text()
    assert said.startswith("PeptrainError: another process of this run ended or cannot be reached")
    assert "\n" not in said
    assert newest(out / "killed").step == 4
    train(tiny("full", corpus, out / "whole"))
    resume(out / "killed")
    whole, resumed = newest(out / "whole"), newest(out / "killed")
    for name, weight in whole.model.items():
        close(weight, resumed.model[name], 1e-8)
