"""Replicas: the same training as in one process, on any number, with work that is divided."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from replicas import CASES, OPTIM, TRAIN
from safetensors.torch import load_file
from support import tiny, tiny_method

from peptrain.distributed.owners import owners, sharers, sharing
from peptrain.errors import ConfigError
from peptrain.testing import MODEL, close, losses, newest
from peptrain.training.loop import resume, train

EXACT = [case for case in CASES if not case.endswith("bf16")]


def trained(size: int, corpus: Path, out: Path, cases: list[str]) -> Path:
    run = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={size}",
    ]
    done = subprocess.run(
        [*run, str(Path(__file__).with_name("replicas.py")), str(corpus), str(out), *cases],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def three(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(3, corpus, tmp_path_factory.mktemp("three"), list(CASES))


@pytest.mark.slow
@pytest.mark.parametrize("case", EXACT)
def test_three_ranks_are_one_process(case: str, three: Path, corpus: Path, tmp_path: Path) -> None:
    """With a merge, an exact step or a new subspace at three steps, shared out among the ranks."""
    weights = [load_file(three / f"{case}-rank{rank}.safetensors") for rank in range(3)]
    assert all(torch.equal(weights[0][n], other[n]) for other in weights for n in other)
    name, method, settings = CASES[case]
    sections = {"train": TRAIN | settings, "optim": OPTIM.get(case, {})}
    train(tiny(tiny_method(name, **method), corpus, tmp_path / "alone", **sections))
    for n, weight in newest(tmp_path / "alone").model.items():
        close(weight, weights[0][n], 1e-12)
    assert losses(three / case) == [
        (step, pytest.approx(loss, abs=1e-12)) for step, loss in losses(tmp_path / "alone")
    ]


@pytest.mark.slow
def test_a_step_exchanges_gradients_once(three: Path) -> None:
    for rank in range(3):
        for case in EXACT:
            calls = (three / f"{case}-calls{rank}").read_text().split()
            assert calls == ["torch.float64"] * TRAIN["steps"]


@pytest.mark.slow
def test_gradients_are_summed_in_another_dtype_where_it_is_wanted(three: Path) -> None:
    """bf16 keeps 3 digits, and the replicas equal."""
    calls = (three / "full-bf16-calls0").read_text().split()
    assert calls == ["torch.bfloat16"] * TRAIN["steps"]
    exact, rounded = (newest(three / case).model for case in ("full", "full-bf16"))
    change = max(float((exact[n] - rounded[n]).abs().max()) for n in exact)
    assert 1e-9 < change < 1e-2
    weights = [load_file(three / f"full-bf16-rank{rank}.safetensors") for rank in range(3)]
    assert all(torch.equal(weights[0][n], other[n]) for other in weights for n in other)


@pytest.mark.slow
def test_gradients_of_different_parameters_are_never_added(three: Path) -> None:
    """Where a router leaves some without a gradient. All ranks end, and none waits."""
    for rank in range(3):
        sent, *said = (three / f"refused-{rank}").read_text().splitlines()
        assert sent == "[1.0, 1.0, 1.0]"
        first, later = said
        assert first.startswith("one: has a gradient on rank 0 or on rank 1, but not on both; ")
        assert later.startswith("other: has a gradient in some steps only; several processes need")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="for two GPUs")
@pytest.mark.parametrize("name", ["full", "bpt", "relora", "loro"])
def test_two_gpus_with_graphs_are_one(name: str, corpus: Path, tmp_path: Path) -> None:
    """Two micro-batches a step on two GPUs, four on one, which records another graph."""
    train_settings = {"compile": True, "cuda_graph": True, "precision": "fp32", "micro_batch": 1}
    given = {"batch_size": 4, "seq_len": 16, "steps": 8, "log_every": 1, "eval_every": 0}
    flags = [f"--data.path={corpus}", "--optim.eps=0.1", "--schedule.kind=constant"]
    sections = {"train": given | train_settings, "model": MODEL}
    flags += [
        f"--{section}.{key.replace('_', '-')}={value}"
        for section, values in sections.items()
        for key, value in values.items()
    ]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    for size in (1, 2):
        line = [*run, f"--nproc-per-node={size}", "-m", "--", "peptrain", "train", name, *flags]
        line += [] if name == "full" else ["--method.rank=4"]
        subprocess.run([*line, f"--run={tmp_path / str(size)}"], check=True, timeout=300)
    for (_, one), (_, two) in zip(losses(tmp_path / "1"), losses(tmp_path / "2"), strict=True):
        assert one == pytest.approx(two, abs=1e-4)


@pytest.mark.slow
def test_any_parameter_is_sent_and_one_that_is_trained_later_is_refused(three: Path) -> None:
    """Columns of a larger matrix, a scalar, an empty one, and a dtype that gloo does not know."""
    for rank in range(3):
        sent, beside, later, sparse = (three / f"odd-{rank}").read_text().splitlines()
        columns = [[0.0, 1.0], [4.0, 5.0], [8.0, 9.0]]
        assert sent == str([columns, 11.0, [], [0, 1, 2, 3]])
        own = torch.arange(12.0).view(3, 4)[:, 2:] * (1 - rank)
        assert beside == str(own.tolist()), "what lies beside the columns is another's"
        assert later.startswith("lookup.weight: has a gradient in some steps only; several")
        assert sparse.startswith("lookup.weight: has a sparse gradient, which several processes")


# Work that is divided.


def test_alone_a_process_owns_everything_and_sends_nothing() -> None:
    made = owners([3.0, 1.0])
    assert (sharers(), made.own) == (1, [0, 1])
    made.send_([[torch.ones(1)], []])


def test_owners_have_equal_loads_and_every_rank_knows_them() -> None:
    costs = [8.0, 1.0, 7.0, 2.0, 6.0, 3.0]
    shares = []
    for rank in range(3):
        with sharing(rank, 3):
            made = owners(costs)
            shares.append(made.own)
            assert sharers() == 3 and all(made.owns(i) for i in made.own)
    assert sorted(i for share in shares for i in share) == list(range(6))
    assert [sum(costs[i] for i in share) for share in shares] == [9.0, 9.0, 9.0]
    assert sharers() == 1


def test_more_processes_than_work_leave_some_without_any() -> None:
    found = []
    for rank in range(4):
        with sharing(rank, 4):
            found.append(owners([1.0, 1.0]).own)
    assert found == [[0], [1], [], []]


# train.parallel.


def test_a_parallel_that_does_not_fit_the_processes_is_refused(
    corpus: Path, tmp_path: Path
) -> None:
    config = tiny("full", corpus, tmp_path / "run", train={"parallel": "ddp"})
    wanted = r"train\.parallel: must be none with 1 process, or unset \(got 'ddp'\)"
    with pytest.raises(ConfigError, match=wanted):
        train(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("parallel", ["none", "ddp"])
def test_a_resume_uses_what_fits_and_says_so(
    parallel: str, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a training on several processes, whose config.toml says ddp."""
    run = tmp_path / "run"
    train(tiny("full", corpus, run, train={"steps": 2, "parallel": "none"}))
    file = run / "config.toml"
    assert 'parallel = "none"' in file.read_text()
    file.write_text(file.read_text().replace('parallel = "none"', f'parallel = "{parallel}"'))
    resume(run)
    said = "train.parallel: must be none with 1 process, or unset (got 'ddp'); what fits is used"
    assert (said in caplog.text) == (parallel == "ddp")
