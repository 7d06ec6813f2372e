"""Put the question of the small-model study again: is ReLoRA behind full training, both tuned?

    python benchmarks/study.py --data CORPUS --tasks-data DATA --domains DIR [DIR ...] --out OUT

1. Tunes eight methods at the same rates with seed 0: full; relora without and with a warm start,
   which is full training at its best rate; lora-warm, the same without merges; pico-compat, ReLoRA
   as the study's released code computes it, with its dropout, schedule and clipping;
   pico-arithmetic, the same with ours; bpt; loro. Intervals are the study's shares of its 20,000
   steps.
2. Trains the best rate of each, by held-out loss, with more seeds. Seed 0's run is reused.
3. Judges each of these runs by BLiMP, by the held-out loss of each domain (a corpus prepared with
   the same tokenizer) and by `peptrain analyze` at the last step: PER and log10 of the condition
   number, both over the structural rank, means over layers. Values that are not finite are left out
   of a mean, which is then marked *. `ov` is W_O W_V summed over heads, and the update the true
   last step.
4. Prints means over seeds with their 95 % interval (Student's t), and the differences to full over
   pairs of the same seed with theirs. `study_tables.py OUT` prints them again.

OUT/tune.csv and OUT/measures.csv have a row for each run, and for each run and measure. The tables
are made from them, and what is in them is not trained or judged again. So a killed call continues
when it is repeated, --only splits the work, and another size needs another OUT. Runs are trained
below --runs by `peptrain compare`. Unless --keep-runs they are deleted when they are judged or not
the best. Of judged runs OUT/METHOD-SEED keeps all but checkpoints and answers.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from common import announce, device_of, parser, settings, write
from study_tables import LOSS, METHODS, Row, best, print_tables, rows_of

from peptrain import recipes
from peptrain.analysis.table import as_csv, read_table
from peptrain.comparison.compare import compare
from peptrain.comparison.workers import Status
from peptrain.distributed.launch import cores
from peptrain.errors import PeptrainError
from peptrain.files import write_atomically

RECIPE = "pico-compat-tiny-relora"
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
TUNED = ("method", "lr", "seed", "state", "held_out_loss")
MEASURED = ("method", "lr", "seed", "group", "measure", "value", "left_out")
DOMAIN, BLIMP, MINUTES = "loss by domain", "BLiMP", "device minutes"
COLUMNS: dict[str, tuple[str, Sequence[str], Callable[[float], float]]] = {
    "PER over the rank": ("per_rank", ("weight", "update", "gradient"), float),
    "log10 condition": ("condition", ("weight", "update"), math.log10),
}
"""Column of the analysis, of what, and scale, by group. The smallest singular values of a gradient
are rounding, since it is in fp32."""
MATRICES = ("ov", "ov head", "o_proj", "v_proj", "down_proj")
NOT_KEPT = shutil.ignore_patterns("checkpoints", "tokenizer", "eval", "*.lock")


def settings_of(name: str, args: Any, tuned: Sequence[Row]) -> Row:
    """Return the settings of a method by dotted key, with intervals of the study's shares."""
    steps, tenth = args.steps, {"method.rank": 16, "method.merge_every": args.steps // 10}
    relora = {"method.name": "relora", **tenth, "method.restart_warmup": steps // 200}
    if name.endswith("-warm"):
        lr, _ = best(tuned, "full")
        if lr is None:
            raise SystemExit(f"{name} starts at full's best rate: add full to --only")
        start = {"method.warm_start_steps": steps // 4, "method.warm_start_lr": lr}
        lora = {"method.name": "lora", "method.rank": 16}
        return start | (relora if name == "relora-warm" else lora)
    if name == "pico-compat":
        return released(steps)
    if name == "pico-arithmetic":
        ours = ("optim.", "schedule.", "method.dropout")
        return {key: v for key, v in released(steps).items() if not key.startswith(ours)}
    made: dict[str, Row] = {
        "full": {"method.name": "full"},
        "relora": relora | {"method.warm_start_steps": 0},
        "bpt": {"method.name": "bpt", **tenth},
        "loro": {"method.name": "loro", "method.rank": 32},
    }
    return made[name]


def released(steps: int) -> Row:
    """Return the recipe's settings but the rate, at `steps` steps."""
    found = tomllib.loads(recipes.text(RECIPE))
    scaled = {key: found["method"][key] * steps // found["train"]["steps"]
              for key in ("merge_every", "restart_warmup")}  # fmt: skip
    sections = {
        "method": found["method"] | scaled,
        "optim": {key: found["optim"][key] for key in ("weight_decay", "clip")},
        "schedule": {key: found["schedule"][key] for key in ("kind", "floor")},
    }
    return {f"{name}.{key}": v for name, table in sections.items() for key, v in table.items()}


def grid(args: Any, blocks: Iterable[Row]) -> str:
    """Return the TOML of a grid with these blocks."""
    base = {"model.preset": args.preset, "model.intermediate_size": args.intermediate_size,
            "model.layers": args.layers, "data.path": str(args.data),
            "train.steps": args.steps, "train.batch_size": args.batch_size,
            "train.seq_len": args.seq_len, "train.precision": args.precision,
            "train.device": args.device, "train.compile": args.compile,
            "train.checkpoint_every": 0, "train.keep": 1, "train.keep_at": str(args.steps - 1),
            "schedule.kind": "cosine", "schedule.floor": 0.1,  # for bpt too, whose own falls to 0
            **settings(args.set)}  # fmt: skip
    tables = [("[base]", base), *(("[[grid]]", block) for block in blocks)]
    return "\n".join(
        f"{head}\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in of.items() if v is not None)
        for head, of in tables
    )


def train(args: Any, stage: str, blocks: Mapping[str, Row]) -> list[Row]:
    """Train the runs of blocks by method; return the entries of runs.json, with that method."""
    if not blocks:
        return []
    file, said = args.out / f"{stage}.toml", set[str]()
    write_atomically(file, grid(args, blocks.values()))

    def tell(status: Status) -> None:
        for name, result in (status.finished | status.failed).items():
            if name not in said:
                print(f"{stage} {name}: {result}", flush=True)
        said.update(status.finished, status.failed)

    try:
        compare(file, args.runs, args.workers, tell)
    except PeptrainError as error:
        raise SystemExit(str(error)) from error
    found = json.loads((args.runs / "runs.json").read_text(encoding="utf-8"))["runs"]
    labels = dict.fromkeys(run["configuration"] for run in found)  # in the order of the blocks
    method = dict(zip(labels, blocks, strict=True))
    return [run | {"method": method[run["configuration"]]} for run in found]


def tune(args: Any, names: Sequence[str]) -> list[Row]:
    """Train the rates that tune.csv lacks, delete what isn't the best, return all rows.

    One method after another, so that a call that is cut off loses the rates of one.
    """
    file = args.out / "tune.csv"
    tuned = rows_of(file)
    for name in names:
        have = {row["lr"] for row in tuned if row["method"] == name}
        if not (rates := [lr for lr in args.rates if lr not in have]):
            continue
        block = settings_of(name, args, tuned) | {"optim.lr": rates, "train.seed": 0}
        runs = train(args, "tune", {name: block})
        done = [run for run in runs if run["state"] in ("finished", "diverged")]
        tuned += [{key: run.get(key) for key in TUNED} for run in done]
        write_atomically(file, as_csv(TUNED, tuned))
        if len(done) < len(runs):
            raise SystemExit(f"failed runs, see {args.runs / 'logs'}; repeat the command to retry")
        for run in runs:
            if not args.keep_runs and run["lr"] != best(tuned, name)[0]:
                shutil.rmtree(args.runs / run["run"])
    return tuned


def judge_all(args: Any, names: Sequence[str], tuned: Sequence[Row]) -> None:
    """Train the best rates with all seeds and judge every run that measures.csv lacks."""
    file = args.out / "measures.csv"
    measured, blocks = rows_of(file), dict[str, Row]()
    have = {(row["method"], row["lr"], row["seed"]) for row in measured}
    for name in names:
        lr, _ = best(tuned, name)
        seeds = [seed for seed in range(args.seeds) if (name, lr, seed) not in have]
        if lr is not None and seeds:
            blocks[name] = settings_of(name, args, tuned) | {"optim.lr": lr, "train.seed": seeds}
    runs = train(args, "seeds", blocks)
    with ThreadPoolExecutor(args.workers) as pool:
        judging = {pool.submit(judge, args, run): run for run in runs}
        for one in as_completed(judging):
            measured += one.result()
            write_atomically(file, as_csv(MEASURED, measured))
            if not args.keep_runs:
                shutil.rmtree(args.runs / judging[one]["run"])


def judge(args: Any, run: Row) -> list[Row]:
    """Judge a run; return its rows. One that diverged has a held-out loss without a value."""
    place = args.runs / run["run"]
    about = {key: run[key] for key in ("method", "lr", "seed")}
    if run["state"] == "diverged":
        return [about | {"group": LOSS, "measure": "all", "value": None, "left_out": 0}]
    if run["state"] != "finished":
        raise SystemExit(f"{place.name}: {run['error']}; repeat the command to retry")
    given, kept = f"--device={args.device}", args.out / f"{run['method']}-{run['seed']}"
    domains = [f"--data={folder}" for folder in args.domains]
    call(args, place, "eval", str(place), "--tasks=blimp", f"--tasks-data={args.tasks_data}",
         *domains, given)  # fmt: skip
    call(args, place, "analyze", f"{place}@{args.steps}", f"--probe={args.probe}", given)
    shutil.copytree(place, kept, ignore=NOT_KEPT, dirs_exist_ok=True)
    values = [(LOSS, "all", run["held_out_loss"], 0), *evaluated(place, args.domains),
              *analyzed(read_table(place / "analysis" / f"{args.steps}.csv")),
              (MINUTES, "all", 60 * run["device_hours"], 0)]  # fmt: skip
    print(f"judged {run['method']}-{run['seed']}", flush=True)
    return [about | dict(zip(MEASURED[3:], found, strict=True)) for found in values]


def call(args: Any, run: Path, *command: str) -> None:
    """Run one `peptrain` command. Exits with the end of its output if it fails."""
    threads = max(1, cores() // args.workers)
    done = subprocess.run([sys.executable, "-m", "peptrain", *command], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True, check=False,
                          env={"OMP_NUM_THREADS": str(threads)} | os.environ)  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{run.name}: {done.stdout[-2000:]}")


def evaluated(place: Path, domains: Sequence[Path]) -> list[tuple[str, str, float, int]]:
    """Return group, measure, value and 0 of each domain, and of BLiMP and its categories."""
    entries = json.loads((place / "eval.json").read_text(encoding="utf-8"))
    losses = next(e["domains"] for e in reversed(entries) if "domains" in e)
    blimp = next(e for e in reversed(entries) if e.get("task") == "blimp")
    items = (place / "eval" / "blimp.jsonl").read_text(encoding="utf-8").splitlines()
    categories = sorted({json.loads(line)["groups"][1] for line in items})
    return [
        *((DOMAIN, folder.name, losses[str(folder)]["loss"], 0) for folder in domains),
        *((BLIMP, name, blimp["groups"][name]["acc"], 0) for name in categories),
        (BLIMP, "all", blimp["acc"], 0),
    ]


def analyzed(lines: Iterable[Row]) -> list[tuple[str, str, float | None, int]]:
    """Return group, measure, the mean over layers, and how many were not finite."""
    found: dict[tuple[str, str], list[float]] = {}
    for line in lines:
        matrix = str(line["module"]).rpartition(".")[2]
        matrix += " head" if matrix == "ov" and line["head"] != "sum" else ""
        for group, (column, what, scale) in COLUMNS.items():
            if matrix in MATRICES and line["what"] in what:
                value = line[column]
                known = scale(value) if math.isfinite(value) else math.nan
                found.setdefault((group, f"{line['what']} {matrix}"), []).append(known)
    made = []
    for (group, measure), values in found.items():
        finite = [value for value in values if math.isfinite(value)]
        mean = statistics.fmean(finite) if finite else None
        made.append((group, measure, mean, len(values) - len(finite)))
    return made


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__, preset="pico-tiny", precision="bf16-mixed")
    made.add_argument("--data", type=Path, required=True, help="prepared corpus")
    made.add_argument("--tasks-data", type=Path, required=True, help="with blimp/all.jsonl")
    made.add_argument("--domains", type=Path, nargs="+", required=True, metavar="DIR")
    made.add_argument("--out", type=Path, required=True, help="directory for the results")
    made.add_argument("--runs", type=Path, help="where runs are trained; unset: OUT/compare")
    made.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    made.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    made.add_argument("--seeds", type=int, default=3, help="seeds of the best rate, from 0")
    made.add_argument("--steps", type=int, default=600)
    made.add_argument("--batch-size", type=int, default=64)
    made.add_argument("--seq-len", type=int, default=512)
    made.add_argument("--probe", type=int, default=2, help="sequences of the gradients' batch")
    made.add_argument("--workers", type=int, default=2, help="runs at a time")
    made.add_argument("--keep-runs", action="store_true")
    made.add_argument("--no-compile", dest="compile", action="store_false")
    args = made.parse_args(argv)
    if len({folder.name for folder in args.domains}) < len(args.domains):
        made.error("--domains: two have the same name; rename one")
    args.runs = args.runs or args.out / "compare"
    args.out.mkdir(parents=True, exist_ok=True)
    device = device_of(args.device)
    shapes = {"steps": args.steps, "batch": f"{args.batch_size} x {args.seq_len}"}
    announce(device, {"model": args.preset, **shapes, "runs at a time": args.workers})
    # A warm start needs the best rate of full.
    tuned = tune(args, sorted(args.only, key=lambda name: name != "full"))
    judge_all(args, args.only, tuned)
    write(args, device, print_tables(args.out))


if __name__ == "__main__":
    main()
