"""Run by torchrun from test_ranks.py: train on two ranks, and twice let something happen to rank 1.

python -m torch.distributed.run --standalone --nproc_per_node 2 two_ranks.py CORPUS OUT
"""

import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from support import tiny
from task_rows import write_data

import peptrain.training.begin as trainer_begin
import peptrain.training.loop as trainer
import peptrain.training.state as trainer_state
from peptrain import __version__
from peptrain.errors import PeptrainError
from peptrain.runs import checkpoint
from peptrain.sections import EvalConfig

AT = 5
OTHERWISE: dict[str, dict[str, Any]] = {"longer": {"steps": 9}, "seeded": {"seed": 1}}
SPOILED = {"missing": None, "damaged": "[]", "shorter": ""}
"""What rank 1 has in place of the first line of a task's file; None: no file."""
KEPT = {"checkpoint_every": 2, "micro_batch": 1}


def told(file: Path, config: Any, **given: Any) -> None:
    """Train, and write the error that ends it to `file`."""
    try:
        trainer.train(config, **given)
    except PeptrainError as error:
        file.write_text(f"{type(error).__name__}: {error}")


def refused(directory: Path) -> None:
    raise AssertionError(f"rank 1 chose a checkpoint in {directory} by itself")


def main(corpus: Path, out: Path) -> None:
    rank, advance = int(os.environ["RANK"]), trainer.advance
    # Of torchrun, once rank 1 is dead. Rank 0 is to write what it saw itself.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def struck(state: Any, *rest: Any) -> Any:
        done = advance(state, *rest)
        if rank == 1 and state.step == AT:
            if (out / f"differs-rank{rank}").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            weight = dict(state.model.named_parameters())["model.layers.1.mlp.up_proj.weight"]
            weight.data[3, 1] += 0.5
        return done

    for case, differs in OTHERWISE.items():
        told(out / f"{case}-rank{rank}",
             tiny("full", corpus, out / case, train=differs if rank else {}))  # fmt: skip
    for case, line in SPOILED.items():
        file = write_data(out / f"{case}-data{rank}", times=2) / "piqa" / "validation.jsonl"
        if rank and line is None:
            file.unlink()
        elif rank:
            file.write_text("\n".join([line or "", *file.read_text().splitlines()[1:]]))
        asked = EvalConfig(tasks="boolq,piqa", tasks_data=file.parents[1])
        config = tiny("full", corpus, out / case, train={"seq_len": 64})
        told(out / f"{case}-rank{rank}", replace(config, eval=asked))
    told(out / f"no-corpus-rank{rank}",
         tiny("full", out / "nowhere" if rank else corpus, out / "no-corpus"))  # fmt: skip
    if rank:
        trainer_state.__version__ = "0.0.1"
    told(out / f"versions-rank{rank}", tiny("full", corpus, out / "versions"))
    trainer_state.__version__ = __version__
    trainer_begin.APPEARS = 0.2
    if rank:  # rank 0 picks the checkpoint
        checkpoint.latest = refused
    for case in ("elsewhere", "begun-elsewhere"):
        local = out / f"{case}-machine{rank}"
        local.mkdir()
        os.chdir(local)  # as a path that is another directory on each machine
        if rank == 0 and case == "begun-elsewhere":
            shutil.copytree(out / "elsewhere-machine0" / "run", local / "run")
        told(out / f"{case}-rank{rank}", tiny("full", corpus, Path("run")), go_on=True)
    begun = tiny(
        "loro", corpus, out / "extended", train={**KEPT, "steps": 5, "log_to": "tensorboard"}
    )
    trainer.train(begun)
    trainer.resume(out / "extended", steps=8)
    trainer.train(replace(begun, run=out / "branch", continue_from=out / "extended@8",
                          train=replace(begun.train, steps=10)))  # fmt: skip
    trainer.advance = struck
    for case in ("differs", "killed"):
        told(out / f"{case}-rank{rank}", tiny("full", corpus, out / case, train=KEPT))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
