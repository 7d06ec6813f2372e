"""Compare training speed on several GPUs of one machine with one of them, and with full training.

    python benchmarks/scale.py --preset llama-1b --out OUT [--ranks 1 2] [ROW ...] [--json FILE]

Each number of ranks is a call of torchrun. A step is the trainer's, with the exchange of gradients,
on as many tokens on each rank. "efficiency" is tokens/s over those of as many single GPUs, "vs
full" is to full training on as many ranks. Events are one merge of all layers, or what an exact
step of LORO takes more than a usual one. "waits" counts the calls of one profiled step in which the
program waits for the GPU. Each result is a file in OUT, and is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
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
    start,
    step,
    step_times,
    synchronize,
    table,
    waited,
    write,
)
from merges import EVERY, INTERVALS

from peptrain.distributed.world import World, world
from peptrain.optim.loro import LOROOptimizer
from peptrain.rng import Rng

METHODS = ("full", "bpt", "relora", "loro")
HEADER = ("row", "tokens a rank", "ranks", "ms/step", "tokens/s", "efficiency", "vs full",
          "event ms", "vs 1 rank", "held GiB", "MB sent", "profiled", "waits")  # fmt: skip
WAITS = ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize", "Memcpy")
"""How the calls of CUDA end in which the program waits for the GPU."""
SIZES = {"Float": 4, "BFloat16": 2, "Double": 8, "Half": 2, "Int": 4, "Long": 8, "Byte": 1}


def together(training: Training) -> None:
    """Wait for the GPU and for the other ranks, so that all begin what is measured at once."""
    synchronize(training.here.device)
    if training.here.size > 1:
        dist.barrier()


def event_ms(training: Training, repeat: int) -> float | None:
    """Return the median milliseconds of a merge, or by which an exact step exceeds a usual one."""
    method, state, here = training.config.method, training.train_state, training.here
    if method.name not in INTERVALS:
        return None
    optimizer, found = state.optimizer, []

    def merge() -> None:
        assert method.after_step(state.model, optimizer, EVERY, Rng(0))

    def exact(due: bool) -> None:
        assert isinstance(optimizer, LOROOptimizer)
        optimizer.rule = replace(optimizer.rule, exact_every=int(due), refresh_every=0)
        optimizer.step()

    state.forward_backward([random_windows(training, 1)[0]])
    with here.sharing():
        for _ in range(repeat + 1):  # the first warms up
            usual = 0.0
            if isinstance(optimizer, LOROOptimizer):
                together(training)
                usual = waited(lambda: exact(False), here.device)
                together(training)
                found.append(waited(lambda: exact(True), here.device) - usual)
            else:
                together(training)
                found.append(waited(merge, here.device))
    optimizer.zero_grad()
    return statistics.median(found[1:])


def profiled(training: Training, windows: torch.Tensor) -> dict[str, Any]:
    """Profile one step. Return the bytes that it gave to collectives, and its waits for the GPU."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if training.here.device.type == "cuda":
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        with torch.profiler.profile(activities=kinds, record_shapes=True) as profiler:
            with torch.profiler.record_function("a step"):
                step(training, windows)
            synchronize(training.here.device)
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    span = next(e for e in events if e.get("name") == "a step" and e.get("ph") == "X")
    within = [e for e in events if span["ts"] <= e.get("ts", -1) <= span["ts"] + span["dur"]]
    sent = [e["args"] for e in within if e.get("name") == "record_param_comms"]
    sizes = [a["In msg nelems"] * SIZES[a["dtype"]] for a in sent if "In msg nelems" in a]
    names = [e["name"] for e in within if e.get("cat") == "cuda_runtime"]
    return {"profiled_bytes": sum(sizes), "waits": [n for n in names if n.endswith(WAITS)]}


def measured(row: str, tokens: int, args: argparse.Namespace, here: World) -> dict[str, Any]:
    rows = tokens // args.seq_len
    base = base_config(model_of(args), rows * here.size, args.seq_len,
                       precision=args.precision, compile=True)  # fmt: skip
    base = replace(base, train=replace(base.train, micro_batch=rows))
    config = configured(row, base, args.set, device=here.device, world_size=here.size)
    training = start(config, here.device, here=here)
    reset_peak()
    together(training)
    ms = step_times(training, args.steps, args.warm_up)
    step_ms = statistics.median(ms)
    training.train_state.forward_backward(random_windows(training, 1))
    sent = sum(p.grad.nbytes for p in training.train_state.model.parameters() if p.grad is not None)
    training.train_state.optimizer.zero_grad()
    found = {
        "row": row, "tokens": tokens, "world_size": here.size, "ms": ms,
        "tokens_per_second": here.size * tokens / step_ms * 1e3,
        "sent_bytes": sent if here.size > 1 else 0,
        **profiled(training, random_windows(training, 1)[0]),
        **peaks(), **training.sizes(), **described(config),
    }  # fmt: skip
    if tokens == min(args.tokens):
        found["event_ms"] = event_ms(training, args.repeat)
    return found


def file_of(out: Path, preset: str, row: str, tokens: int, ranks: int) -> Path:
    return out / f"{preset}-{row.replace(':', '-').replace('/', '-')}-{tokens}-{ranks}.json"


def work(args: argparse.Namespace) -> None:
    """Measure, as one of the ranks, what has no file yet."""
    with world(args.device) as here:
        for tokens in args.tokens:
            for row in args.rows:
                file = file_of(args.out, args.preset, row, tokens, here.size)
                if here.agree(file.exists()):
                    continue
                found = measured(row, tokens, args, here)
                if here.main:
                    file.write_text(json.dumps(found), encoding="utf-8")
                    print(f"{row} {tokens} x {here.size}: {statistics.median(found['ms']):.1f} ms",
                          flush=True)  # fmt: skip
                here.agree(None)
                free()


def cells(row: dict[str, Any], known: dict[tuple[str, int, int], dict[str, Any]]) -> list[str]:
    name, tokens, ranks = row["row"], row["tokens"], row["world_size"]
    one = known.get((name, tokens, 1))
    fulls = (r for (n, t, k), r in known.items() if (t, k) == (tokens, ranks))
    full = next((r for r in fulls if r["row"].startswith("full")), None)
    rate, event = row["tokens_per_second"], row.get("event_ms")
    alone = one.get("event_ms") if one else None
    return [
        name, f"{tokens:,}", str(ranks), f"{statistics.median(row['ms']):.1f}", f"{rate:,.0f}",
        f"{rate / ranks / one['tokens_per_second']:.1%}" if one else "",
        f"{rate / full['tokens_per_second']:.3f}" if full else "",
        f"{event:.0f}" if event else "", f"{event / alone:.2f}" if event and alone else "",
        gib(row["reserved_bytes"]), f"{row['sent_bytes'] / 1e6:,.1f}",
        f"{row['profiled_bytes'] / 1e6:,.1f}" if row["profiled_bytes"] else "",
        str(len(row["waits"])),
    ]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("rows", nargs="*", metavar="ROW",
                      help="unset: full, bpt, relora and loro, at their own ranks")  # fmt: skip
    made.add_argument("--out", type=Path, required=True, help="directory of the results")
    made.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    made.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="on each rank")
    made.add_argument("--seq-len", type=int, default=512)
    made.add_argument("--steps", type=int, default=20)
    made.add_argument("--warm-up", type=int, default=10)
    made.add_argument("--repeat", type=int, default=3, help="events to time")
    given = sys.argv[1:] if argv is None else argv
    args = made.parse_intermixed_args(given)
    args.rows = args.rows or METHODS
    intervals = {name: f"{key}={EVERY}" for name, key in INTERVALS.items()}
    args.rows = [f"{r}:{intervals[r.split(':')[0]]}" if r.split(":")[0] in intervals else r
                 for r in args.rows]  # fmt: skip
    if "TORCHELASTIC_RUN_ID" in os.environ:
        work(args)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    device = device_of(args.device)
    for ranks in args.ranks:
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        subprocess.run([*line, f"--nproc-per-node={ranks}", __file__, *given], check=True)
    shapes = {"layers": args.layers or "all", "precision": args.precision, "set": args.set}
    announce(device, {"preset": args.preset, **shapes})
    files = [file_of(args.out, args.preset, row, tokens, ranks)
             for tokens in args.tokens for row in args.rows for ranks in args.ranks]  # fmt: skip
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    known = {(row["row"], row["tokens"], row["world_size"]): row for row in found}
    table(HEADER, [cells(row, known) for row in found])
    write(args, device, found)


if __name__ == "__main__":
    main()
