"""Test whether the fast forms reach the same losses as the plain forms, within seed noise.

    python benchmarks/fast_forms.py [ROW ...] [--steps 300] [--seeds 2] [--json FILE]

Each row is trained with every seed, plain (no kernels, compiler or CUDA graph) and fast. Training
uses the trainer, with merges and exact steps, on the default corpus unless --data is given.
"""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from common import announce, configured, device_of, free, model_of, parser, table, write

from peptrain.config import RunConfig
from peptrain.methods import methods
from peptrain.sections import DataConfig, TrainConfig
from peptrain.training.loop import train

ROWS = (
    "bpt:rank=128:optim.lr=1e-3",
    "relora:rank=128:optim.lr=1e-3",
    "loro:rank=128:optim.lr=1e-2",
)
HEADER = ("row", "plain, by seed", "fast", "difference of means", "largest gap of 10-step means:"
          " of forms, of seeds", "tokens/s, plain and fast")  # fmt: skip


def run(row: str, seed: int, fast: bool, args: Any, device: torch.device) -> dict[str, Any]:
    """Train one run; return its held-out loss, training losses and speed."""
    on_gpu = device.type == "cuda"
    vocabulary = {} if args.vocab_size is None else {"vocab_size": args.vocab_size}
    base = RunConfig(
        method=methods()["full"](),
        model=replace(model_of(args), **vocabulary),
        data=DataConfig(path=args.data),
        train=TrainConfig(
            steps=args.steps, batch_size=args.batch_size, micro_batch=args.batch_size,
            seq_len=args.seq_len, seed=seed, device=device.type, precision=args.precision,
            log_every=1, eval_every=0, checkpoint_every=0, keep=1, compile=fast,
            cuda_graph=fast and on_gpu, kernels="auto" if fast else "torch",
        ),
    )  # fmt: skip
    losses: list[float] = []

    def observe(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            losses.append(event["loss"])

    with tempfile.TemporaryDirectory() as directory:
        config = replace(configured(row, base, args.set, device=device), run=Path(directory) / "r")
        result = train(config, observe)
    free()
    speed = result.tokens_per_second
    return {"row": row, "seed": seed, "fast": fast, "held_out": result.held_out.loss,
            "losses": losses, "tokens_per_second": speed}  # fmt: skip


def gap(one: list[float], other: list[float]) -> float:
    """Return the largest difference between ten-step means of two runs."""
    means = [[statistics.mean(x[i : i + 10]) for i in range(0, len(x), 10)] for x in (one, other)]
    return max(abs(a - b) for a, b in zip(*means, strict=True))


def cells(plain: list[dict[str, Any]], fast: list[dict[str, Any]]) -> list[str]:
    """Format a table row from the runs of both forms, in the order of their seeds."""
    losses = [[found["held_out"] for found in form] for form in (plain, fast)]
    means = [statistics.mean(form) for form in losses]
    of_forms = [gap(a["losses"], b["losses"]) for a, b in zip(plain, fast, strict=True)]
    of_seeds = [gap(a["losses"], b["losses"]) for a, b in combinations(plain, 2)]
    speeds = [statistics.median(r["tokens_per_second"] for r in form) for form in (plain, fast)]
    return [
        plain[0]["row"],
        *(", ".join(f"{loss:.3f}" for loss in form) for form in losses),
        f"{means[1] - means[0]:+.3f}",
        f"{max(of_forms):.3f}, {max(of_seeds, default=0):.3f}",
        ", ".join(f"{speed:,.0f}" for speed in speeds),
    ]


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("rows", nargs="*", default=ROWS, metavar="ROW")
    made.add_argument("--steps", type=int, default=300)
    made.add_argument("--batch-size", type=int, default=64)
    made.add_argument("--seq-len", type=int, default=256)
    made.add_argument("--data", type=Path, help="prepared corpus (default: the embedded one)")
    made.add_argument("--seeds", type=int, default=2)
    made.add_argument("--vocab-size", type=int)
    made.set_defaults(preset="llama-60m")
    args = made.parse_intermixed_args(argv)
    device = device_of(args.device)
    announce(device, {"preset": args.preset, "precision": args.precision, "steps": args.steps,
                      "batch": f"{args.batch_size} x {args.seq_len}"})  # fmt: skip
    found, lines = [], []
    for row in args.rows:
        plain, fast = (
            [run(row, seed, form, args, device) for seed in range(args.seeds)]
            for form in (False, True)
        )
        found += plain + fast
        lines.append(cells(plain, fast))
        write(args, device, found)
    table(HEADER, lines)


if __name__ == "__main__":
    main()
