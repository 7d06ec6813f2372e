"""Compare training speed and peak memory of methods with full training, on one device.

    python benchmarks/speed.py [ROW ...] --preset llama-1b --tokens 2048 8192 32768 \\
        [--set train.KEY=VALUE] [--json FILE]

A step is the trainer's: forward and backward of one micro-batch, clipping, optimizer step. Merges
and exact steps are left out (merges.py measures them). For each number of tokens full training is
measured first and last to show drift, and ratios are to the mean of both.

"optimizer" is the part of a step that the optimizer takes, on a GPU the time from the end of the
passes to the end of its last operation, and "TFLOP" are those of its matrix products.
Decompositions, solves and operations on elements are not counted.

"peak" is the peak memory of tensors, "held" the memory reserved by the allocator. PyTorch doesn't
count the memory of a captured CUDA graph as tensors, so such rows have no peak. Use
train.cuda_graph=false to see it.
"""

from __future__ import annotations

import statistics
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
    gib,
    model_of,
    parser,
    peaks,
    random_windows,
    reset_peak,
    spread,
    start,
    step_times,
    synchronize,
    table,
    waited,
    write,
)
from torch.utils.flop_counter import FlopCounterMode

from peptrain.config import RunConfig
from peptrain.methods.base import Method

ROWS = ("bpt:rank=512", "relora:rank=512", "lowrank:rank=512", "loro:rank=512")
HEADER = ("row", "ms/step (quartiles)", "tokens/s", "vs full", "optimizer ms", "TFLOP", "peak GiB",
          "held GiB", "trainable / total")  # fmt: skip


def measured(
    row: str, config: RunConfig[Method], device: torch.device, steps: int, warm_up: int
) -> dict[str, Any]:
    """Measure one row; "ms" is absent if it ran out of memory."""
    tokens = config.train.batch_size * config.train.seq_len
    found: dict[str, Any] = {"row": row, "tokens": tokens, **described(config)}
    try:
        training = start(config, device)
        reset_peak()  # before the warm-up, which may capture graphs with memory of their own
        found |= training.sizes()
        ms = step_times(training, steps, warm_up)
        found |= optimizer_part(training, steps)
        found |= {"ms": ms, "tokens_per_second": tokens / statistics.median(ms) * 1e3}
    except torch.OutOfMemoryError:
        pass
    return found | peaks()


def optimizer_part(training: Training, steps: int) -> dict[str, Any]:
    """Return the milliseconds of the optimizer in each of `steps` steps, and its FLOPs."""
    state, device = training.train_state, training.here.device
    windows, found = random_windows(training, 1), []
    for _ in range(steps):
        state.forward_backward(windows)
        if device.type == "cuda":  # the host is ahead of the GPU, as in training
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            state.optimizer.step()
            end.record()
            found.append((begin, end))
        else:
            found.append(waited(state.optimizer.step, device))
    state.forward_backward(windows)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.bmm: products}) as counter:
        state.optimizer.step()
    state.optimizer.zero_grad()
    synchronize(device)
    ms = [pair if isinstance(pair, float) else pair[0].elapsed_time(pair[1]) for pair in found]
    return {"optimizer_ms": ms, "optimizer_flops": counter.get_total_flops()}


def products(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    """Return the operations of bmm. PyTorch 2.11 can't count one with an out_dtype."""
    return 2 * a.numel() * b[-1]


def compared(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Return the cells of one table, whose first and last rows are full training."""
    fulls = [r for r in (rows[0], rows[-1]) if "ms" in r]
    rate = statistics.mean(r["tokens_per_second"] for r in fulls) if fulls else None
    return [cells(row, rate) for row in rows]


def cells(row: dict[str, Any], rate: float | None) -> list[str]:
    if "ms" not in row:
        return [row["row"], "out of memory", *[""] * 4, f"over {gib(row['peak_bytes'])}", "", ""]
    return [
        row["row"],
        spread(row["ms"]),
        f"{row['tokens_per_second']:,.0f}",
        f"{row['tokens_per_second'] / rate:.3f}" if rate else "",
        f"{statistics.median(row['optimizer_ms']):.2f}",
        f"{row['optimizer_flops'] / 1e12:.2f}" if row["optimizer_flops"] else "",
        "" if row["recorded"] else gib(row["peak_bytes"]),
        gib(row["reserved_bytes"]),
        f"{row['trainable'] / 1e6:.1f}M / {row['parameters'] / 1e6:.1f}M",
    ]


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("rows", nargs="*", default=ROWS, metavar="ROW")
    made.add_argument("--tokens", type=int, nargs="+", default=[8192], help="per step, B x L")
    made.add_argument("--seq-len", type=int, default=512)
    made.add_argument("--steps", type=int, default=30)
    made.add_argument("--warm-up", type=int, default=5)
    args = made.parse_intermixed_args(argv)
    device = device_of(args.device)
    shapes = {"preset": args.preset, "f": args.intermediate_size or "the preset's"}
    announce(device, shapes | {"layers": args.layers or "all", "precision": args.precision,
                               "steps": args.steps, "set": args.set})  # fmt: skip
    found: list[dict[str, Any]] = []
    for tokens in args.tokens:
        base = base_config(model_of(args), tokens // args.seq_len, args.seq_len,
                           precision=args.precision, compile=True)  # fmt: skip
        of_size = []
        for row in ("full", *args.rows, "full"):
            config = configured(row, base, args.set, device=device)
            of_size.append(measured(row, config, device, args.steps, args.warm_up))
            free()
        print(f"{tokens // args.seq_len} x {args.seq_len} = {tokens} tokens a step")
        table(HEADER, compared(of_size))
        found += of_size
        write(args, device, found)


if __name__ == "__main__":
    main()
