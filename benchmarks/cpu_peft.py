"""Tokens/s of peptrain's default run beside Hugging Face's Trainer with PEFT's LoRA, on a CPU.

    pip install peft accelerate
    python benchmarks/cpu_peft.py [ROW ...] [--rounds 3] [--json FILE]

The same model, ranks, matrices, batch, sequence length and text, fp32 and fused AdamW in both. All
rows take turns, round by round; a rate is the median over stretches of --log-every steps, without
the first of each turn. PEFT trains adapters alone, so it is measured as that (beside a row with
train_rest=false) and with all that is not adapted training too, as peptrain's default has it.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common import (
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
from loop import eventless, trainer_rates
from torch import nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from peptrain.build import plain_model
from peptrain.config import DataConfig, RunConfig
from peptrain.data import Corpus, default_corpus
from peptrain.journal import throughput
from peptrain.methods.base import Method
from peptrain.methods.rank import RankMethod
from peptrain.model import count_parameters, find_sites

CPU = torch.device("cpu")
ROWS = ("lora", "lora:train_rest=false", "relora", "bpt", "loro", "full")
BESIDE = {"rest": "Trainer + PEFT, the rest trains too", "adapters": "Trainer + PEFT, adapters",
          "full": "Trainer, full"}  # fmt: skip
HEADER = ("row", "thousand tokens/s (quartiles)", "beside", "ratio", "trainable")


def beside(row: str) -> str:
    """What a row is compared with."""
    name, own = split_row(row)
    if name == "full":
        return "full"
    return "rest" if own.get("train_rest", True) else "adapters"


class Clock(TrainerCallback):
    """The time after each step."""

    def __init__(self) -> None:
        self.marks: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.marks.append(time.perf_counter())


def peft_model(config: RunConfig[Method], kind: str) -> nn.Module:
    """The model that peptrain starts from, with PEFT's LoRA on the matrices it adapts."""
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
    """The first sequences that peptrain would train on."""
    t = config.train
    corpus = Corpus.open(config.data.path) if config.data.path else default_corpus()
    shape = {"rank": 0, "world": 1, "batch_size": t.batch_size, "seq_len": t.seq_len}
    batches = [corpus.batch(seed=t.seed, step=i, **shape) for i in range(t.steps)]
    return [{"input_ids": row[:-1], "labels": row[:-1]} for row in torch.cat(batches)]


def peft_rates(config: RunConfig[Method], kind: str) -> tuple[list[float], int]:
    """Tokens/s of each stretch of a Trainer's run but the first; its trainable parameters."""
    t, clock = config.train, Clock()
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
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    ends = clock.marks[t.log_every - 1 :: t.log_every]
    tokens = t.log_every * t.batch_size * t.seq_len
    rates = [throughput(tokens, b - a) for a, b in pairwise(ends)]
    return rates, count_parameters(model, trainable=True)


def measured(configs: dict[str, RunConfig[Method]], rounds: int) -> list[dict[str, Any]]:
    """Every row, ours and Trainer's, in turns."""
    kinds = [kind for kind in BESIDE if kind in {beside(row) for row in configs}]
    found: dict[str, dict[str, Any]] = {BESIDE[kind]: {"rates": []} for kind in kinds}
    found |= {row: {"rates": [], **described(c)} for row, c in configs.items()}
    lora = next(c for row, c in configs.items() if split_row(row)[0] == "lora")
    for number in range(rounds):
        for kind in kinds:
            rates, trainable = peft_rates(lora, kind)
            found[BESIDE[kind]]["rates"] += rates
            found[BESIDE[kind]]["trainable"] = trainable
        for row, config in configs.items():
            rates, trainable = trainer_rates(config)
            found[row]["rates"] += rates
            found[row]["trainable"] = trainable
        load = ", ".join(f"{n:.1f}" for n in os.getloadavg())
        print(f"round {number + 1} of {rounds}: load average {load}", flush=True)
    return [{"row": row, **numbers} for row, numbers in found.items()]


def cells(row: dict[str, Any], all_rows: list[dict[str, Any]]) -> list[str]:
    thousands = spread([rate / 1e3 for rate in row["rates"]])
    other = BESIDE[beside(row["row"])] if row["row"] not in BESIDE.values() else ""
    ratio = ""
    for one in all_rows:
        if one["row"] == other:
            ratio = f"{statistics.median(row['rates']) / statistics.median(one['rates']):.2f}"
    return [row["row"], thousands, other, ratio, f"{row['trainable'] / 1e6:.2f}M"]


def main(argv: list[str] | None = None) -> None:
    made = parser(__doc__, preset="tiny", precision="fp32")
    made.add_argument("rows", nargs="*", default=ROWS, metavar="ROW")
    made.add_argument("--data", type=Path, help="a prepared corpus; unset: the default one")
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
    table(HEADER, [cells(row, found) for row in found])
    write(args, CPU, found)


if __name__ == "__main__":
    main()
