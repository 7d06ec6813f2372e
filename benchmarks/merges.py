"""Measure the cost of a merge or of LORO's exact step, relative to 200 steps of 131,072 tokens.

    python benchmarks/merges.py --preset llama-1b [--ms-per-8192 MS] [ROW ...] [--json FILE]

All layers are merged. A merge is timed as the trainer does it: random numbers on the host, sums on
the device, moments zeroed. Exact and ordinary optimizer steps alternate, and the time of an exact
step is the difference. Without --ms-per-8192 the row's own training steps are timed.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import torch
from common import (
    Training,
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
    step_times,
    table,
    waited,
    write,
)

from peptrain.optim.loro import LOROOptimizer
from peptrain.rng import Rng

ROWS = ("bpt:rank=512", "relora:rank=512", "loro:rank=512")
BETWEEN_STEPS, BETWEEN_TOKENS = 200, 131_072
HEADER = ("row", "event", "ms (quartiles)", "ms/step", "share of 200 steps of 131,072 tokens")
EVERY = 1000
"""Interval of events in the configuration. No step reaches it, since events are called by hand."""
INTERVALS = {"bpt": "merge_every", "relora": "merge_every", "loro": "exact_every"}


def configured_row(row: str) -> str:
    return f"{row}:{INTERVALS[row.split(':')[0]]}={EVERY}"


def merge_times(training: Training, repeat: int) -> list[float]:
    """Return the milliseconds of each merge of all layers, after one as warm-up."""
    method, train_state = training.config.method, training.train_state
    rng = Rng(training.config.train.seed)

    def merge() -> None:
        done = method.after_step(train_state.model, train_state.optimizer, EVERY, rng)
        assert done, f"{method.name} does nothing between steps"

    return [waited(merge, training.here.device) for _ in range(repeat + 1)][1:]


def exact_times(training: Training, repeat: int) -> list[float]:
    """Return the milliseconds by which exact steps exceed the ordinary step before them."""
    optimizer, device = training.train_state.optimizer, training.here.device
    assert isinstance(optimizer, LOROOptimizer)
    training.train_state.forward_backward(random_windows(training, 1))
    optimizer.rule = replace(optimizer.rule, exact_every=2, refresh_every=2)
    if optimizer.param_groups[0]["clock"] % 2:
        optimizer.step()
    found = []
    for _ in range(repeat + 1):
        usual = waited(optimizer.step, device)
        found.append(waited(optimizer.step, device) - usual)
    return found[1:]


def measured(row: str, args: Any, device: torch.device) -> dict[str, Any]:
    base = base_config(model_of(args), args.rows_of_step, args.seq_len, precision=args.precision,
                       compile=True)  # fmt: skip
    config = configured(configured_row(row), base, args.set, device=device)
    training = start(config, device)
    is_loro = config.method.name == "loro"
    if args.ms_per_8192 is None:
        ms = statistics.median(step_times(training, args.steps, args.warm_up))
    else:
        ms = args.ms_per_8192
        step(training, random_windows(training, 1)[0])  # creates the optimizer's moments
    events = (exact_times if is_loro else merge_times)(training, args.repeat)
    tokens = 8192 if args.ms_per_8192 else args.rows_of_step * args.seq_len
    share = statistics.median(events) / (BETWEEN_STEPS * BETWEEN_TOKENS / tokens * ms)
    event = "exact step" if is_loro else "merge"
    return {"row": row, "event": event, "event_ms": events, "step_ms": ms, "share": share,
            **described(config)}  # fmt: skip


def cells(row: dict[str, Any]) -> list[str]:
    return [row["row"], row["event"], spread(row["event_ms"], 1), f"{row['step_ms']:.1f}",
            f"{row['share']:.4%}"]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("rows", nargs="*", default=ROWS, metavar="ROW")
    made.add_argument("--ms-per-8192", type=float, help="time of a training step of 8192 tokens")
    made.add_argument("--rows-of-step", type=int, default=16)
    made.add_argument("--seq-len", type=int, default=512)
    made.add_argument("--steps", type=int, default=10)
    made.add_argument("--warm-up", type=int, default=5)
    made.add_argument("--repeat", type=int, default=5)
    args = made.parse_intermixed_args(argv)
    device = device_of(args.device)
    announce(device, {"preset": args.preset, "layers": args.layers or "all",
                      "precision": args.precision, "set": args.set,
                      "step": f"{args.rows_of_step} x {args.seq_len} tokens"})  # fmt: skip
    found = []
    for row in args.rows:
        found.append(measured(row, args, device))
        print(" | ".join(cells(found[-1])), flush=True)
        write(args, device, found)
        free()
    print()
    table(HEADER, [cells(row) for row in found])


if __name__ == "__main__":
    main()
