"""What a method changes and no checkpoint contains is an error, since a resume would lose it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from torch import Tensor, nn
from torch.optim import Optimizer

from peptrain.adaptation import adapt
from peptrain.config import dump
from peptrain.errors import CheckpointError, ConfigError, Unsupported
from peptrain.methods.base import Method, Metrics
from peptrain.methods.full import Full
from peptrain.methods.lora import LoRA
from peptrain.models.sites import ReparamLinear, Site, reparametrized
from peptrain.optim.adamw import OptimConfig, adamw, parameter_groups
from peptrain.rng import Rng
from peptrain.training.loop import train

ONE = {"steps": 1, "checkpoint_every": 1}


class Scaled(ReparamLinear):
    """W over its norm, which is a buffer."""

    norm: Tensor

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.weight = site.linear.weight
        self.register_buffer("norm", self.weight.detach().norm())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.effective_weight(), self.bias)

    def effective_weight(self) -> Tensor:
        return self.weight / self.norm


@dataclass(frozen=True, kw_only=True)
class Careless(Method):
    """Changes one thing in every step."""

    name = "careless"
    equation = "W"
    changes: str = ""

    def install(self, model: nn.Module, sites: list[Site], rng: Rng, phase: int) -> None:
        for site in sites if "buffer" in self.changes else ():
            site.replace(Scaled(site))

    def optimizer(
        self, model: nn.Module, sites: list[Site], optim: OptimConfig, phase: int
    ) -> Optimizer:
        groups = parameter_groups(model, optim)
        if self.changes == "left out":
            groups[0]["params"] = groups[0]["params"][1:]
        if self.changes == "names":
            groups = [{**group, "name": "same"} for group in groups]
        groups[0]["share"] = 0.5
        return adamw(model, optim, groups)

    def after_step(self, model: nn.Module, optimizer: Optimizer, step: int, rng: Rng) -> Metrics:
        if self.changes == "float":
            optimizer.param_groups[0]["share"] = 0.25
        elif self.changes == "group":
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
        elif self.changes == "key":
            optimizer.param_groups[0]["drift"] = 0.1
        elif self.changes == "buffer":
            for layer in reparametrized(model):
                assert isinstance(layer, Scaled)
                layer.norm.mul_(2)
        return {}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("peptrain").METHODS, "careless", Careless)


@pytest.mark.parametrize(
    "changes, named",
    [("float", "'share' of the optimizer's group 0"), ("key", "'drift' of the optimizer's group 0"),
     ("group", "the number of the optimizer's groups"),
     ("buffer", r"the buffer model\.layers\.0\.self_attn\.q_proj\.norm")],
)  # fmt: skip
def test_what_no_checkpoint_contains_may_not_change(
    changes: str, named: str, corpus: Path, tmp_path: Path
) -> None:
    steps = {"steps": 3, "checkpoint_every": 1}
    with pytest.raises(CheckpointError, match=f"step 1: {named} has changed, and a resumed run"):
        train(tiny(Careless(changes=changes), corpus, tmp_path / "run", train=steps))
    train(tiny(Careless(), corpus, tmp_path / "other", train=steps))


def test_a_buffer_that_depends_on_trained_weights_is_refused(corpus: Path, tmp_path: Path) -> None:
    train(tiny("full", corpus, tmp_path / "first", train=ONE))
    config: Any = tiny(Careless(changes="a buffer"), corpus, tmp_path / "run")
    with pytest.raises(Unsupported, match=r"the buffer .*q_proj\.norm depends on the weights"):
        train(config.__class__(**vars(config) | {"init_from": tmp_path / "first"}))


def test_two_groups_of_an_optimizer_have_two_names(corpus: Path, tmp_path: Path) -> None:
    told = r"name of an optimizer group: must be unique \(got 'same'\)"
    with pytest.raises(ConfigError, match=told):
        train(tiny(Careless(changes="names"), corpus, tmp_path / "run"))
    with pytest.raises(ConfigError, match=told):
        adapt(nn.Sequential(nn.Linear(4, 4)), Careless(changes="names"), steps=1)


def test_an_optimizer_has_all_trainable_parameters(corpus: Path, tmp_path: Path) -> None:
    """Nothing would clear the gradient of one without a group, and clipping would count it."""
    told = r"no group with 1 of the trainable parameters, such as "
    with pytest.raises(
        ConfigError, match=told + r"model\.layers\.0\.self_attn\.q_proj\.weight; give"
    ):
        train(tiny(Careless(changes="left out"), corpus, tmp_path / "run"))
    with pytest.raises(ConfigError, match=told + r"0\.weight"):
        adapt(nn.Sequential(nn.Linear(4, 4)), Careless(changes="left out"), steps=1)


def test_a_model_is_adapted_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    first = adapt(model, LoRA(rank=2), steps=1)
    with pytest.raises(ConfigError, match=r"model: 0 is a \w+ already; adapt a new model, or"):
        adapt(model, LoRA(rank=2), steps=1)
    adapt(first.dense(), LoRA(rank=2), steps=1)


@dataclass(frozen=True, kw_only=True)
class Listed(Full):
    sizes: Any = (1, None)


def test_a_setting_that_toml_can_not_hold_is_named(corpus: Path) -> None:
    for value in ((1, None), {"a": 1}, [1]):
        with pytest.raises(ConfigError, match=r"^method\.sizes: must be a string, a number"):
            dump(tiny(Listed(sizes=value), corpus))
