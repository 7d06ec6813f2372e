"""DoRA and VeRA beside the layers of Hugging Face's PEFT, on the same weights."""

import copy
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from byhand import seeded
from torch import Tensor, nn
from torch.testing import assert_close

from peptrain.adaptation import Adapted, adapt
from peptrain.methods import DoRA, VeRA
from peptrain.models.sites import reparametrized
from peptrain.optim.adamw import OptimConfig
from peptrain.optim.schedule import ScheduleConfig

STEPS = 6
PLACES = ["0", "2", "4"]
NEAR = {"rtol": 1e-10, "atol": 1e-12}
Pairs = list[tuple[str, Tensor, Tensor]]
"""A name, our tensor and theirs."""


def mlp() -> nn.Sequential:
    """Three matrices of three shapes, with biases."""
    torch.manual_seed(0)
    layers = (nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 5))
    return nn.Sequential(*layers).double()


def dora_pairs(ours: nn.Module, theirs: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    for layer in reparametrized(ours):
        other: Any = theirs.get_submodule(f"base_model.model.{layer.site}")
        for key, p in (
            ("A", other.lora_A["default"].weight),
            ("B", other.lora_B["default"].weight),
            ("m", other.lora_magnitude_vector["default"].weight),
        ):
            yield f"{layer.site}.{key}", layer.get_parameter(key), p


def vera_pairs(ours: nn.Module, theirs: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    for layer in reparametrized(ours):
        other: Any = theirs.get_submodule(f"base_model.model.{layer.site}")
        for key in ("lambda_d", "lambda_b"):
            p = getattr(other, f"vera_{key}")["default"]
            yield f"{layer.site}.{key}", layer.get_parameter(key), p


def side_by_side(name: str) -> tuple[Adapted, nn.Module, Pairs]:
    """Our model and PEFT's with our random numbers, and what trains in the two."""
    plain = mlp()
    method = {
        "dora": DoRA(rank=3, alpha=6.0, train_rest=False, include="*"),
        "vera": VeRA(rank=7, train_rest=False),
    }[name]
    config = {
        "dora": peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=PLACES),
        "vera": peft.VeraConfig(r=7, target_modules=PLACES),
    }[name]
    torch.set_default_dtype(torch.float64)  # PEFT's 0.1 would be that of fp32
    try:
        theirs: Any = peft.get_peft_model(copy.deepcopy(plain), config)
    finally:
        torch.set_default_dtype(torch.float32)
    training = adapt(plain, method, steps=STEPS, optim=OptimConfig(lr=0.03, clip=0.0),
                     schedule=ScheduleConfig(kind="constant", warmup=0))  # fmt: skip
    pairs = list({"dora": dora_pairs, "vera": vera_pairs}[name](plain, theirs))
    if name == "vera":
        first: Any = next(reparametrized(plain))
        buffers = theirs.base_model
        for p, q in ((first.A, buffers.vera_A["default"]), (first.B, buffers.vera_B["default"])):
            assert p.shape == q.shape and q.abs().max() <= (6 / p.shape[1]) ** 0.5
            q.copy_(p)
    else:
        with torch.no_grad():
            for key, p, q in pairs:
                if key.endswith(".A"):
                    q.copy_(p)
    return training, theirs, pairs


def loss(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(8, 12, generator=seeded(step), dtype=torch.float64)
    return (model(x) - x[:, :5].sin()).square().mean()


def agree(pairs: Any, step: int) -> None:
    for key, p, q in pairs:
        assert_close(p, q, **NEAR, msg=lambda said, key=key: f"{key} at step {step}: {said}")


@pytest.mark.parametrize("name", ["dora", "vera"])
def test_starts_losses_gradients_and_steps_are_pefts(name: str) -> None:
    training, theirs, pairs = side_by_side(name)
    trained = [q for q in theirs.parameters() if q.requires_grad]
    ours = [p for p in training.model.parameters() if p.requires_grad]
    assert {id(q) for q in trained} == {id(q) for _, _, q in pairs}
    assert {id(p) for p in ours} == {id(p) for _, p, _ in pairs}
    optimizer = torch.optim.AdamW(trained, lr=0.03, weight_decay=0.0)
    start = [p.detach().clone() for _, p, _ in pairs]
    for step in range(STEPS):
        agree(pairs, step)
        one, other = loss(training.model, step), loss(theirs, step)
        assert_close(one, other, **NEAR)
        one.backward()
        other.backward()
        agree([(f"gradient of {key}", p.grad, q.grad) for key, p, q in pairs], step)
        training.step()
        optimizer.step()
        optimizer.zero_grad()
    for (key, p, _), before in zip(pairs, start, strict=True):
        assert (p - before).abs().max() > 0.03, f"{key} is hardly trained"


@pytest.mark.parametrize("name", ["dora", "vera"])
def test_the_effective_weight_is_what_peft_merges(name: str) -> None:
    training, theirs, pairs = side_by_side(name)
    with torch.no_grad():
        for i, (_, p, q) in enumerate(pairs):
            q.copy_(p.add_(torch.randn(p.shape, generator=seeded(i), dtype=p.dtype)))
    merged: Any = copy.deepcopy(theirs).merge_and_unload()
    for layer in reparametrized(training.model):
        wanted = merged.get_submodule(layer.site)
        assert_close(layer.effective_weight(), wanted.weight, **NEAR)
    dense = training.dense()
    x = torch.randn(3, 12, generator=seeded(1), dtype=torch.float64)
    assert_close(dense(x), theirs(x), **NEAR)
