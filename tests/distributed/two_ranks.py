"""Run by torchrun from test_ranks.py: train on two ranks, and twice let something happen to rank 1.

python -m torch.distributed.run --standalone --nproc_per_node 2 two_ranks.py CORPUS OUT
"""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from support import tiny

import peptrain.training.loop as trainer
from peptrain.errors import PeptrainError

AT = 5
OTHERWISE: dict[str, dict[str, Any]] = {"longer": {"steps": 9}, "seeded": {"seed": 1}}
KEPT = {"checkpoint_every": 2, "micro_batch": 1}


def main(corpus: Path, out: Path) -> None:
    rank, advance = int(os.environ["RANK"]), trainer.advance

    def struck(state: Any, *rest: Any) -> Any:
        done = advance(state, *rest)
        if rank == 1 and state.step == AT:
            if (out / f"differs-rank{rank}").exists():
                os.kill(os.getpid(), signal.SIGKILL)
            weight = dict(state.model.named_parameters())["model.layers.1.mlp.up_proj.weight"]
            weight.data[3, 1] += 0.5
        return done

    for case, differs in OTHERWISE.items():
        try:
            trainer.train(tiny("full", corpus, out / case, train=differs if rank else {}))
        except PeptrainError as error:
            (out / f"{case}-rank{rank}").write_text(f"{type(error).__name__}: {error}")
    begun = tiny(
        "loro", corpus, out / "extended", train={**KEPT, "steps": 5, "log_to": "tensorboard"}
    )
    trainer.train(begun)
    trainer.resume(out / "extended", steps=8)
    trainer.train(replace(begun, run=out / "branch", continue_from=out / "extended@8",
                          train=replace(begun.train, steps=10)))  # fmt: skip
    trainer.advance = struck
    for case in ("differs", "killed"):
        try:
            trainer.train(tiny("full", corpus, out / case, train=KEPT))
        except PeptrainError as error:
            (out / f"{case}-rank{rank}").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
