"""Parameter counts: the papers' tables, and closed forms for every preset and method."""

from dataclasses import fields, replace

import pytest
import torch
from oracles import algebra
from torch._subclasses import FakeTensor, FakeTensorMode
from transformers import PreTrainedModel

from peptrain.config import settled
from peptrain.methods import METHODS
from peptrain.methods.base import Method
from peptrain.methods.sltrain import SLTrainLinear
from peptrain.models.hf import ModelConfig, build_model, count_parameters
from peptrain.models.presets import PRESETS, Family
from peptrain.models.sites import find_sites, reparametrized
from peptrain.optim.adamw import OptimConfig, state_bytes
from peptrain.optim.schedule import ScheduleConfig
from peptrain.rng import Rng

FULL = {
    "llama-60m": 58_073_600,
    "llama-130m": 134_105_856,
    "llama-1b": 1_339_082_752,
    "pico-tiny": 11_282_784,
    "qwen-100m": 108_214_784,
    "qwen-1.5b": 1_543_714_304,
}
LOWRANK = {
    "llama-60m": (128, 42_770_944),
    "llama-130m": (256, 93_997_824),
    "llama-1b": (512, 609_310_720),
}
BPT = {
    "qwen-100m": (128, 88.894, 17.85, 63.51),
    "qwen-1.5b": (256, 526.339, 65.90, 77.64),  # the paper prints 77.4
}
"""Rank, trainable millions, and the percent that training saves: of all, of the non-embedding."""
TABLE_2 = {
    **{"hyperadapt": 137, "vera": 137, "lora": 206, "dora": 206, "relora": 206, "bpt": 206},
    "full": 494,
}
"""BPT's Table 2: trainable millions in Qwen2.5-0.5B, at rank 128."""
MEMORY = {  # GB as LORO's Table 1 has them: bf16 weights and moments, no gradients
    ("llama-60m", "full", 0): 0.348,
    ("llama-60m", "lowrank", 128): 0.257,
    ("llama-60m", "galore", 128): 0.280,
    ("llama-60m", "sltrain", 128): 0.267,
    ("llama-1b", "full", 0): 8.034,
    ("llama-1b", "lowrank", 512): 3.656,
    ("llama-1b", "galore", 512): 4.763,
    ("llama-1b", "sltrain", 512): 4.163,
}
slow = pytest.mark.slow
USUAL = ("llama-60m", "llama-1b", "pico-tiny", "qwen-100m")
"""For the default run: an odd width, fewer key heads than heads, biases, tied embeddings."""
CLOSED_FORMS = [
    pytest.param(name, marks=[] if name in USUAL else slow)
    for name in PRESETS
    if PRESETS[name].family in ("llama", "qwen2")
]


def method_of(name: str, rank: int) -> Method:
    cls = METHODS[name]
    return cls(**({"rank": rank} if "rank" in {f.name for f in fields(cls)} else {}))


def model_of(preset: str, name: str, rank: int = 8, layers: int | None = None) -> PreTrainedModel:
    """The real model with the method's layers, of fake tensors: no number is ever drawn."""
    with FakeTensorMode():
        model = build_model(ModelConfig(preset=preset, layers=layers), seq_len=64, seed=0)
        method_of(name, rank).install(model, find_sites(model), Rng(0), 0)
    assert all(isinstance(p, FakeTensor) for p in model.parameters())
    return model


def embedding_parameters(model: PreTrainedModel) -> int:
    """Of the input embedding and the output head, once when they are tied."""
    tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    return sum(table.numel() for table in tables)


@pytest.mark.parametrize("preset, count", FULL.items())
def test_full_training(preset: str, count: int) -> None:
    model = model_of(preset, "full")
    assert count_parameters(model) == count_parameters(model, trainable=True) == count


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_knows_how_many_parameters_it_has(preset: str) -> None:
    shape = replace(PRESETS[preset], L=2)
    assert count_parameters(model_of(preset, "full", layers=2)) == shape.parameters


@pytest.mark.parametrize("name", ["lowrank", "loro"])
@pytest.mark.parametrize(
    "preset", ["llama-60m", "llama-130m", pytest.param("llama-1b", marks=slow)]
)
def test_low_rank_training(preset: str, name: str) -> None:
    rank, count = LOWRANK[preset]
    model = model_of(preset, name, rank)
    assert count_parameters(model) == count_parameters(model, trainable=True) == count


def test_sltrain_counts_its_values() -> None:
    """43.53M in the paper's convention: of S the values, not their places."""
    model = model_of("llama-60m", "sltrain", 128)
    count = count_parameters(model)
    assert count == count_parameters(model, trainable=True)
    assert count / 1e6 == pytest.approx(43.530, abs=5e-4)


def test_galore_trains_all() -> None:
    model = model_of("llama-60m", "galore", 128)
    assert count_parameters(model, trainable=True) == FULL["llama-60m"]
    assert len(list(reparametrized(model))) == 8 * 7


@pytest.mark.parametrize(
    "preset, name, rank",
    [pytest.param(*m, marks=slow if m[0] == "llama-1b" else []) for m in MEMORY],
)
def test_the_papers_memory(preset: str, name: str, rank: int) -> None:
    """Of the real model and optimizer after a step, on tensors without numbers. The paper counts an
    index of S as 8 bytes; ours have 4."""
    given = (method_of(name, rank), OptimConfig(), ScheduleConfig())
    method, optim, _ = settled(*given, 100, PRESETS[preset].d)
    with FakeTensorMode():
        model = build_model(ModelConfig(preset=preset), seq_len=64, seed=0, precision="bf16")
        method.install(model, find_sites(model), Rng(0), 0)
        optimizer = method.optimizer(model, find_sites(model), optim, 0)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    indices = [x.indices for x in reparametrized(model) if isinstance(x, SLTrainLinear)]
    assert all(x.element_size() == 4 for x in indices)
    places = sum(x.numel() for x in indices)
    total = 2 * count_parameters(model) + state_bytes(optimizer) + 8 * places
    assert total / 1e9 == pytest.approx(MEMORY[preset, name, rank], abs=5.1e-4)


@pytest.mark.parametrize("preset", ["qwen-100m", pytest.param("qwen-1.5b", marks=slow)])
def test_bpt_and_what_it_saves(preset: str) -> None:
    rank, millions, saved, saved_inside = BPT[preset]
    model = model_of(preset, "bpt", rank)
    trainable, embedding = count_parameters(model, trainable=True), embedding_parameters(model)
    assert trainable / 1e6 == pytest.approx(millions, abs=5e-4)
    assert 100 * (1 - trainable / FULL[preset]) == pytest.approx(saved, abs=5e-3)
    inside = (trainable - embedding) / (FULL[preset] - embedding)
    assert 100 * (1 - inside) == pytest.approx(saved_inside, abs=5e-3)


@pytest.mark.parametrize(
    "preset, rank", [("qwen-100m", 128), pytest.param("qwen-1.5b", 256, marks=slow)]
)
def test_bpt_leaves_k_and_v_dense_in_qwen(preset: str, rank: int) -> None:
    """Only so do the paper's counts come out: in 128 x 512, 128 (n + m) + n + m > n m."""
    model = model_of(preset, "bpt", rank)
    adapted = {layer.site.rpartition(".")[2] for layer in reparametrized(model)}
    assert adapted == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    parameters = dict(model.named_parameters())
    for key in ("k_proj", "v_proj"):
        assert parameters[f"model.layers.0.self_attn.{key}.weight"].requires_grad


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("bpt", "vera") else slow) for n in TABLE_2]
)
def test_the_counts_of_bpts_table_2(name: str) -> None:
    model = model_of("qwen-0.5b", name, 128)
    assert round(count_parameters(model, trainable=True) / 1e6) == TABLE_2[name]


def counts(model: PreTrainedModel) -> algebra.Count:
    trainable = count_parameters(model, trainable=True)
    return algebra.Count(count_parameters(model), trainable, embedding_parameters(model))


@pytest.mark.parametrize("name", algebra.COUNTED)
@pytest.mark.parametrize("preset", CLOSED_FORMS)
def test_every_preset_has_its_closed_form(preset: str, name: str) -> None:
    """At two layers, a small rank and the default one, which leaves k and v of Qwen dense."""
    shape = PRESETS[preset]
    arch = algebra.Arch(
        family=shape.family,
        V=shape.V,
        d=shape.d,
        f=shape.f,
        L=2,
        heads=shape.heads,
        kv=shape.kv,
        tied=shape.tied,
    )
    for rank in (2, shape.d // 4):
        model = model_of(preset, name, rank, layers=2)
        assert counts(model) == algebra.parameter_count(arch, name, rank)


@pytest.mark.parametrize("name", algebra.COUNTED)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_model_with_real_numbers_counts_the_same(family: Family, tied: bool, name: str) -> None:
    shape = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "layers": 2}
    config = ModelConfig(family=family, tied=tied, heads=2, kv_heads=1, **shape)
    model = build_model(config, seq_len=64, seed=0)
    method_of(name, 3).install(model, find_sites(model), Rng(0), 0)
    arch = algebra.Arch(family=family, V=320, d=16, f=24, L=2, heads=2, kv=1, tied=tied)
    assert counts(model) == algebra.parameter_count(arch, name, 3)
