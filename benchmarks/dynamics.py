"""Measure what training does to ranks, spectra and condition numbers, for six methods.

    python benchmarks/dynamics.py --out tables [--only full lora-warm ...] [--seeds 0 1]

Trains llama-60m for 600 steps of 128 x 256 tokens by each method, two runs at a time on one GPU,
and analyzes the checkpoints of a run in --processes processes as soon as it is trained: in float64,
on the GPU. The tables and the metrics of a run go to OUT/NAME-SEED; its checkpoints, about 5 GB,
are then deleted unless --keep-runs. A run whose tables are there is skipped. On one H200 a pair of
runs takes 150 to 190 s with its analysis, so that --only and --seeds split it into parts.

Predictions, written before the first run (r = 128, 512 x 512 and 512 x 1376 matrices, medians over
layers of matrices in the middle of training and at its end):

1. relora-warm: W_600 - W_150 has at most (2 + 1) r = 384 singular values above 0.1 in every adapted
   matrix and a rank of at most 384 at 1e-3; lora-warm at most 128 of both, as it never merges.
2. full: W_600 - W_0 has full rank at 1e-3 and less than half of it at 1e-2 times sigma_1.
3. bpt: the rank of W_1 - W_0 is about 400 at 1e-2 and 512 at 1e-6, after one step; relora-warm's
   update of step 151 has a rank of at most 128, because B alone moves.
4. The condition number of the factors at step 600, just after an exact step, is the same for loro's
   B and A, and below that of lowrank's larger one in the median.
5. Errors of gradients: error_tangent is below error_factors_scaled everywhere. error_factors of
   lowrank is above error_factors_scaled by more than a tenth, which is what scaling alone repairs.
   The share that no low-rank direction reaches, error_tangent, is above 0.5.
6. Increments of successive merges overlap more than random subspaces (r/n = 0.25): 0.3 to 0.6 for
   relora-warm.
7. The condition number of an OV head over its 64 dimensions is below 100 for full at the end.
   Over all 512 it would be above 1e13.

The outcomes are in docs/dynamics.md.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import announce, device_of, parser, table, write

from peptrain.analysis.table import read_table
from peptrain.distributed.launch import cores

METHODS = {
    "full": "full",
    "lora-warm": "lora --method.rank={rank} --method.warm-start-steps={quarter}",
    "relora-warm": "relora --method.rank={rank} --method.warm-start-steps={quarter}"
    " --method.merge-every={quarter}",
    "bpt": "bpt --method.rank={rank} --method.merge-every={quarter}",
    "loro": "loro --method.rank={rank} --method.exact-every={quarter}",
    "lowrank": "lowrank --method.rank={rank}",
}
SHOWN = {
    "weight": ("per", "condition"),
    "from_start": ("rank_1e-2", "rank_1e-3", "above_0.1"),
    "from_warm": ("rank_1e-3", "above_0.1"),
    "update": ("rank_1e-2", "rank_1e-3"),
    "gradient": ("per", "error_factors", "error_factors_scaled", "error_loro", "error_tangent"),
    "cycle": ("overlap",),
    "factor.B": ("condition", "frobenius"),
    "factor.A": ("condition", "frobenius"),
}
"""The columns of the printed table, medians over layers and matrices. Everything is in the CSV."""


def kept(steps: int) -> dict[str, list[int]]:
    """Return the steps to keep, and those to analyze: starts, true updates, a merge, the end.

    The rate of the first step of a phase is 0, so that its second one is measured too.
    """
    quarter = steps // 4
    first = [0, 1, 2, quarter, quarter + 1, quarter + 2]
    last = [3 * quarter, steps - 1, steps]
    return {"keep": sorted({*first, 2 * quarter, *last}), "analyze": sorted({*first, *last})}


def train(name: str, seed: int, args: Any, run: Path) -> None:
    """Train one run by the command; its output goes to RUN.log."""
    given = METHODS[name].format(rank=args.rank, quarter=args.steps // 4).split()
    data = [f"--data.path={args.data}"] if args.data else []
    sizes = {"intermediate-size": args.intermediate_size, "layers": args.layers}
    model = [f"--model.{k}={v}" for k, v in sizes.items() if v is not None]
    shape = {"steps": args.steps, "batch-size": args.batch_size, "seq-len": args.seq_len,
             "seed": seed, "precision": args.precision, "device": args.device,
             "compile": str(args.compile).lower(),
             "keep": 1, "checkpoint-every": 0, "eval-every": max(1, args.steps // 4),
             "keep-at": ",".join(map(str, kept(args.steps)["keep"]))}  # fmt: skip
    flags = [f"--train.{key}={value}" for key, value in shape.items()]
    flags += [f"--{item}" for item in args.set]
    preset = f"--model.preset={args.preset}"
    call(["train", *given, preset, *model, *data, *flags, f"--run={run}"], run, args)


def analyze(args: Any, run: Path, out: Path) -> None:
    """Analyze the run's checkpoints, spread over processes, into OUT/NAME."""
    steps = kept(args.steps)["analyze"]
    parts = [steps[i :: args.processes] for i in range(min(args.processes, len(steps)))]
    flags = [f"--out={out}", f"--probe={args.probe}", f"--device={args.device}"]

    def part(chosen: list[int]) -> None:
        call(["analyze", *(f"{run}@{step}" for step in chosen), *flags], run, args)

    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(part, parts))


def call(arguments: list[str], run: Path, args: Any) -> None:
    """Run one `peptrain` command. Exits with the end of its output if it fails."""
    # With all cores in each of the analyses, they take more than twice as long.
    threads = max(1, cores() // (args.workers * args.processes))
    done = subprocess.run([sys.executable, "-m", "peptrain", *arguments], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, check=False,
                          env={"OMP_NUM_THREADS": str(threads)} | os.environ)  # fmt: skip
    with run.with_suffix(".log").open("a", encoding="utf-8") as log:
        log.write(done.stdout)
    if done.returncode:
        raise SystemExit(f"{run.name}: {done.stdout[-2000:]}")


def one(name: str, seed: int, args: Any) -> list[dict[str, Any]]:
    """Train and analyze one run; return its rows, medians over matrices."""
    run, tables = args.runs / f"{name}-{seed}", args.out / f"{name}-{seed}"
    if not (tables / f"{args.steps}.json").exists():
        shutil.rmtree(run, ignore_errors=True)
        args.runs.mkdir(parents=True, exist_ok=True)
        train(name, seed, args, run)
        analyze(args, run, args.out)
        for file in ("metrics.jsonl", "config.toml", "env.json"):
            shutil.copy(run / file, tables / file)
        if not args.keep_runs:
            shutil.rmtree(run)
        print(f"{name}-{seed}: done", flush=True)
    return medians(tables, name, seed, kept(args.steps)["analyze"])


def medians(tables: Path, name: str, seed: int, steps: list[int]) -> list[dict[str, Any]]:
    """Return one row for each step and kind of matrix, with medians over layers and matrices."""
    rows = []
    for step in steps:
        lines = read_table(tables / f"{step}.csv")
        for what, columns in SHOWN.items():
            chosen = [x for x in lines if x["what"] == what and x["module"] != "ov"]
            values = {
                column: statistics.median(found)
                for column in columns
                if (found := [x[column] for x in chosen if x[column] is not None])
            }
            if values:
                rows.append({"run": name, "seed": seed, "step": step, "what": what, **values})
    return rows


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__, preset="llama-60m", precision="bf16-mixed")
    made.add_argument("--out", type=Path, required=True, help="directory for the tables")
    made.add_argument("--runs", type=Path, default=Path("runs/dynamics"))
    made.add_argument("--data", type=Path, help="prepared corpus; unset: peptrain's own")
    made.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    made.add_argument("--steps", type=int, default=600)
    made.add_argument("--batch-size", type=int, default=128)
    made.add_argument("--seq-len", type=int, default=256)
    made.add_argument("--rank", type=int, default=128)
    made.add_argument("--probe", type=int, default=8)
    made.add_argument("--workers", type=int, default=2, help="runs at a time")
    made.add_argument("--processes", type=int, default=4, help="analyses at a time, per run")
    made.add_argument("--keep-runs", action="store_true")
    made.add_argument("--no-compile", dest="compile", action="store_false")
    args = made.parse_args(argv)
    device = device_of(args.device)
    shapes = {"steps": args.steps, "batch": f"{args.batch_size} x {args.seq_len}", "r": args.rank}
    announce(device, {"model": args.preset, **shapes, "spectra": "float64"})
    pairs = [(name, seed) for seed in args.seeds for name in args.only]
    with ThreadPoolExecutor(args.workers) as pool:
        rows = [row for found in pool.map(lambda pair: one(*pair, args), pairs) for row in found]
    columns = [column for columns in SHOWN.values() for column in columns]
    header = ["run", "seed", "step", "what", *dict.fromkeys(columns)]
    cells = [[_text(row.get(key, "")) for key in header] for row in rows]
    table(header, cells)
    write(args, device, rows)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
