"""Compare tokens/s of peptrain's default run with Hugging Face's Trainer and PEFT's LoRA on a CPU.

    pip install peft accelerate
    python benchmarks/cpu_peft.py [ROW ...] [--rounds 3] [--json FILE]

Both use the same model, ranks, matrices, batch, sequence length and text, fp32 and fused AdamW. All
rows take turns, round by round. A rate is the median over intervals of --log-every steps, without
the first interval of each turn. Rates are also given per second of CPU time, which other processes
disturb less. That is useful only with OMP_NUM_THREADS=1, since idle threads spin.

PEFT trains only adapters. It is measured like that (compared with a row with train_rest=false) and
also with all parameters outside the adapted matrices trainable, as is peptrain's default.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    CLOCKS,
    Marks,
    announce,
    base_config,
    configured,
    described,
    model_of,
    parser,
    split_row,
    spread,
    table,
    write,
)
from loop import eventless, peptrain_run
from torch import nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

from peptrain.config import RunConfig
from peptrain.data import configured_corpus
from peptrain.methods.base import Method
from peptrain.methods.rank import RankMethod
from peptrain.models.hf import count_parameters
from peptrain.models.sites import find_sites
from peptrain.runs.build import plain_model
from peptrain.sections import DataConfig

CPU = torch.device("cpu")
ROWS = ("lora", "lora:train_rest=false", "relora", "bpt", "loro", "full")
BASELINES = {"rest": "Trainer + PEFT, the rest trains too", "adapters": "Trainer + PEFT, adapters",
             "full": "Trainer, full"}  # fmt: skip
HEADER = ("row", "thousand tokens/s (quartiles)", "per CPU second", "ratio", "CPU ratio",
          "compared with", "trainable")  # fmt: skip


def baseline(row: str) -> str:
    """Return the key in BASELINES of the run that a row is compared with."""
    name, own = split_row(row)
    if name == "full":
        return "full"
    return "rest" if own.get("train_rest", True) else "adapters"


class Clock(TrainerCallback):
    """Mark the time every `every` steps of a Trainer."""

    def __init__(self, marks: Marks, every: int) -> None:
        self.marks, self.every = marks, every

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.marks.mark()


def peft_model(config: RunConfig[Method], kind: str) -> nn.Module:
    """Return peptrain's initial model with PEFT's LoRA on the matrices that peptrain adapts."""
    from peft import LoraConfig, get_peft_model

    model = plain_model(config)
    if kind == "full":
        return model
    method = config.method
    assert isinstance(method, RankMethod)
    names = [site.name for site in method.chosen(find_sites(model))]
    lora = LoraConfig(r=method.r, lora_alpha=32, target_modules=names, task_type="CAUSAL_LM")
    adapted: nn.Module = get_peft_model(model, lora)
    if kind == "rest":
        for name, p in adapted.named_parameters():
            if "base_layer" not in name:
                p.requires_grad_(True)
    return adapted


def rows_of(config: RunConfig[Method]) -> list[dict[str, torch.Tensor]]:
    """Return the first sequences that peptrain would train on."""
    t = config.train
    corpus = configured_corpus(config.data.path)
    shape = {"rank": 0, "world": 1, "batch_size": t.batch_size, "seq_len": t.seq_len}
    batches = [corpus.batch(seed=t.seed, step=i, **shape) for i in range(t.steps)]
    return [{"input_ids": row[:-1], "labels": row[:-1]} for row in torch.cat(batches)]


def trainer_run(config: RunConfig[Method], kind: str, marks: Marks) -> int:
    """Train with Hugging Face's Trainer and its defaults; return the trainable parameters."""
    t = config.train
    model = peft_model(config, kind)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=t.steps,
            per_device_train_batch_size=t.batch_size,
            learning_rate=1e-3,
            optim="adamw_torch_fused",
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows_of(config),
            data_collator=default_data_collator,
            callbacks=[Clock(marks, t.log_every)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return count_parameters(model, trainable=True)


def measured(configs: dict[str, RunConfig[Method]], rounds: int) -> list[dict[str, Any]]:
    """Measure every row, the Trainer's and ours, in turns."""
    lora = next(c for row, c in configs.items() if split_row(row)[0] == "lora")
    kinds = [kind for kind in BASELINES if kind in {baseline(row) for row in configs}]
    calls: dict[str, Callable[[Marks], int]] = {
        BASELINES[kind]: partial(trainer_run, lora, kind) for kind in kinds
    }
    calls |= {row: partial(peptrain_run, config) for row, config in configs.items()}
    tokens = lora.train.log_every * lora.train.batch_size * lora.train.seq_len
    found: dict[str, dict[str, Any]] = {row: {"row": row, "wall": [], "cpu": []} for row in calls}
    for number in range(rounds):
        for row, call in calls.items():
            marks = Marks()
            found[row]["trainable"] = call(marks)
            for clock, rates in marks.rates(tokens).items():
                found[row][clock] += rates
        load = ", ".join(f"{n:.1f}" for n in os.getloadavg())
        print(f"round {number + 1} of {rounds}: load average {load}", flush=True)
    return [row | (described(configs[n]) if n in configs else {}) for n, row in found.items()]


def cells(row: dict[str, Any], all_rows: dict[str, dict[str, Any]]) -> list[str]:
    rates = [spread([rate / 1e3 for rate in row[clock]]) for clock in CLOCKS]
    trainable = f"{row['trainable'] / 1e6:.2f}M"
    if row["row"] in BASELINES.values():
        return [row["row"], *rates, "", "", "", trainable]
    other = BASELINES[baseline(row["row"])]
    medians = {r: {c: statistics.median(all_rows[r][c]) for c in CLOCKS} for r in all_rows}
    ratios = [f"{medians[row['row']][c] / medians[other][c]:.2f}" for c in CLOCKS]
    return [row["row"], *rates, *ratios, other, trainable]


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__, preset="tiny", precision="fp32")
    made.add_argument("rows", nargs="*", default=ROWS, metavar="ROW")
    made.add_argument("--data", type=Path, help="prepared corpus (default: the embedded one)")
    made.add_argument("--batch-size", type=int, default=32)
    made.add_argument("--seq-len", type=int, default=256)
    made.add_argument("--steps", type=int, default=30)
    made.add_argument("--log-every", type=int, default=5)
    made.add_argument("--rounds", type=int, default=3)
    args = made.parse_intermixed_args(argv)
    base = base_config(model_of(args), args.batch_size, args.seq_len, steps=args.steps,
                       precision=args.precision, log_every=args.log_every,
                       device="cpu")  # fmt: skip
    base = replace(base, data=DataConfig(path=args.data))
    configs = {row: configured(eventless(row), base, args.set, device=CPU) for row in args.rows}
    announce(CPU, {"preset": args.preset, "batch": f"{args.batch_size} x {args.seq_len}",
                   "precision": args.precision, "steps": args.steps, "rounds": args.rounds,
                   "set": args.set})  # fmt: skip
    found = measured(configs, args.rounds)
    print()
    table(HEADER, [cells(row, {r["row"]: r for r in found}) for row in found])
    write(args, CPU, found)


if __name__ == "__main__":
    main()
