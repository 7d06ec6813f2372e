"""Two processes of which one is killed, stopped or asked to stop, as the command's user sees it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from support import rows, untimed

from peptrain.testing import MODEL, differences, newest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("signals")]
SCRIPT = Path(__file__).with_name("struck.py")
LIMIT = 1800
"""Seconds that no case of these comes near to."""
TIMEOUT = 30
"""Seconds that a step may take until its rank ends, longer than a busy machine delays it."""


def arguments(corpus: Path, **train: object) -> list[str]:
    given: dict[str, object] = {"data.path": corpus, "method.rank": 2}
    given |= {f"model.{key}": value for key, value in MODEL.items()}
    given |= {"train.batch-size": 4, "train.seq-len": 16, "train.log-every": 1}
    given |= {"train.eval-every": 0, "train.device": "cpu"}
    given |= {f"train.{key.replace('_', '-')}": value for key, value in train.items()}
    flags = [f"--{key.replace('_', '-')}={value}" for key, value in given.items()]
    return ["train", "bpt", "--method.merge-every", "3", *flags]


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(map(os.path.abspath, sys.path))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | more


def test_a_run_killed_at_a_step_in_a_merge_and_in_a_save_becomes_the_uninterrupted_one(
    corpus: Path, tmp_path: Path
) -> None:
    """The processes of torchrun are restarted after each kill."""
    strikes = "1:step:2:SIGKILL 1:merge:6:SIGKILL 1:save:8:SIGKILL none"
    given = arguments(corpus, steps=10, checkpoint_every=2)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*line, "--max-restarts=3", "--", str(SCRIPT), str(tmp_path), strikes, *given],
        env=environment(), capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    begins = [line.split()[-1] for line in done.stdout.splitlines() if "in fp32 from step" in line]
    assert begins == ["4", "8"], "the first kill was before a checkpoint"
    first, second = ((tmp_path / f"codes-{rank}").read_text().split() for rank in (0, 1))
    assert first[-2:] == second == ["0", "0"]
    # torchrun may end rank 0 before it has found out by itself.
    assert "0" not in first[:-2] and len(first) <= 5
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert differences(newest(run), newest(whole)) == []
    assert untimed(run) == untimed(whole)
    assert [row["merges"] for row in rows(run) if "merges" in row] == [1, 2, 3]


@pytest.fixture
def ranks(corpus: Path, tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two ranks, struck by one signal after the other and started again.

    They meet at a store that is here all the time: a port that was found free and given to them
    might be taken until one of them listens there. They may arrive as late as a launcher's.
    """
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    meet = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    meet |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "SLURM_STEP_ID": "0"}
    strikes = "1:step:3:SIGUSR1 0:step:6:SIGTERM 1:step:9:SIGHUP 0:step:12:SIGINT 1:step:16:SIGSTOP"
    given = arguments(corpus, steps=40, checkpoint_every=0, timeout=TIMEOUT)
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(tmp_path), strikes, *given, "--go-on"],
            env=environment(**meet, RANK=str(rank)),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]
    yield started
    for process in started:
        process.kill()
        process.communicate()


def test_signals_save_within_two_steps_and_a_stopped_rank_ends_the_run(
    ranks: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Whichever rank is asked, with the exit codes of one process, and the same command goes on."""
    out, err = ranks[0].communicate(timeout=LIMIT)
    ended = time.time()
    assert ranks[0].returncode == 1, err
    assert f"error: waited {TIMEOUT} s for another process of this run, which stopped" in err
    last_row = (tmp_path / "run" / "metrics.jsonl").stat().st_mtime
    assert ended - last_row >= TIMEOUT
    assert ranks[1].poll() is None, "it is stopped"
    saved = [row["step"] for row in rows(tmp_path / "run", "checkpoint")]
    assert saved == [4, 7, 10, 13] == [int(line.split()[5]) for line in _stops(out)]
    for rank in (0, 1):
        codes = [int(line) for line in (tmp_path / f"codes-{rank}").read_text().splitlines()]
        assert codes == [os.EX_TEMPFAIL] * 3 + [128 + signal.SIGINT]


def _stops(out: str) -> list[str]:
    return [line for line in out.splitlines() if line.startswith("stopped and saved at step")]
