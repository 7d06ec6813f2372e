"""Measure the overhead of the trainer's loop: its tokens/s relative to the bare steps.

    python benchmarks/loop.py [--preset tiny] [ROW ...] [--data CORPUS] [--json FILE]

`train` reads the corpus, writes metrics, handles signals and checks losses. The bare loop does
forward, backward, clipping and the optimizer's step on batches that are on the device already. They
take turns. Both rates are medians over intervals of --log-every steps, without the first interval
of each turn. The second ratio is by CPU time, which other processes disturb less, but to which idle
threads add.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    CLOCKS,
    Marks,
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
    table,
    write,
)

from peptrain.config import RunConfig
from peptrain.methods.base import Method
from peptrain.sections import DataConfig
from peptrain.training.loop import train

ROWS = ("full", "lora", "loro")
HEADER = ("row", "trainer, thousand tokens/s (quartiles)", "bare", "ratio", "of CPU time")


def peptrain_run(config: RunConfig[Method], marks: Marks) -> int:
    """Train, marking the time of each row of metrics; return the number of trainable parameters."""

    def observe(row: Mapping[str, Any]) -> None:
        if row["event"] == "step":
            marks.mark()

    with tempfile.TemporaryDirectory() as folder:
        return train(replace(config, run=Path(folder) / "run"), observe).trainable


def bare_run(config: RunConfig[Method], device: torch.device, marks: Marks) -> None:
    """Take the same steps and nothing else, with marks and reads of the loss as frequent."""
    t = config.train
    training = start(config, device, quick=False)
    windows = random_windows(training)
    for i in range(1, t.steps + 1):
        loss = step(training, windows[i % len(windows)])
        if i % t.log_every == 0:
            loss.item()
            marks.mark()


def measured(
    row: str, config: RunConfig[Method], device: torch.device, rounds: int
) -> dict[str, Any]:
    tokens = config.train.log_every * config.train.batch_size * config.train.seq_len
    found: dict[str, Any] = {"row": row, **described(config)}
    calls = {"trainer": partial(peptrain_run, config), "bare": partial(bare_run, config, device)}
    for name in calls:
        found[name] = {clock: [] for clock in CLOCKS}
    for _ in range(rounds):
        for name, call in calls.items():
            marks = Marks()
            call(marks)
            free()
            for clock, rates in marks.rates(tokens).items():
                found[name][clock] += rates
    return found


def ratio(row: dict[str, Any], clock: str) -> float:
    return statistics.median(row["trainer"][clock]) / statistics.median(row["bare"][clock])


def cells(row: dict[str, Any]) -> list[str]:
    rates = [spread([rate / 1e3 for rate in row[k]["wall"]]) for k in ("trainer", "bare")]
    return [row["row"], *rates, *(f"{ratio(row, clock):.3f}" for clock in CLOCKS)]


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__, preset="tiny", precision=None)
    made.add_argument("rows", nargs="*", default=ROWS, metavar="ROW")
    made.add_argument("--data", type=Path, help="prepared corpus (default: the embedded one)")
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
    """Return the row without merges, exact steps and resets, which the bare loop doesn't do."""
    none = {"bpt": ":merge_every=0", "relora": ":merge_every=0:reset_every=0",
            "loro": ":exact_every=0:refresh_every=0"}  # fmt: skip
    return f"{row}{none.get(row.split(':')[0], '')}"


if __name__ == "__main__":
    main()
