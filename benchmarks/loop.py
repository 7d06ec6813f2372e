"""What the trainer's loop costs: its tokens/s over those of the bare steps it takes.

    python benchmarks/loop.py [--preset tiny] [ROW ...] [--data CORPUS] [--json FILE]

`train` reads the corpus, journals, looks for signals and checks losses; the bare loop does forward,
backward, clipping and the optimizer's step on batches that lie on the device already. They take
turns; both rates are medians over stretches of --log-every steps.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import (
    announce,
    base_config,
    configured,
    described,
    device_of,
    free,
    model_of,
    parser,
    random_windows,
    spread,
    start,
    step,
    synchronize,
    table,
    write,
)

from peptrain.config import DataConfig, RunConfig
from peptrain.journal import throughput
from peptrain.methods.base import Method
from peptrain.rundir import RunDir
from peptrain.train import train

ROWS = ("full", "lora", "loro")
HEADER = ("row", "trainer, thousand tokens/s", "bare", "ratio")


def trainer_rates(config: RunConfig[Method]) -> list[float]:
    """Tokens/s of each row of metrics but the first, which warms up and may compile."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train(replace(config, run=run))
        rows = [row for row in RunDir(run).metrics() if row["event"] == "step"]
    return [row["tokens_per_second"] for row in rows[1:]]


def bare_rates(config: RunConfig[Method], device: torch.device) -> list[float]:
    """Tokens/s of the same stretches of the same steps, and nothing else."""
    t = config.train
    training = start(config, device, quick=False)
    windows = random_windows(training)
    rates = []
    for _ in range(t.steps // t.log_every):
        begin = time.perf_counter()
        for i in range(t.log_every):
            loss = step(training, windows[i % len(windows)])
        loss.item()
        synchronize(device)
        tokens = t.log_every * t.batch_size * t.seq_len
        rates.append(throughput(tokens, time.perf_counter() - begin))
    return rates[1:]


def measured(
    row: str, config: RunConfig[Method], device: torch.device, rounds: int
) -> dict[str, Any]:
    trainer: list[float] = []
    bare: list[float] = []
    for _ in range(rounds):
        trainer += trainer_rates(config)
        free()
        bare += bare_rates(config, device)
        free()
    ratio = statistics.median(trainer) / statistics.median(bare)
    found = {"row": row, "trainer": trainer, "bare": bare, "ratio": ratio}
    return found | described(config)


def cells(row: dict[str, Any]) -> list[str]:
    thousands = {k: [rate / 1e3 for rate in row[k]] for k in ("trainer", "bare")}
    return [row["row"], spread(thousands["trainer"]), spread(thousands["bare"]),
            f"{row['ratio']:.3f}"]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__, preset="tiny", precision=None)
    made.add_argument("rows", nargs="*", default=ROWS, metavar="ROW")
    made.add_argument("--data", type=Path, help="a prepared corpus; unset: the default one")
    made.add_argument("--batch-size", type=int, default=32)
    made.add_argument("--seq-len", type=int, default=256)
    made.add_argument("--steps", type=int, default=40)
    made.add_argument("--log-every", type=int, default=10)
    made.add_argument("--rounds", type=int, default=3)
    args = made.parse_intermixed_args(argv)
    device = device_of(args.device)
    base = base_config(model_of(args), args.batch_size, args.seq_len, steps=args.steps,
                       precision=args.precision, log_every=args.log_every,
                       device=device.type)  # fmt: skip
    base = replace(base, data=DataConfig(path=args.data))
    announce(device, {"preset": args.preset, "batch": f"{args.batch_size} x {args.seq_len}",
                      "steps": args.steps, "rounds": args.rounds, "set": args.set})  # fmt: skip
    found = []
    for row in args.rows:
        config = configured(eventless(row), base, args.set, device=device)
        found.append(measured(row, config, device, args.rounds))
        print(" | ".join(cells(found[-1])), flush=True)
        write(args, device, found)
    print()
    table(HEADER, [cells(row) for row in found])


def eventless(row: str) -> str:
    """The row without merges, exact steps and resets, which the bare loop hasn't got either."""
    none = {"bpt": ":merge_every=0", "relora": ":merge_every=0:reset_every=0",
            "loro": ":exact_every=0:refresh_every=0"}  # fmt: skip
    return f"{row}{none.get(row.split(':')[0], '')}"


if __name__ == "__main__":
    main()
