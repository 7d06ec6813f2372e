"""Measure the first table: loss, trainable parameters, tokens/s and peak memory by method.

    python benchmarks/first_table.py prepare --texts DIR --tokenizer FILE --data OUT
    python benchmarks/first_table.py speed   --data OUT [--micro-batch 128]
    python benchmarks/first_table.py sweep   --data OUT --results FILE RUN [RUN ...]
    python benchmarks/first_table.py table   FILE [FILE ...]

A RUN is METHOD:LR:SEED[:KEY=VALUE...], where KEY is a field of the method. `sweep` runs --per-gpu
runs at a time on each GPU, so only `speed` measures speed. tyro is not needed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch

from peptrain.config import RunConfig
from peptrain.data import PrepareConfig, prepare
from peptrain.methods import methods
from peptrain.models.hf import ModelConfig
from peptrain.optim.adamw import OptimConfig
from peptrain.optim.schedule import ScheduleConfig
from peptrain.sections import DataConfig, TrainConfig
from peptrain.settings import toml
from peptrain.training.loop import train

OWN = {"bpt": {"merge_every": 150}, "loro": {"exact_every": 150}}
"""Settings of the pilot; all others are the method's defaults."""


def configuration(run: str, args: argparse.Namespace, directory: Path) -> RunConfig:
    """Return the pilot's settings: llama-60m, r = 128, 512 x 256 tokens a step, cosine to 0.1."""
    name, lr, seed, *rest = run.split(":")
    given = {k: json.loads(v) for k, v in (item.split("=", 1) for item in rest)}
    rank = {} if name == "full" else {"rank": 128}
    fields = {**rank, **OWN.get(name, {}), **given}
    return RunConfig(
        method=toml.parse(methods()[name], fields, "method."),
        model=ModelConfig(preset=args.preset),
        optim=OptimConfig(lr=float(lr)),
        schedule=ScheduleConfig(kind="cosine", floor=0.1),
        train=TrainConfig(
            steps=args.steps,
            batch_size=args.batch_size,
            micro_batch=args.micro_batch,
            seq_len=256,
            seed=int(seed),
            compile=args.compile,
            log_every=20,
            eval_every=0,
            checkpoint_every=0,
            keep=1,
        ),
        data=DataConfig(path=args.data),
        run=directory / run.replace(":", "_"),
    )


def run_one(args: argparse.Namespace) -> None:
    """Train one RUN and print a line of JSON."""
    with tempfile.TemporaryDirectory() as directory:
        config = configuration(args.run[0], args, Path(directory))
        result = train(config)
    row = {"run": args.run[0], "steps": args.steps, "preset": args.preset}
    row |= {k: v for k, v in asdict(result).items() if k not in ("run", "held_out")}
    row |= asdict(result.held_out) | environment()
    print(json.dumps(row), flush=True)


def environment() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "torch": torch.__version__, "transformers": version("transformers")}


def sweep(args: argparse.Namespace) -> None:
    """Train all RUNs, each in its own process, --per-gpu at a time on every GPU."""
    waiting: queue.Queue[str] = queue.Queue()
    for run in args.run:
        waiting.put(run)
    slots = [gpu for gpu in range(max(1, torch.cuda.device_count())) for _ in range(args.per_gpu)]
    workers = [threading.Thread(target=work, args=(waiting, gpu, args)) for gpu in slots]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def work(waiting: queue.Queue[str], gpu: int, args: argparse.Namespace) -> None:
    while True:
        try:
            run = waiting.get_nowait()
        except queue.Empty:
            return
        command = [sys.executable, __file__, "one", *shared_flags(args), run]
        env = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            print(f"{run}: failed\n{done.stderr[-1500:]}", flush=True)
            continue
        line = done.stdout.strip().splitlines()[-1]
        with args.results.open("a") as file:
            file.write(line + "\n")
        row = json.loads(line)
        print(f"{run}: {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tok/s", flush=True)


def shared_flags(args: argparse.Namespace) -> list[str]:
    names = ("data", "steps", "batch_size", "micro_batch", "preset")
    flags = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in names]
    return flags + ([] if args.compile else ["--no-compile"])


def speed(args: argparse.Namespace) -> None:
    """Train short runs, one at a time on each GPU."""
    args.per_gpu = 1
    args.run = list(SPEED_RUNS)
    args.steps = args.speed_steps
    sweep(args)
    table(args)


SPEED_RUNS = (
    "full:1e-3:0",
    "bpt:1e-3:0",
    "lora:1e-3:0",
    "relora:1e-3:0:warm_start_steps=0",
    "lowrank:1e-3:0",
    "loro:1e-2:0",
)


def prepare_texts(args: argparse.Namespace) -> None:
    """Prepare the pilot's corpus: training shards, and validation files as held-out text."""
    texts = sorted(args.texts.glob("*.jsonl.xz"))
    held_out = tuple(t for t in texts if "valid" in t.name)
    train_on = tuple(t for t in texts if "valid" not in t.name)
    config = PrepareConfig(
        inputs=train_on, held_out_inputs=held_out, tokenizer=args.tokenizer, out=args.data
    )
    print(prepare(config))


def table(args: argparse.Namespace) -> None:
    """Print rows sorted by method, learning rate and seed, with speed relative to the first full
    run."""
    files = args.files or [args.results]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    full = next((r["tokens_per_second"] for r in rows if r["run"].startswith("full")), None)
    print(f"{rows[0]['device']}, torch {rows[0]['torch']}, transformers {rows[0]['transformers']}")
    print("| run | held-out loss | ppl | trainable / total | state MB | tokens/s | vs full | GiB |")
    print("|---|---|---|---|---|---|---|---|")
    for row in sorted(rows, key=lambda r: r["run"]):
        ratio = f"{row['tokens_per_second'] / full:.2f}" if full else ""
        print(
            f"| {row['run']} | {row['loss']:.4f} | {math.exp(row['loss']):.1f}"
            f" | {row['trainable'] / 1e6:.1f}M / {row['parameters'] / 1e6:.1f}M"
            f" | {row['state_bytes'] / 1e6:.0f} | {row['tokens_per_second']:,.0f} | {ratio}"
            f" | {row['peak_bytes'] / 2**30:.1f} |"
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for name, call in COMMANDS.items():
        command = commands.add_parser(name)
        command.set_defaults(call=call, files=[])
        command.add_argument("--data", type=Path)
        command.add_argument("--texts", type=Path)
        command.add_argument("--tokenizer", type=Path)
        command.add_argument("--results", type=Path, default=Path("results.jsonl"))
        command.add_argument("--preset", default="llama-60m")
        command.add_argument("--steps", type=int, default=600)
        command.add_argument("--speed-steps", type=int, default=60)
        command.add_argument("--batch-size", type=int, default=512)
        command.add_argument("--micro-batch", type=int, default=128)
        command.add_argument("--per-gpu", type=int, default=1)
        command.add_argument("--no-compile", dest="compile", action="store_false")
        if name == "table":
            command.add_argument("files", type=Path, nargs="+")
        elif name in ("one", "sweep"):
            command.add_argument("run", nargs="+")
    args = parser.parse_args(argv)
    args.call(args)


COMMANDS = {
    "prepare": prepare_texts,
    "one": run_one,
    "speed": speed,
    "sweep": sweep,
    "table": table,
}

if __name__ == "__main__":
    main()
