"""Run directories and comparisons written directly, without a training."""

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peptrain.analysis.table import write_tables

Row = dict[str, Any]
TOKENS = 2 * 8
"""Of a step."""


def steps(last: int, *, every: int = 2, seed: int = 0, events: bool = False) -> list[Row]:
    """The rows of a training without its end, an evaluation at every fourth row."""
    draw, found = random.Random(seed), list[Row]()
    for n, step in enumerate(range(every, last + 1, every)):
        timed = {"seconds": step * 0.5, "time": 1e9 + step}
        row = {"event": "step", "step": step, "loss": 6 * math.exp(-step / last) + draw.random(),
               "lr": 1e-3, "grad_norm": 1 + draw.random(), "tokens": step * TOKENS,
               "tokens_per_second": 100.0 + n}  # fmt: skip
        if events and n % 3 == 2:
            row |= {"merges": n // 3 + 1} | ({"resets": 1} if n % 2 else {})
        found.append(row | timed)
        if n % 4 == 3:
            found.append({"event": "eval", "step": step, "held_out_loss": row["loss"]} | timed)
    return found


def end(step: int, loss: float = 3.0, **given: Any) -> Row:
    return {"event": "end", "step": step, "held_out_loss": loss, "trainable": 1000,
            "state_bytes": 8000, "tokens_per_second": 100.0, "seconds": step * 0.5,
            "flops_per_token": 10.0, **given}  # fmt: skip


def dynamics(
    at: Sequence[int], *, layers: int = 3, seed: int = 0, what: str = "weight",
    modules: Sequence[str] = ("self_attn.q_proj", "mlp.down_proj"),
) -> list[Row]:  # fmt: skip
    """The rows of train.observe."""
    draw = random.Random(seed)
    return [
        {"event": "dynamics", "step": step, "layer": layer, "module": module, "what": what,
         "per": 0.5 + draw.random() / 4, "condition": 10 + draw.random(),
         "frobenius": 1 + draw.random()}
        for step in at for layer in range(layers) for module in modules
    ]  # fmt: skip


def run(
    path: Path, rows: Sequence[Mapping[str, Any]] = (), *, data: str = "text", **settings: Any
) -> Path:
    """Write a run directory. settings: optim_lr=1e-3 is lr in [optim]."""
    (path / "checkpoints").mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "env.json").write_text(json.dumps([{"data": data}]))
    given = {"method_name": "full", "train_batch_size": 2, "train_seq_len": 8, "train_seed": 0,
             "train_steps": 40, "optim_lr": 1e-3} | settings  # fmt: skip
    text = "".join(
        f"{key.replace('_', '.', 1)} = {json.dumps(value)}\n" for key, value in given.items()
    )
    (path / "config.toml").write_text(text)
    return path


def finished(path: Path, **settings: Any) -> Path:
    """A run of 40 steps with merges and dynamics."""
    seed = settings.get("train_seed", 0)
    rows = [*steps(40, seed=seed, events=True), *dynamics((10, 20, 40), seed=seed), end(40)]
    rows.insert(4, {"event": "phase", "step": 8, "phase": 1, "trainable": 1000})
    return run(path, rows, **settings)


MODULES = ("self_attn.q_proj", "mlp.down_proj")


def analyzed(path: Path, what: str = "from_start", seed: int = 3) -> Path:
    """Add the tables of an analysis at steps 20 and 40."""
    draw = random.Random(seed)
    for step in (20, 40):
        lines, spectra = (
            ["run,step,layer,module,what,head,per"],
            ["run,step,layer,module,what,head,sigma"],
        )
        for layer in range(2):
            for module in MODULES:
                sigma = " ".join(f"{draw.random() * step / 40:.6e}" for _ in range(8))
                lines.append(f"x,{step},{layer},{module},{what},,0.5")
                spectra.append(f"x,{step},{layer},{module},{what},,{sigma}")
        texts = {"csv": lines, "spectra.csv": spectra}
        files = {suffix: "\n".join(text) + "\n" for suffix, text in texts.items()}
        write_tables(path / "analysis", f"{step}", files, {})
    return path


def rewrite(path: Path, text: str, step: int = 40) -> None:
    """Replace the singular values of a step by `text`, as another analysis would."""
    table = (path / f"analysis/{step}.csv").read_text()
    write_tables(path / "analysis", f"{step}", {"csv": table, "spectra.csv": text}, {})


def with_circuits(path: Path, per_rank: Mapping[int, Sequence[str]], seed: int = 0) -> Path:
    """Add a table of `analyze` with the OV circuits of two heads and their sum, which is by step
    and layer, to a run."""
    draw = random.Random(seed)
    for step, values in per_rank.items():
        lines = ["run,step,layer,module,what,head,per,per_rank,condition,frobenius"]
        for layer, value in enumerate(values):
            lines.append(f"x,{step},{layer},mlp.down_proj,weight,,0.9,0.9,9,1")
            lines += [f"x,{step},{layer},ov,weight,{h},0.1,{draw.random()},7,1" for h in (0, 1)]
            lines.append(f"x,{step},{layer},ov,weight,sum,0.2,{value},{value}e3,1")
        write_tables(path / "analysis", f"{step}", {"csv": "\n".join(lines) + "\n"}, {})
    return path


def line(path: Path, losses: Sequence[float]) -> Path:
    """The directory of `analyze --line`."""
    rows = [f"a@1,b@1,{n / 10},{loss},640" for n, loss in enumerate(losses)]
    text = "\n".join(["one,other,alpha,loss,tokens", *rows]) + "\n"
    write_tables(path, "line", {"csv": text}, {})
    return path


RATES = (1e-3, 2e-3, 4e-3, 8e-3)
LOSSES = {"full": 3.0, "relora": 3.1, "bpt": 3.4, "loro": 3.05, "loro rank=<8>": 3.2}
BEST = {"full": 2e-3, "relora": 8e-3, "bpt": 4e-3, "loro": 1e-3, "loro rank=<8>": 2e-3}


def comparison(path: Path) -> Path:
    """A comparison of forty: five configurations at four rates with two seeds, one diverged."""
    trials, lines = [], []
    for label, loss in LOSSES.items():
        for lr in RATES:
            for seed in (0, 1):
                name = f"{label.replace(' ', '-')}-lr{lr:g}-seed{seed}"
                diverged = label == "bpt" and lr == 8e-3
                away = math.log2(lr / BEST[label])
                of = loss + 0.1 * away**2 + 0.01 * seed
                last = {"event": "diverged", "step": 40, "error": "the loss is nan"}
                row = last if diverged else end(40, of, trainable=len(label) * 1000)
                place = run(path / "runs" / name, [*steps(40, seed=seed), row],
                            optim_lr=lr, train_seed=seed, method_name=label)  # fmt: skip
                trials.append({
                    "run": str(place.relative_to(path)), "configuration": label, "lr": lr,
                    "seed": seed, "state": "diverged" if diverged else "finished",
                    **{k: v for k, v in row.items() if k != "event"},
                })  # fmt: skip
        place = {RATES[0]: "lowest", RATES[-1]: "highest"}.get(BEST[label], "")
        lines.append({
            "label": label, "method": label.split()[0], "runs": 8, "finished": 8, "steps": 40,
            "tokens": 40 * TOKENS, "rates": RATES, "tried": RATES, "lr": BEST[label],
            "place": place, "seeds": 2, "loss": loss + 0.005, "half_width": 0.06, "trainable": 1000,
            "state_bytes": 8000, "tokens_per_second": 100.0, "perplexity": math.exp(loss),
        })  # fmt: skip
    about = {"equal": "tokens", "caption": "Held-out loss after 640 tokens.", "notes": []}
    text = json.dumps({**about, "runs": trials, "configurations": lines})
    (path / "runs.json").write_text(text)
    return path


def ablation(path: Path, configurations: Sequence[tuple[str, Row, Row]], **last: Any) -> Path:
    """A comparison at one rate with two seeds: (method, settings of its block, of config.toml).

    The loss is 3, plus a hundredth for each configuration before, plus a thousandth of the seed.
    last: values of the last rows, lists with one for each configuration.
    """
    trials, lines = [], []
    for n, (method, settings, resolved) in enumerate(configurations):
        pairs = (f"{key.removeprefix('method.')}={value}" for key, value in settings.items())
        label = " ".join((method, *pairs))
        for seed in (0, 1):
            row = end(40, 3 + n / 100 + seed / 1000, **{k: v[n] for k, v in last.items()})
            given = {k.replace(".", "_", 1): v for k, v in {**resolved, **settings}.items()}
            place = run(path / "runs" / f"{n}-seed{seed}", [*steps(4), row], train_seed=seed,
                        method_name=method, **given)  # fmt: skip
            trials.append({"run": str(place.relative_to(path)), "configuration": label, "lr": 1e-3,
                           "method": method, "settings": settings, "seed": seed,
                           "state": "finished", **row})  # fmt: skip
        lines.append({"label": label, "method": method, "lr": 1e-3, "loss": 3 + n / 100})
    (path / "runs.json").write_text(json.dumps({"runs": trials, "configurations": lines}))
    return path
