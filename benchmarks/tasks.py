"""Train and judge five methods on one machine: BLiMP and the tasks of the papers, with intervals.

    python benchmarks/tasks.py --data CORPUS --tasks-data DATA --out tables [--only full bpt ...]

Trains llama-60m at seq_len 512 by full, ReLoRA with a warm start, BPT, LORO and plain low-rank,
each with two seeds, one run after another on one GPU, and judges each as soon as it is trained:
BLiMP and every other task whose data are there, or those of --tasks. Results of a run go to
OUT/NAME-SEED, its items too, and its checkpoints are deleted unless --keep-runs. A run whose
results are there is skipped, so that --only and --seeds split the work.

At the end one table has the mean over seeds of each value, its 95 % interval (Student's t) and, in
brackets, the standard error over items of the first seed. A second one has the difference in
accuracy from the first method and McNemar's p, of the first seed, on the same items.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import announce, device_of, parser, table, write

from peptrain.comparison.summary import half_width
from peptrain.errors import DataError
from peptrain.tasks.files import data_files
from peptrain.tasks.paired import paired
from peptrain.tasks.table import chosen_tasks

METHODS = {
    "full": "full",
    "relora-warm": "relora --method.rank={rank} --method.warm-start-steps={quarter}"
    " --method.merge-every={quarter}",
    "bpt": "bpt --method.rank={rank} --method.merge-every={quarter}",
    "loro": "loro --method.rank={rank} --method.exact-every={quarter}",
    "lowrank": "lowrank --method.rank={rank}",
}
KEPT = ("eval.json", "metrics.jsonl", "config.toml", "eval")


def call(arguments: list[str], run: Path) -> None:
    """Run one `peptrain` command. Exits with the end of its output if it fails."""
    line = [sys.executable, "-m", "peptrain", *arguments]
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          check=False)  # fmt: skip
    with run.with_suffix(".log").open("a", encoding="utf-8") as log:
        log.write(done.stdout)
    if done.returncode:
        raise SystemExit(f"{run.name}: {done.stdout[-2000:]}")


def train(name: str, seed: int, args: Any, run: Path) -> None:
    """Train one run by the command; its output goes to RUN.log."""
    given = METHODS[name].format(rank=args.rank, quarter=args.steps // 4).split()
    sizes = {"intermediate-size": args.intermediate_size, "layers": args.layers}
    model = [f"--model.{k}={v}" for k, v in sizes.items() if v is not None]
    shape = {"steps": args.steps, "batch-size": args.batch_size, "seq-len": args.seq_len,
             "seed": seed, "precision": args.precision, "device": args.device, "keep": 1,
             "compile": str(args.compile).lower(), "checkpoint-every": 0}  # fmt: skip
    flags = [f"--train.{key}={value}" for key, value in shape.items()]
    flags += [f"--data.path={args.data}", *(f"--{item}" for item in args.set)]
    call(["train", *given, f"--model.preset={args.preset}", *model, *flags, f"--run={run}"], run)


def one(name: str, seed: int, tasks: list[str], args: Any) -> None:
    """Train and judge one run, and keep its results in OUT/NAME-SEED."""
    place, run = args.out / f"{name}-{seed}", args.out / "runs" / f"{name}-{seed}"
    if place.exists():
        return
    run.parent.mkdir(parents=True, exist_ok=True)
    if not (run / "metrics.jsonl").exists() or "end" not in events(run):
        shutil.rmtree(run, ignore_errors=True)
        train(name, seed, args, run)
    limit = [f"--limit={args.limit}"] if args.limit else []
    call(["eval", str(run), f"--tasks={','.join(tasks)}", f"--tasks-data={args.tasks_data}",
          f"--device={args.device}", *limit], run)  # fmt: skip
    made = place.with_name(f".{place.name}")
    made.mkdir(exist_ok=True)
    for kept in KEPT:
        if (run / kept).is_dir():
            shutil.copytree(run / kept, made / kept, dirs_exist_ok=True)
        else:
            shutil.copyfile(run / kept, made / kept)
    made.rename(place)
    if not args.keep_runs:
        shutil.rmtree(run)


def events(run: Path) -> set[str]:
    """Return the events in the metrics of a run."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {json.loads(line)["event"] for line in lines}


def available(tasks: str, data: Path) -> list[str]:
    """Return the names of those tasks whose data are there."""
    found = []
    for task in chosen_tasks(tasks, "--tasks"):
        try:
            data_files(task, data, task.splits)
        except DataError as error:
            print(f"left out: {error}")
        else:
            found.append(task.name)
    return found


def results(place: Path) -> dict[str, dict[str, Any]]:
    """Return the results of a run by task, and its held-out loss."""
    entries = json.loads((place / "eval.json").read_text(encoding="utf-8"))
    found = {entry["task"]: entry for entry in entries if "task" in entry}
    lines = (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ends = [row for row in map(json.loads, lines) if row["event"] == "end"]
    return found | {"held-out": {"loss": ends[-1]["held_out_loss"]}}


def items(place: Path, task: str) -> list[dict[str, Any]]:
    """Return the items of a task in a run."""
    lines = (place / "eval" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def measured(entry: dict[str, Any]) -> list[str]:
    """Return the names of the values of a result that the table shows."""
    shown = ("acc", "acc_norm", "perplexity", "byte_perplexity", "loss")
    return [name for name in shown if name in entry]


def rows(out: Path, names: list[str], seeds: list[int]) -> list[list[str]]:
    """Return the rows of the table: a task and metric, and each method's value over the seeds."""
    found = {name: [results(out / f"{name}-{seed}") for seed in seeds] for name in names}
    made = []
    first = found[names[0]][0]
    for task in first:
        for metric in measured(first[task]):
            row = [task, metric]
            for name in names:
                values = [one[task][metric] for one in found[name]]
                row.append(cell(values, found[name][0][task].get(f"{metric}_stderr")))
            made.append(row)
    return made


def cell(values: list[float], stderr: float | None) -> str:
    """Return the mean, its interval over seeds, and in brackets the standard error over items."""
    width = half_width(values)
    interval = "" if width is None else f" ± {width:.4f}"
    return f"{statistics.fmean(values):.4f}{interval}" + (f" ({stderr:.4f})" if stderr else "")


def tests(out: Path, names: list[str], seed: int) -> list[list[str]]:
    """Return McNemar's p of each method against the first, of one seed."""
    made = []
    for task, entry in results(out / f"{names[0]}-{seed}").items():
        if "acc" in entry:
            base = items(out / f"{names[0]}-{seed}", task)
            others = (items(out / f"{name}-{seed}", task) for name in names[1:])
            found = [paired(other, base) for other in others]
            made.append([task, *(f"{t.difference:+.4f} (p {t.mcnemar_p:.2g})" for t in found)])
    return made


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__, preset="llama-60m", precision="bf16-mixed")
    made.add_argument("--data", type=Path, required=True, help="prepared corpus")
    made.add_argument("--tasks-data", type=Path, required=True)
    made.add_argument("--out", type=Path, required=True, help="directory for the results")
    made.add_argument("--tasks", default="all")
    made.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    made.add_argument("--steps", type=int, default=600)
    made.add_argument("--batch-size", type=int, default=64)
    made.add_argument("--seq-len", type=int, default=512)
    made.add_argument("--rank", type=int, default=128)
    made.add_argument("--limit", type=int, default=0, help="items of a task; 0 is all")
    made.add_argument("--keep-runs", action="store_true")
    made.add_argument("--no-compile", dest="compile", action="store_false")
    args = made.parse_args(argv)
    device = device_of(args.device)
    shapes = {"steps": args.steps, "batch": f"{args.batch_size} x {args.seq_len}", "r": args.rank}
    announce(device, {"model": args.preset, **shapes})
    tasks = available(args.tasks, args.tasks_data)
    for seed in args.seeds:
        for name in args.only:
            one(name, seed, tasks, args)
    table(["task", "metric", *args.only], rows(args.out, args.only, args.seeds))
    if args.only[1:]:
        against = tests(args.out, args.only, args.seeds[0])
        table([f"minus {args.only[0]}", *args.only[1:]], against)
    pairs = [(name, seed) for name in args.only for seed in args.seeds]
    write(args, device, [{"run": name, "seed": seed} | results(args.out / f"{name}-{seed}")
                         for name, seed in pairs])  # fmt: skip


if __name__ == "__main__":
    main()
