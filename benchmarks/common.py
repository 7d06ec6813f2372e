"""Shared code of the benchmarks: rows, training without a run directory, clocks, tables, JSON.

A row is METHOD[:KEY=VALUE...], where KEY is a field of the method or, with a dot, of a section
(train.compile=false). Values are parsed as JSON; anything else is a string.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import peptrain.runs.environment
from peptrain.config import RunConfig, resolved
from peptrain.distributed.world import World
from peptrain.execution.forward_backward import CUDAGraphSteps, ReplicatedSteps
from peptrain.execution.prepare import prepare
from peptrain.methods import methods
from peptrain.methods.base import Method
from peptrain.models.hf import ModelConfig, count_parameters, vocabulary_size
from peptrain.optim import schedule
from peptrain.optim.adamw import clip_gradients, set_lr
from peptrain.runs.build import build, phase_at
from peptrain.runs.init_from import initial_weights
from peptrain.sections import TrainConfig
from peptrain.settings import toml
from peptrain.training.metrics import throughput
from peptrain.training.state import TrainState

GIB = 2**30
STEPS = 10_000
"""Number of steps for which the schedule and the intervals are configured. A benchmark runs only
the first few: the learning rate is still near 0, no merge is due, and random tokens can't make
training diverge."""


def device_of(name: str) -> torch.device:
    """Return the device; "auto" is a GPU if there is one."""
    on_gpu = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


# Rows.


def split_row(row: str) -> tuple[str, dict[str, Any]]:
    """Parse "bpt:rank=64" to ("bpt", {"rank": 64})."""
    name, *items = row.split(":")
    return name, settings(items)


def settings(items: Sequence[str]) -> dict[str, Any]:
    """Parse ["rank=64"] to {"rank": 64}."""
    return {key: _value(text) for key, text in (item.split("=", 1) for item in items)}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def configured(
    row: str,
    base: RunConfig[Any],
    given: Sequence[str] = (),
    *,
    device: torch.device,
    world_size: int = 1,
) -> RunConfig[Method]:
    """Return `base`, resolved, with the row's method, `given` and the row's own settings.

    The row's own settings take precedence over `given`. Warm starts are full training, so they are
    left out unless the row sets one.
    """
    name, own = split_row(row)
    cls, over = methods()[name], settings(given) | {k: v for k, v in own.items() if "." in k}
    cold = {"warm_start_steps": 0} if "warm_start_steps" in {f.name for f in fields(cls)} else {}
    mine = {k: v for k, v in own.items() if "." not in k}
    config = replace(base, method=toml.parse(cls, cold | mine, "method."))
    for key, value in over.items():
        config = _set(config, key, value)
    return resolved(config, world_size=world_size, on_gpu=device.type == "cuda")


def _set(config: RunConfig[Method], key: str, value: Any) -> RunConfig[Method]:
    section, _, name = key.partition(".")
    old = getattr(config, section)
    hints = get_type_hints(type(old))
    if name not in hints:
        raise SystemExit(toml.unknown(key, [f"{section}.{known}" for known in hints]))
    new = replace(old, **{name: toml.parse_value(hints[name], value, key)})
    return replace(config, **{section: new})


def base_config(
    model: ModelConfig, rows: int, seq_len: int, *, steps: int = STEPS, **train: Any
) -> RunConfig[Any]:
    """Configure full training with `rows` sequences a step in one micro-batch, without periodic
    evaluations or checkpoints."""
    shape = {"batch_size": rows, "micro_batch": rows, "seq_len": seq_len, "steps": steps}
    quiet = {"eval_every": 0, "checkpoint_every": 0}
    return RunConfig(
        method=methods()["full"](), model=model, train=TrainConfig(**{**shape, **quiet, **train})
    )


# A model in training.


@dataclass
class Training:
    """A model in training, without a run directory or a corpus."""

    config: RunConfig[Method]
    here: World
    train_state: TrainState

    def sizes(self) -> dict[str, int | bool]:
        model, steps = self.train_state.model, self.train_state.forward_backward
        steps = steps.steps if isinstance(steps, ReplicatedSteps) else steps
        return {
            "parameters": count_parameters(model),
            "trainable": count_parameters(model, trainable=True),
            "recorded": isinstance(steps, CUDAGraphSteps),
        }


def start(
    config: RunConfig[Method],
    device: torch.device,
    *,
    quick: bool = True,
    here: World | None = None,
) -> Training:
    """Build what the trainer builds at step 0; with `quick`, draw the weights on the device.

    here: unset for a training of one process.
    """
    here = here or World(0, 1, device)
    phase, end = phase_at(config, 0)
    dense = initial_weights(config)
    with drawn_on(device) if quick else nullcontext():
        model = build(config, phase, dense)
    optimizer, forward_backward = prepare(model, config, here, phase)
    moves = config.method.schedule(schedule.build(config.schedule, config.train.steps))
    return Training(
        config, here, TrainState(model, forward_backward, optimizer, moves, phase, 0, end)
    )


class OnDevice(TorchDispatchMode):
    """Run every operation on `device` with its own generator, whatever device a method asks for."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*tree_map(self._sent, args), **tree_map(self._sent, kwargs or {}))
        # torch.tensor(..., device="cpu") and from_numpy pass no device, but call lift_fresh.
        return made.to(self.device) if func is torch.ops.aten.lift_fresh.default else made

    def _sent(self, given: Any) -> Any:
        if isinstance(given, torch.Generator):
            return None
        on_cpu = isinstance(given, torch.device) and given.type == "cpu"
        return self.device if on_cpu else given


@contextmanager
def drawn_on(device: torch.device) -> Iterator[None]:
    """Build models on `device` with its own random numbers; on a CPU as the library does.

    The distributions are those of the library's draws on the CPU. It takes seconds instead of
    minutes.
    """
    if device.type == "cpu":
        yield
        return
    torch.manual_seed(0)
    with torch.device(device), OnDevice(device):
        yield


def step(training: Training, windows: Tensor) -> Tensor:
    """Take one optimizer step on `windows`, as the trainer does, and return the loss."""
    train_state = training.train_state
    set_lr(train_state.optimizer, train_state.schedule(train_state.step))
    loss = train_state.forward_backward([windows])
    clip, every = training.config.optim.clip, training.config.train.log_every
    if clip or (train_state.step + 1) % every == 0:
        clip_gradients(train_state.model, clip)
    with training.here.sharing():
        train_state.optimizer.step()
    train_state.optimizer.zero_grad()
    train_state.step += 1
    return loss


def random_windows(training: Training, count: int = 4) -> list[Tensor]:
    """Return batches of random token ids of this process's share of a batch, on the device."""
    t, device = training.config.train, training.here.device
    shape = (t.batch_size // training.here.size, t.seq_len + 1)
    generator = torch.Generator().manual_seed(0)
    vocabulary = vocabulary_size(training.train_state.model)
    return [torch.randint(vocabulary, shape, generator=generator).to(device) for _ in range(count)]


def step_times(training: Training, steps: int, warm_up: int) -> list[float]:
    """Return the milliseconds of each of `steps` steps after `warm_up` steps."""
    windows = random_windows(training)
    for i in range(warm_up):
        step(training, windows[i % len(windows)])
    turn = iter(range(steps))
    return times(
        lambda: step(training, windows[next(turn) % len(windows)]), steps, training.here.device
    )


def free() -> None:
    """Free the memory of everything no longer referenced, including compiled graphs."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# Clocks and memory.


def times(action: Callable[[], object], repeat: int, device: torch.device) -> list[float]:
    """Return the milliseconds of each of `repeat` calls, synchronising a GPU only at the end."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(repeat):
            action()
            marks.append(time.perf_counter())
        return [1e3 * (b - a) for a, b in pairwise(marks)]
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeat + 1)]
    events[0].record()
    for event in events[1:]:
        action()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def waited(action: Callable[[], object], device: torch.device) -> float:
    """Return the milliseconds of one call, host and device work included."""
    synchronize(device)
    begin = time.perf_counter()
    action()
    synchronize(device)
    return 1e3 * (time.perf_counter() - begin)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


CLOCKS = ("wall", "cpu")


@dataclass
class Marks:
    """Times at which intervals of steps ended, as wall-clock time and this process's CPU time."""

    ends: list[tuple[float, float]] = field(default_factory=list)

    def mark(self) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))

    def rates(self, tokens: int) -> dict[str, list[float]]:
        """Return tokens per second of each interval except the first, which includes start-up."""
        gaps = [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(self.ends)]
        return {
            "wall": [throughput(tokens, wall) for wall, _ in gaps],
            "cpu": [throughput(tokens, cpu) for _, cpu in gaps],
        }


def reset_peak() -> None:
    """Reset both peaks, so that they don't include building the model."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peaks() -> dict[str, int]:
    """Return peak bytes since the last reset, of tensors and of the allocator; 0 without a GPU."""
    on_gpu = torch.cuda.is_available()
    return {
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else 0,
    }


def module_bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Format the median and, in brackets, both quartiles."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


# Output.


def environment(device: torch.device) -> dict[str, object]:
    """Return versions and the device, but not the commit."""
    found = peptrain.runs.environment.environment(World(0, 1, device))
    for name in ("triton", "peft", "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def announce(device: torch.device, shapes: dict[str, Any]) -> None:
    """Print the lines above a table: versions and device, then dtype and shapes."""
    print(", ".join(f"{k} {v}" for k, v in environment(device).items()))
    print("; ".join(f"{k} {v}" for k, v in shapes.items()) + "\n", flush=True)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table."""
    for cells in (header, ["---"] * len(header), *rows):
        print("| " + " | ".join(str(cell) for cell in cells) + " |")
    print(flush=True)


def write(args: argparse.Namespace, device: torch.device, rows: Sequence[dict[str, Any]]) -> None:
    """Write all measurements and the environment to the file of --json, if given."""
    if args.json is None:
        return
    found = {"environment": environment(device), "arguments": vars(args), "rows": list(rows)}
    text = json.dumps(found, indent=1, default=str)  # paths
    args.json.write_text(f"{text}\n", encoding="utf-8")


def parser(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Create a parser with the arguments shared by all benchmarks of models."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--preset", default="llama-1b")
    made.add_argument("--intermediate-size", type=int, help="f, instead of the preset's")
    made.add_argument("--layers", type=int, help="L, instead of the preset's")
    made.add_argument("--precision", default="bf16")
    made.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    made.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    made.add_argument("--json", type=Path, help="write all measurements to this file")
    made.set_defaults(**defaults)
    return made


def model_of(args: argparse.Namespace) -> ModelConfig:
    return ModelConfig(
        preset=args.preset, intermediate_size=args.intermediate_size, layers=args.layers
    )


def described(config: RunConfig[Method]) -> dict[str, Any]:
    """Return the settings of a row, for its JSON."""
    return {"method": config.method.name} | asdict(config.method) | {"train": asdict(config.train)}
