"""Fine-tune what three pre-training methods and none leave, in full and by adapters, on GLUE.

    python benchmarks/tune.py --data CORPUS --tasks-data DATA --out OUT --workers 6 --minutes 8

1. Pre-trains llama-60m by full, by relora with a warm start and by loro.
2. Fine-tunes these three and a model that was not pre-trained, full@0, with all parameters. The one
   of full is fine-tuned by relora, lora and loro around a frozen W too: r = 8 on queries and keys,
   and the classifier. Each of these seven is trained on each task at the rates of its method with
   seed 0, and at the best one of them, by the task's metric, with the seeds of --seeds.
3. Prints the mean over these seeds with its 95 % interval (Student's t) beside what the most
   frequent class would get, differences to full fine-tuning of full over pairs of the same seed,
   all values of seed 0, and the seconds of a run, which shares the GPU with others.

A value is that of the last step, so that no step is chosen by the validation rows that it is
measured on. Seed 0 has chosen the rate, so it is not among the default --seeds.

OUT/results.json has every finished run, and none of them is trained again. So a killed call
continues when it is repeated, and with --minutes a call starts no run later than that and prints
what there is. --only, --tasks and --seeds split the work. Another size needs another OUT. Runs of
fine-tuning are deleted when they end. The pre-trained models stay in --runs; one that is not there
is trained again, and the table of starts then has both. --set applies to pre-training.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import (
    announce,
    base_config,
    configured,
    device_of,
    free,
    model_of,
    parser,
    split_row,
    write,
)
from tune_tables import FULL, SEED, Row, best, print_tables, rates_of, runs_of

from peptrain.config import RunConfig
from peptrain.errors import Diverged, PeptrainError
from peptrain.files import write_atomically
from peptrain.methods import methods
from peptrain.optim.adamw import OptimConfig
from peptrain.runs.directory import RunDir
from peptrain.sections import DataConfig, TrainConfig, TuneConfig
from peptrain.settings import toml
from peptrain.training.loop import train
from peptrain.tuning.metrics import majority
from peptrain.tuning.settle import training_rows
from peptrain.tuning.tasks import TASKS, read_examples

STARTS = {
    "full": "full",
    "relora": "relora:rank={rank}:warm_start_steps={quarter}:merge_every={quarter}",
    "loro": "loro:rank={rank}:exact_every={quarter}",
}
START_RATES = {"full": 1e-3, "relora": 4e-3, "loro": 5e-3}
"""The defaults, but for loro's 1e-2, which is chaotic with small batches (fast_forms in README)."""
ADAPTER = "rank=8:targets=q,k:train=classifier"
TUNINGS = {
    "full": "full",
    "relora": f"relora:{ADAPTER}:warm_start_steps=0",
    "lora": f"lora:{ADAPTER}",
    # As LORO's released command for fine-tuning: steps without r/d, no refreshes.
    "loro": f'loro:{ADAPTER}:around=frozen:alpha_over_rank=true:scale="1":refresh=none'
    ":restart_warmup=0",
}
CASES = ("full@0:full", FULL, "relora:full", "loro:full", "full:relora", "full:lora", "full:loro")
"""START:METHOD of fine-tuning."""
RATES = {
    "full": (3e-5, 1e-4, 3e-4),
    "relora": (3e-4, 1e-3, 3e-3),
    "lora": (3e-4, 1e-3, 3e-3),
    "loro": (1e-4, 3e-4, 1e-3),
}
EPOCHS = {name: 1 if name == "sst2" else 3 for name in TASKS}
ROWS = {name: 10_000 if name == "sst2" else None for name in TASKS}
SETTINGS = ("preset", "layers", "intermediate_size", "precision", "set", "steps", "batch_size",
            "seq_len", "rank", "start_rates", "epochs", "rows", "tune_batch_size",
            "tune_seq_len")  # fmt: skip
"""Arguments that all results of an OUT have in common."""


class Job(NamedTuple):
    """A run of fine-tuning."""

    case: str
    task: str
    lr: float
    seed: int

    @property
    def start(self) -> str:
        return self.case.partition(":")[0]

    @property
    def method(self) -> str:
        return self.case.partition(":")[2]


# What a worker does.


def pretrain(args: Any, name: str) -> Row:
    """Train a start in RUNS/NAME and return its row."""
    given = STARTS[name].format(rank=args.rank, quarter=args.steps // 4)
    base = base_config(
        model_of(args), args.batch_size, args.seq_len, steps=args.steps, seed=SEED, keep=1,
        keep_at="0" if name == "full" else "", precision=args.precision, device=args.device,
        compile=args.compile,
    )  # fmt: skip
    row = f"{given}:optim.lr={args.start_rates[name]}"
    config = configured(row, base, args.set, device=device_of(args.device))
    config = replace(config, data=DataConfig(path=args.data), run=args.runs / name)
    shutil.rmtree(args.runs / name, ignore_errors=True)
    begin = time.perf_counter()
    found = train(config)
    free()
    return {"start": name, "lr": args.start_rates[name], "loss": found.held_out.loss,
            "parameters": found.parameters, "trainable": found.trainable,
            "seconds": time.perf_counter() - begin}  # fmt: skip


def tuning(args: Any, job: Job) -> RunConfig[Any]:
    """Configure a fine-tuning. It is evaluated and saved only at its end."""
    name, own = split_row(TUNINGS[job.method])
    run = f"{job.case.replace('@', '-').replace(':', '-')}-{job.task}-{job.lr:g}-{job.seed}"
    return RunConfig(
        method=toml.parse(methods()[name], own, "method."),
        optim=OptimConfig(lr=job.lr),
        train=TrainConfig(
            batch_size=args.tune_batch_size, seq_len=args.tune_seq_len, seed=job.seed,
            precision=args.precision, device=args.device, eval_every=0, checkpoint_every=0, keep=1,
        ),
        tune=TuneConfig(
            task=job.task, tasks_data=args.tasks_data, epochs=args.epochs[job.task],
            rows=args.rows[job.task],
        ),
        init_from=args.runs / job.start,
        run=args.runs / run,
    )  # fmt: skip


def tune(args: Any, job: Job) -> Row:
    """Fine-tune and return the row of the run, without a value if it diverged."""
    config, by = tuning(args, job), TASKS[job.task].best_by
    assert config.run is not None
    shutil.rmtree(config.run, ignore_errors=True)
    begin, row = time.perf_counter(), job._asdict()
    try:
        row["trainable"] = train(config).trainable
        (end,) = (row for row in RunDir(config.run).metrics() if row["event"] == "end")
    except Diverged:
        end = {}
    shutil.rmtree(config.run, ignore_errors=True)
    free()
    return row | {"value": end.get(by), "stderr": end.get(f"{by}_stderr"),
                  "loss": end.get("held_out_loss"), "steps": end.get("step"),
                  "seconds": time.perf_counter() - begin}  # fmt: skip


def use_threads(count: int) -> None:
    torch.set_num_threads(count)


# What the main process does.


class Results:
    """The rows of OUT/results.json."""

    def __init__(self, args: Any) -> None:
        """Read the file if it exists. Exits if its results have other settings."""
        self.file, self.directory = args.out / "results.json", args.runs
        found: dict[str, Any] = {"settings": {}, "starts": [], "runs": []}
        self.settings = json.loads(json.dumps({key: getattr(args, key) for key in SETTINGS}))
        if self.file.exists():
            found = json.loads(self.file.read_text(encoding="utf-8"))
            for key, then in found["settings"].items():
                if then != (now := self.settings[key]):
                    flag = key.replace("_", "-")
                    raise SystemExit(f"--{flag}: {self.file} has results of {then}, not of {now};"
                                     " give the same, or another --out")  # fmt: skip
        self.starts: list[Row] = found["starts"]
        self.runs: list[Row] = found["runs"]

    def write(self) -> None:
        made = {"settings": self.settings, "starts": self.starts, "runs": self.runs}
        write_atomically(self.file, json.dumps(made, indent=1) + "\n")

    def loss(self, start: str) -> float | None:
        """Return the held-out loss of a start that is there, else None."""
        name = start.partition("@")[0]
        found = [row["loss"] for row in self.starts if row["start"] == name]
        return found[-1] if found and finished(self.directory / name) else None

    def have(self, job: Job) -> bool:
        return any(all(row[k] == v for k, v in job._asdict().items()) for row in self.runs)


def in_parallel(
    args: Any, pool: Executor, work: Callable[..., Row], jobs: Iterable[Any]
) -> Iterator[Row]:
    """Yield the rows of jobs as these end, with --workers at a time, begun before args.until."""
    waiting, running = list(jobs), set[Future[Row]]()
    while True:
        while waiting and len(running) < args.workers and time.perf_counter() < args.until:
            running.add(pool.submit(work, args, waiting.pop(0)))
        if not running:
            return
        ended, running = wait(running, return_when=FIRST_COMPLETED)
        for one in ended:
            yield one.result()


def finished(run: Path) -> bool:
    """Return whether a run of pre-training has ended."""
    return (run / "config.toml").exists() and any(
        r["event"] == "end" for r in RunDir(run).metrics()
    )


def train_all(args: Any, results: Results) -> None:
    """Train what is missing: starts, then rates with `SEED`, then the best ones with --seeds."""
    share = max(1, torch.get_num_threads() // args.workers)
    with ProcessPoolExecutor(args.workers, get_context("spawn"), use_threads, (share,)) as pool:
        names = dict.fromkeys(case.partition(":")[0].partition("@")[0] for case in args.only)
        lacking = [name for name in names if results.loss(name) is None]
        for row in in_parallel(args, pool, pretrain, lacking):
            results.starts.append(row)
            results.write()
            print(f"{row['start']}: {row['loss']:.4f} in {row['seconds']:.0f} s", flush=True)
        for jobs in (rate_jobs, seed_jobs):
            todo = [job for job in jobs(args, results.runs)
                    if not results.have(job) and results.loss(job.start) is not None]  # fmt: skip
            for row in in_parallel(args, pool, tune, todo):
                start = row["case"].partition(":")[0]
                results.runs.append(row | {"start_loss": results.loss(start)})
                results.write()
                said = "diverged" if row["value"] is None else f"{row['value']:.4f}"
                print(f"{row['case']} {row['task']} {row['lr']:g} seed {row['seed']}: {said} in"
                      f" {row['seconds']:.0f} s", flush=True)  # fmt: skip


def rate_jobs(args: Any, runs: Sequence[Row]) -> list[Job]:
    """Return the runs that choose rates: none for a method with one rate."""
    return [Job(case, task, lr, SEED) for task in args.tasks for case in args.only
            if len(rates := rates_of(args, case)) > 1 for lr in rates]  # fmt: skip


def seed_jobs(args: Any, runs: Sequence[Row]) -> list[Job]:
    """Return the runs of the rates that are chosen."""
    return [Job(case, task, lr, seed) for task in args.tasks for case in args.only
            if (lr := best(runs_of(runs, case, task), rates_of(args, case))) is not None
            for seed in args.seeds]  # fmt: skip


# Arguments.


def pairs(
    flag: str, given: Sequence[str], default: Mapping[str, Any], parse: Callable[[str], Any]
) -> dict[str, Any]:
    """Return `default` with NAME=VALUE of `given` over it. Exits for anything else."""
    found = dict(default)
    for item in given:
        name, _, value = item.partition("=")
        try:
            if name in default:
                found[name] = parse(value)
                continue
        except ValueError:
            pass
        raise SystemExit(f"{flag}: must be NAME=VALUE, of {', '.join(default)} (got {item})")
    return found


def parsed(argv: list[str] | None) -> Any:
    """Return the arguments, with those of NAME=VALUE as tables of all names."""
    made = parser(__doc__, preset="llama-60m", precision="bf16-mixed")
    made.add_argument("--data", type=Path, required=True, help="prepared corpus")
    made.add_argument("--tasks-data", type=Path, required=True)
    made.add_argument("--out", type=Path, required=True, help="directory for the results")
    made.add_argument("--runs", type=Path, help="where runs are trained; unset: OUT/runs")
    made.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    made.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["cola", "sst2", "rte"])
    made.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of fine-tuning")
    made.add_argument("--workers", type=int, default=2, help="runs at a time")
    made.add_argument("--minutes", type=float, default=math.inf, help="start no run later")
    made.add_argument("--steps", type=int, default=1000, help="of pre-training, like the next five")
    made.add_argument("--batch-size", type=int, default=64)
    made.add_argument("--seq-len", type=int, default=512)
    made.add_argument("--rank", type=int, default=128)
    made.add_argument("--start-rates", nargs="+", default=[], metavar="METHOD=RATE")
    made.add_argument("--no-compile", dest="compile", action="store_false")
    made.add_argument("--tune-batch-size", type=int, default=32)
    made.add_argument("--tune-seq-len", type=int, default=256)
    made.add_argument("--rates", nargs="+", default=[], metavar="METHOD=RATE,RATE")
    made.add_argument("--epochs", nargs="+", default=[], metavar="TASK=EPOCHS")
    made.add_argument("--rows", nargs="+", default=[], metavar="TASK=ROWS", help="to train on")
    args = made.parse_args(argv)
    args.start_rates = pairs("--start-rates", args.start_rates, START_RATES, float)
    args.rates = pairs("--rates", args.rates, RATES, lambda text: [*map(float, text.split(","))])
    args.epochs = pairs("--epochs", args.epochs, EPOCHS, int)
    args.rows = pairs("--rows", args.rows, ROWS, int)
    args.runs = args.runs or args.out / "runs"
    args.until = time.perf_counter() + 60 * args.minutes
    return args


def main(argv: list[str] | None = None) -> None:
    args = parsed(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    results, frequent = Results(args), {}
    device = device_of(args.device)
    try:
        for name in args.tasks:
            training_rows(name, args.tasks_data, args.rows[name])
            splits = next(iter(TASKS[name].validation.values()))
            found = read_examples(TASKS[name], args.tasks_data, splits)
            values = majority(TASKS[name], [example.label for example in found])
            frequent[name] = values[TASKS[name].metrics[0]]
    except PeptrainError as error:
        raise SystemExit(str(error)) from None
    announce(device, {
        "model": args.preset, "pre-training": f"{args.steps} x {args.batch_size} x {args.seq_len}",
        "r": args.rank, "fine-tuning in batches of": args.tune_batch_size,
        **{f"epochs of {name}": args.epochs[name] for name in args.tasks},
        "runs at a time": args.workers,
    })  # fmt: skip
    train_all(args, results)
    write(args, device, print_tables(args, results.starts, results.runs, frequent))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the workers end too
    main()
