"""Run every check that needs a GPU with one command, and print a line for each.

    python benchmarks/smoke.py [--device cpu] [--only NAME ...] [--out DIR]

The checks are every benchmark at a tiny size, the GPU tests, and runs of the command, compiled and
with CUDA graphs. Each check is a process with a time limit, so that a crash or a hang does not
affect the others. The exit status is 1 if any check failed. The output of failed checks is in DIR.
--device cpu runs the same on the CPU, without the GPU tests, compilation and CUDA graphs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent

MODEL = (
    "--preset=tiny --layers=1 --intermediate-size=96 --set=model.hidden_size=64"
    " --set=model.heads=2 --set=model.vocab_size=320 --device={device}"
)
COMPILED = f"{MODEL} --set=train.compile={{compile}}"
ROWS = "bpt:rank=4 relora:rank=4 loro:rank=4"
RUN = "--data={corpus} --batch-size=2 --seq-len=16 --steps=4"
SCRIPTS = {
    "study": f"{MODEL} --data={{corpus}} --tasks-data={{tasks}} --domains {{corpus}}"
    " --out={out}/study --steps=20 --batch-size=2 --seq-len=64 --probe=1 {no_compile}"
    " --only full bpt --rates 1e-3 --seeds=1",
    "scale": f"{COMPILED} --out={{out}}/scale --ranks {{ranks}} --tokens 32 64 --seq-len=16"
    f" --steps=2 --warm-up=1 --repeat=1 full {ROWS}",
    "speed": f"{COMPILED} --tokens 32 64 --seq-len=16 --steps=2 --warm-up=1"
    f" {ROWS} full:train.precision=fp32 spectron:rank=4:rule=lora-muon",
    "dynamics": f"{MODEL} --data={{corpus}} --out={{out}} --runs={{out}}/runs --steps=8 --rank=4"
    " --batch-size=2 --seq-len=16 --probe=1 --processes=1 {no_compile} --seeds 0"
    " --only relora-warm",
    "tasks": f"{MODEL} --data={{corpus}} --tasks-data={{tasks}} --out={{out}}/judged --steps=4"
    " --rank=4 --batch-size=2 --seq-len=64 {no_compile} --seeds 0 --only full bpt",
    "loop": f"{COMPILED} {RUN} --log-every=2 --rounds=2 full loro",
    "tune": f"{MODEL} --data={{corpus}} --tasks-data={{tasks}} --out={{out}}/tune --steps=4"
    " --rank=4 --batch-size=2 --seq-len=16 {no_compile} --workers=1 --tasks cola"
    " --tune-batch-size=4 --tune-seq-len=16 --epochs cola=1 --seeds 1"
    " --only full@0:full full:loro --rates full=1e-4 loro=1e-4,1e-3",
    "cpu_peft": f"{MODEL} --set=train.compile=false {RUN} --log-every=2 --rounds=1"
    " lora:rank=4 lora:rank=4:train_rest=false full",
    "inference": f"{COMPILED} --rank=4 --cells 2x8 1x16 --logits=last {{no_compile}} {{graph}}",
    "soak": "--runs=3 --workers=1",
    "merges": f"{COMPILED} --rows-of-step=2 --seq-len=16 --steps=2 --warm-up=1 --repeat=2 {ROWS}",
    "budget": f"{COMPILED} --tokens=32 --seq-len=16 --steps=8 full {ROWS}",
    "first_table": "one --data={corpus} --preset=tiny --steps=2 --batch-size=2 --micro-batch=2"
    " {no_compile} bpt:1e-3:0:rank=4:merge_every=1",
    "fast_forms": f"{MODEL} {{eager}} {RUN} --seeds=1"
    " bpt:rank=4:merge_every=2 loro:rank=4:exact_every=2",
    "estimate": f"{MODEL} --presets tiny --rows-of-step=8 --seq-len=16"
    f" {ROWS} bpt:rank=4:train.micro_batch=1",
    "corruption": "--only begun/checkpoints/*6/SHA256SUMS unfinished/train-*.bin --flips=0",
    "exact_step": "--device={device} --layers=1 --width=64 --mlp=96 --rank=4 --streams 2",
    "data": "{text} --tokenizer={corpus}/tokenizer.json --megabytes=0.05 --seconds=0.05",
}
"""Arguments of every script, the longest first. Braces stand for what depends on the device and on
paths of files."""
SHARDS = {"test_gpu.py": (4, 4), "test_replicas.py": (1, 4)}
"""Checks that a file of GPU tests is divided into, where it would take longer than all others: with
one GPU, and with several."""
NEEDS = {"cpu_peft": ("peft", "accelerate"), "data": ("pyarrow",)}
"""Packages that a script needs; without them it is skipped."""

TRAINING = (
    "--data.path={corpus} --model.layers=1 --model.hidden-size=64 --model.intermediate-size=96"
    " --model.heads=2 --model.vocab-size=320 --train.steps=8 --train.batch-size=4"
    " --train.micro-batch=2 --train.seq-len=16 --train.log-every=1 --train.eval-every=0"
    " --train.device={device} --train.compile={compile} --train.cuda-graph={compile}"
)
TRAININGS = {
    "train-full": "full",
    "train-bpt": "bpt --method.rank=4 --method.merge-every=3",
    "train-relora": "relora --method.rank=4 --method.warm-start-steps=2 --method.merge-every=3",
    "train-loro": "loro --method.rank=4 --method.exact-every=3",
}
"""Training runs, with a change of phase, merges and exact steps among them, by one process and by
two where there are two GPUs."""


@dataclass(frozen=True)
class Check:
    """A command that needs packages and must succeed within `limit` seconds."""

    name: str
    command: Sequence[str]
    needs: Sequence[str] = ()
    limit: float = 240
    tells: bool = False
    """Whether to print the last line of its output, a summary, on success."""

    def missing(self) -> str:
        """Return the names of the missing packages, or an empty string."""
        return ", ".join(name for name in self.needs if find_spec(name) is None)


def arguments(text: str, *, device: str, folder: Path) -> list[str]:
    """Fill in the braces of an entry of the tables and split it into arguments."""
    eager = device == "cpu"
    known = {
        "device": device,
        "corpus": str(folder / "corpus"),
        "text": str(folder / "text.txt"),
        "out": str(folder / "out"),
        "tasks": str(folder / "tasks"),
        "compile": "false" if eager else "true",
        "eager": "--set=train.compile=false" if eager else "",
        "no_compile": "--no-compile" if eager else "",
        "graph": "" if eager else "--cuda-graph",
        "ranks": "1 2" if two_ranks(device) else "1",
    }
    return [word for part in text.split() for word in part.format(**known).split()]


@cache
def two_ranks(device: str) -> bool:
    """Return whether there are two devices for two processes."""
    import torch

    return device == "cpu" or torch.cuda.device_count() > 1


def make_corpus(folder: Path) -> None:
    """Write the project's documentation as text, prepare it with 320 token ids; items of tasks."""
    from peptrain.data import PrepareConfig, prepare

    documents = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    text = folder / "text.txt"
    text.write_text("\n\n".join(d.read_text(encoding="utf-8") for d in documents), encoding="utf-8")
    prepare(PrepareConfig(inputs=(text,), out=folder / "corpus", vocab_size=320, held_out=0.02))
    choices = {"sol1": "Turn the key.", "sol2": "Eat the key."}
    pair = {"sentence_good": "Both doors open.", "sentence_bad": "Both doors opens."}
    items = {
        "piqa/validation": [{"goal": f"Open {n}.", **choices, "label": n % 2} for n in range(6)],
        "cola/train": [{"sentence": f"Turn key {n}.", "label": n % 2} for n in range(8)],
        "cola/validation": [{"sentence": f"Open {n}.", "label": n % 2} for n in range(6)],
        "blimp/all": [pair | {"UID": t, "linguistics_term": t} for t in ("binding", "island")],
    }
    for name, made in items.items():
        file = folder / "tasks" / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(item) + "\n" for item in made), encoding="utf-8")


def all_checks(device: str, folder: Path) -> list[Check]:
    """Return all checks, longest first, because several run at a time."""
    tests = [] if device == "cpu" else gpu_tests(several=two_ranks(device))
    return [*tests, *trainings(device, folder), *scripts(device, folder)]


def gpu_tests(*, several: bool) -> Iterator[Check]:
    """Yield a check for each file with GPU tests, or several, so that they run at a time.

    They drop the project's pytest options for parallel runs, so that only pytest needs to be
    installed.
    """
    pytest = [sys.executable, "-m", "pytest", "-o", "addopts=", "-m", "gpu", "--no-header"]
    for file in sorted((ROOT / "tests").rglob("test_*.py"), reverse=True):  # the longest first
        if "mark.gpu" in file.read_text("utf-8"):
            name = f"gpu-{file.stem.removeprefix('test_')}"
            count = SHARDS.get(file.name, (1, 1))[several]
            for k in range(1, count + 1):
                shard = [f"--shard={k}/{count}"] if count > 1 else []
                named = f"{name}-{k}" if count > 1 else name
                line = [*pytest, *shard, str(file)]
                yield Check(named, line, needs=("pytest",), limit=540, tells=True)


def trainings(device: str, folder: Path) -> Iterator[Check]:
    for name in TRAININGS:
        words = training_arguments(name, device=device, folder=folder)
        yield Check(name, [sys.executable, "-m", "peptrain", *words])
        if two_ranks(device):
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            line = [*torchrun, "--nproc-per-node=2", "-m", "--", "peptrain", *words]
            yield Check(f"{name}-2", [*line, f"--run={folder / name}-2"])


def training_arguments(name: str, *, device: str, folder: Path) -> list[str]:
    """Return the arguments of `peptrain`; the run directory is `folder` / `name`."""
    words = arguments(f"train {TRAININGS[name]} {TRAINING}", device=device, folder=folder)
    return [*words, f"--run={folder / name}"]


def scripts(device: str, folder: Path) -> Iterator[Check]:
    for name, text in SCRIPTS.items():
        words = arguments(text, device=device, folder=folder)
        command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *words]
        yield Check(name, command, NEEDS.get(name, ()))


@dataclass
class Running:
    """A check's process, in a group with its children, and the file of their output."""

    check: Check
    file: Path
    env: Mapping[str, str] | None = None
    start: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.output: IO[bytes] = self.file.open("wb")
        self.process = subprocess.Popen(
            self.check.command,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            env=self.env,
            process_group=0,
        )

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def over(self) -> bool:
        return self.process.poll() is not None or self.seconds > self.check.limit

    def end(self) -> str | None:
        """End the process group, by SIGKILL if it still runs; return the error or None."""
        code = self.process.poll()
        if code is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.output.close()
        if code is None:
            return f"no end after {self.check.limit:.0f} s"
        return None if code == 0 else last_line(self.file) or f"exit status {code}"


def last_line(file: Path) -> str:
    """Return the first 200 characters of the last line that isn't blank."""
    lines = file.read_text("utf-8", errors="replace").split("\n")
    return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "")


def run(
    checks: Sequence[Check], out: Path, jobs: int = 1, env: Mapping[str, str] | None = None
) -> list[str]:
    """Run the checks, print a line as each ends and return the names of those that failed."""
    waiting, failed = list(checks), list[str]()
    running: list[Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                check = waiting.pop(0)
                running.append(Running(check, out / f"{check.name}.txt", env))
            time.sleep(0.02)
            for one in [one for one in running if one.over()]:
                running.remove(one)
                failed += [] if passed(one) else [one.check.name]
    finally:
        for one in running:
            one.end()
    return failed


def passed(one: Running) -> bool:
    """End a check, print its line and return whether it passed.

    Its output is kept only if it failed.
    """
    seconds, error = one.seconds, one.end()
    told = last_line(one.file) if one.check.tells else ""
    if error is None:
        one.file.unlink()
    say("FAIL" if error else "ok", one.check.name, seconds, error or told)
    return error is None


def say(status: str, name: str, seconds: float, reason: str) -> None:
    print(f"{status:<6}{name:<15}{seconds:6.1f} s  {reason}".rstrip(), flush=True)


def inherited(device: str) -> dict[str, str]:
    """Return this process's environment, with the GPUs hidden if the device is the CPU."""
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return os.environ | {"PYTHONUNBUFFERED": "1"} | hidden


def chosen(checks: Sequence[Check], only: Sequence[str] | None) -> list[Check]:
    names = [check.name for check in checks]
    if unknown := set(only or ()) - set(names):
        raise SystemExit(f"no check {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return [check for check in checks if check.name in (only or names)]


def able(checks: Sequence[Check]) -> list[Check]:
    """Return the checks whose packages are installed, and print the others as skipped."""
    for check in checks:
        if missing := check.missing():
            say("skip", check.name, 0, f"needs {missing}")
    return [check for check in checks if not check.missing()]


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="peptrain-smoke-") as folder:
        checks = chosen(all_checks(args.device, Path(folder)), args.only)
        make_corpus(Path(folder))
        out = args.out or Path(tempfile.mkdtemp(prefix="peptrain-smoke-failed-"))
        out.mkdir(parents=True, exist_ok=True)
        runnable = able(checks)
        failed = run(runnable, out, args.jobs, inherited(args.device))
    counts = f"{len(runnable) - len(failed)} ok, {len(failed)} failed"
    skipped = len(checks) - len(runnable)
    print(f"\n{counts}, {skipped} skipped in {time.perf_counter() - start:.0f} s")
    if failed:
        print(f"what they printed: {', '.join(str(out / f'{name}.txt') for name in failed)}")
    elif args.out is None:
        out.rmdir()
    return 1 if failed else 0


def parsed(argv: list[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    made.add_argument("--only", nargs="+", metavar="NAME", help="run only these checks")
    made.add_argument("--out", type=Path, metavar="DIR", help="default: a temporary one")
    made.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2),
                      help="parallel checks (default: one per two cores)")  # fmt: skip
    return made.parse_args(argv)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that running checks end too
    sys.exit(main())
