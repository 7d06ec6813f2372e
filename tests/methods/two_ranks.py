"""Run by torchrun from test_laws.py: train methods on two ranks, keep every rank's weights;
then go on with the runs named resume-* that lie in OUT.

python -m torch.distributed.run --standalone --nproc_per_node 2 two_ranks.py CORPUS OUT METHOD...
"""

import os
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from support import SPREAD, Toy, tiny

import peptrain.training.loop as trainer
from peptrain.errors import CheckpointError


def main(corpus: Path, out: Path, names: list[str]) -> None:
    rank, evaluate = os.environ["RANK"], trainer._evaluate
    for name in names:
        method = Toy() if name == Toy.name else name

        def keeping(train_state: Any, *rest: Any, name: str = name, **named: Any) -> Any:
            weights = {n: p.detach().contiguous() for n, p in train_state.model.named_parameters()}
            save_file(weights, out / f"{name}-rank{rank}.safetensors")
            return evaluate(train_state, *rest, **named)

        trainer._evaluate = keeping
        trainer.train(tiny(method, corpus, out / name, train=SPREAD))
    trainer._evaluate = evaluate
    for run in sorted(out.glob("resume-*")):
        trainer.resume(run)
    try:
        trainer.train(tiny("full", corpus, out / "full", train=SPREAD))
    except CheckpointError as error:  # found by rank 0, and no other rank waits for it
        (out / f"refused-rank{rank}").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
