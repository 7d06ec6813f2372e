"""Faster forms in a model, as far as a CPU can run them: Triton's interpreter, no graph."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from support import ALONE, tiny, tiny_method
from torch import Tensor, fx, nn

import peptrain.execution.graph_passes
from peptrain.distributed.world import World
from peptrain.errors import ConfigError
from peptrain.execution.attention import attend_without_masks
from peptrain.execution.forward_backward import (
    EagerSteps,
    make_forward_backward,
    uses_cuda_graph,
    uses_triton,
)
from peptrain.execution.graph_passes import StackThinLinears
from peptrain.execution.loss import NextTokenLoss
from peptrain.kernels.swiglu_mlp import FusedMLP
from peptrain.models.hf import ModelConfig, build_model
from peptrain.models.sites import find_sites, reparametrized
from peptrain.rng import Rng
from peptrain.sections import TrainConfig
from peptrain.testing import losses
from peptrain.training.loop import train

SMALL = {"hidden_size": 16, "intermediate_size": 24, "layers": 1, "heads": 2, "vocab_size": 320}
fused_methods = pytest.mark.parametrize("name", ["bpt", "lora", "relora"])


def installed(name: str, **config: Any) -> nn.Module:
    model = build_model(ModelConfig(**SMALL, **config), seq_len=16, seed=0)
    tiny_method(name).install(model, find_sites(model), Rng(0), 1)
    return model


@pytest.mark.parametrize("name", ["bpt", pytest.param("lora", marks=pytest.mark.slow), "relora"])
def test_a_fused_run_has_the_plain_ones_losses(name: str, corpus: Path, tmp_path: Path) -> None:
    """In two micro-batches, with a merge, in relora's case after a warm start."""
    pytest.importorskip("triton")
    for kernels in ("torch", "triton"):
        settings = {"kernels": kernels, "precision": "fp32", "steps": 4, "micro_batch": 2}
        calm = {"eps": 0.1}  # Adam divides a gradient of rounding size by itself
        train(tiny(name, corpus, tmp_path / kernels, model=SMALL, train=settings, optim=calm))
    plain, fused = losses(tmp_path / "torch"), losses(tmp_path / "triton")
    assert len(plain) == 4
    for (_, one), (_, other) in zip(plain, fused, strict=True):
        assert one == pytest.approx(other, abs=1e-6)


@fused_methods
def test_parameters_and_their_names_stay(name: str) -> None:
    pytest.importorskip("triton")
    model = installed(name)
    before = {k: p.shape for k, p in model.state_dict().items()}
    tiny_method(name).fuse(model)
    assert {k: p.shape for k, p in model.state_dict().items()} == before
    assert len(list(reparametrized(model))) == 7


@pytest.mark.parametrize("name", ["bpt", "lora", "lowrank"])
def test_a_model_may_be_accelerated_twice(name: str) -> None:
    pytest.importorskip("triton")
    model = installed(name)
    tiny_method(name).fuse(model)
    once = [type(module) for module in model.modules()]
    tiny_method(name).fuse(model)
    assert [type(module) for module in model.modules()] == once


def test_only_swiglu_between_three_bpt_layers_becomes_one_map() -> None:
    pytest.importorskip("triton")
    method = tiny_method("bpt")
    for activation, fused in (("silu", 1), ("gelu", 0)):
        model = installed("bpt")
        model.model.layers[0].mlp.act_fn = {"silu": nn.SiLU(), "gelu": nn.GELU()}[activation]
        method.fuse(model)
        assert sum(isinstance(m, FusedMLP) for m in model.modules()) == fused
    model = build_model(ModelConfig(**SMALL), seq_len=16, seed=0)
    tiny_method("bpt", targets="gate,up").install(model, find_sites(model), Rng(0), 0)
    method.fuse(model)
    assert not any(isinstance(m, FusedMLP) for m in model.modules())


def test_what_cannot_run_is_an_error_that_names_the_setting(
    monkeypatch: pytest.MonkeyPatch, corpus: Path
) -> None:
    cpu = torch.device("cpu")
    loss = NextTokenLoss(build_model(ModelConfig(**SMALL), seq_len=16, seed=0))
    with pytest.raises(ConfigError, match=r"train\.cuda_graph"):
        uses_cuda_graph(True, False, ALONE)
    assert isinstance(make_forward_backward(loss, "fp32", ALONE, recorded=False), EagerSteps)
    with pytest.raises(ConfigError, match=r"train\.kernels.*fp64"):
        uses_triton("triton", "fp64", cpu, recorded=True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=r"train\.kernels"):
        uses_triton("triton", "fp32", cpu, recorded=True)
    with pytest.raises(ConfigError, match=r"train\.memory_budget"):
        TrainConfig(memory_budget=0.5)
    with pytest.raises(ConfigError, match=r"train\.memory_budget"):
        TrainConfig(memory_budget=1.5, compile=True)


def test_auto_fuses_where_a_graph_is_recorded() -> None:
    gpu = torch.device("cuda")
    for recorded in (False, True):
        assert uses_triton("auto", "bf16", gpu, recorded=recorded) == recorded
    assert not uses_triton("auto", "fp64", gpu, recorded=True)
    assert not uses_triton("torch", "bf16", gpu, recorded=True)
    assert not uses_triton("auto", "bf16", torch.device("cpu"), recorded=True)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_graph_comes_with_compile_on_gpus(compile: bool, ranks: int, device: str) -> None:
    here = World(0, ranks, torch.device(device))
    can = device == "cuda"
    assert uses_cuda_graph(None, compile, here) == (compile and can)
    assert not uses_cuda_graph(False, compile, here)
    if can:
        assert uses_cuda_graph(True, compile, here)


def stacked(monkeypatch: pytest.MonkeyPatch, module: nn.Module, x: Tensor) -> list[int]:
    """How many maps each product stands for; the result is what it was, with its gradients."""
    sizes: list[int] = []
    stack = peptrain.execution.graph_passes._stack

    def counting(graph: fx.Graph, linears: list[fx.Node]) -> None:
        sizes.append(len(linears))
        stack(graph, linears)

    def backend(graph: fx.GraphModule, _: Any) -> Any:
        StackThinLinears()(graph.graph)
        graph.recompile()
        return graph

    monkeypatch.setattr(peptrain.execution.graph_passes, "_stack", counting)
    torch._dynamo.reset()
    results = []
    for call in (module, torch.compile(module, backend=backend)):
        module.zero_grad()
        y = call(x)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad for p in module.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    return sizes


class Maps(nn.Module):
    def __init__(self, *rows: int, bias: bool = False) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.each = nn.ModuleList(nn.Linear(8, n, bias=bias).double() for n in rows)

    def forward(self, x: Tensor) -> Tensor:
        x = x.tanh()
        return torch.cat([F.linear(linear(x), linear.weight.mT).sin() for linear in self.each], -1)


def test_thin_maps_of_one_input_are_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.linspace(-1, 1, 48, dtype=torch.float64).view(2, 3, 8)
    assert stacked(monkeypatch, Maps(2, 3, 1), x) == [3]
    assert stacked(monkeypatch, Maps(4, 4), x) == [2]
    assert stacked(monkeypatch, Maps(5, 4), x) == []  # not thin: the copy would cost more
    assert stacked(monkeypatch, Maps(2, 3, bias=True), x) == []
    assert stacked(monkeypatch, Maps(2), x) == []


@pytest.mark.parametrize("family", ["llama", "qwen2", "olmo2"])
def test_whole_windows_need_no_masks(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import masking_utils

    model = build_model(ModelConfig(family=family, **SMALL), seq_len=16, seed=0)
    ids = torch.arange(32).view(2, 16)
    before = model(input_ids=ids, use_cache=False).logits
    assert attend_without_masks(model, 16)

    def look(*_: Any) -> None:
        raise AssertionError("waited for the device to look for packed windows")

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", look)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)


def test_a_sliding_window_keeps_its_masks() -> None:
    from transformers import AutoModelForCausalLM, MistralConfig

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 320}
    config = MistralConfig(**shape, **heads, sliding_window=4, bos_token_id=None, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config)
    assert not attend_without_masks(model, 16)
    assert model.config._attn_implementation == "sdpa"
    assert attend_without_masks(model, 4)  # windows that it does not cut
