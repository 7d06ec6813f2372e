"""Run by torchrun from test_two_ranks_judge.py: measure tasks during a training on two ranks."""

import sys
from dataclasses import replace
from pathlib import Path

import torch

from peptrain.methods import METHODS
from peptrain.sections import EvalConfig
from peptrain.testing import small, small_run
from peptrain.training.loop import train

torch.set_num_threads(1)
corpus, run, data = map(Path, sys.argv[1:])
config = small_run(small(METHODS["full"]), corpus, run, train={"seq_len": 64, "eval_every": 4})
train(replace(config, eval=EvalConfig(tasks="blimp,piqa,wikitext", tasks_data=data, items=8)))
