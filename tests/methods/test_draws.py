"""What a seed gives: the weights a run begins with, and the factors drawn at a merge.

Pinned, since nothing else would notice a change. A run that is resumed by another version of
peptrain, and a seed in a table, rely on them. Taken under PyTorch 2.13 on a CPU.
"""

import pytest
import torch
from byhand import configured
from support import tiny_method
from torch import Tensor, nn

from peptrain.methods import METHODS
from peptrain.methods.bpt import BPTLinear
from peptrain.methods.lora import LoRALinear
from peptrain.models.sites import reparametrized
from peptrain.rng import Rng
from peptrain.runs.build import build

START = {
    "full": 1.426170,
    "bpt": 4.239452,
    "lora": 1.174196,
    "relora": 1.174196,
    "lowrank": 11.885257,
    "loro": 11.885257,
    "spectron": 2.636796,
    "dora": 0.518646,
    "vera": -63.122960,
    "hyperadapt": -2.905026,
    "galore": 1.426170,
    "sltrain": 360.472014,
    "cola": 12.695038,
}
MERGE = {"bpt": -5.815240, "lora": -0.483441}


def number(tensors: list[Tensor]) -> float:
    """A sum that depends on every value and its place."""
    flat = torch.cat([t.detach().double().flatten() for t in tensors])
    return float(flat @ torch.cos(torch.arange(len(flat), dtype=torch.float64)))


def built(name: str) -> nn.Module:
    """The tiny model in the method's last phase."""
    config = configured(tiny_method(name))
    return build(config, len(config.method.phases(config.train.steps)))


@pytest.mark.parametrize("name", METHODS)
def test_a_seed_gives_the_weights_it_gave(name: str) -> None:
    model = built(name)
    assert number([*model.state_dict().values()]) == pytest.approx(START[name], abs=1e-5)


@pytest.mark.parametrize("name", MERGE)
def test_a_merge_draws_what_it_drew(name: str) -> None:
    layer = next(reparametrized(built(name)))
    assert isinstance(layer, BPTLinear | LoRALinear)
    assert number([layer.draw(3, Rng(0))]) == pytest.approx(MERGE[name], abs=1e-5)
