"""torch.compile of the decoder layers, on a CPU: `pytest -m slow -n0`."""

from pathlib import Path

import pytest
import torch
import torch._dynamo
from support import tiny, tiny_method
from torch import Tensor

from peptrain.execution.compile import compile_layers
from peptrain.methods.base import Method
from peptrain.models.hf import ModelConfig, build_model
from peptrain.testing import MODEL, losses
from peptrain.training.loop import train


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        *(tiny_method(name) for name in ("bpt", "loro", "vera", "hyperadapt", "sltrain")),
        *(tiny_method(name, warm_start_steps=0) for name in ("relora", "dora")),
    ],
    ids=lambda method: method.name,
)
def test_compiled_layers_give_the_same_losses_and_compile_once(
    method: Method, corpus: Path, tmp_path: Path
) -> None:
    """Merges, exact steps and evaluations in between compile nothing anew."""
    torch._dynamo.reset()
    for compile in (False, True):
        settings = {"precision": "fp32", "compile": compile, "eval_every": 2}
        with torch._dynamo.config.patch(error_on_recompile=True):
            train(tiny(method, corpus, tmp_path / str(compile), train=settings))
    eager, compiled = losses(tmp_path / "False"), losses(tmp_path / "True")
    for (_, one), (_, other) in zip(eager, compiled, strict=True):
        assert one == pytest.approx(other, abs=1e-3)  # rounding, which Adam makes larger


@pytest.mark.slow
def test_a_second_model_is_compiled_for_its_own_memory_budget() -> None:
    """Dynamo keeps code by function: a like layer of the same process would take the first's."""
    torch._dynamo.reset()
    kept = []
    for budget in (1.0, 0.1, 1.0):
        model = build_model(ModelConfig(**MODEL), seq_len=64, seed=0).train()
        compile_layers(model, budget)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes: dict[int, int] = {}

        def keep(t: Tensor, own: set[int] = own, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            x = torch.zeros(2, 64, dtype=torch.long)
            model.base_model(input_ids=x, use_cache=False).last_hidden_state.sum().backward()
        kept.append(sum(size for at, size in sizes.items() if at not in own))
    assert kept[1] < 0.6 * kept[0] and kept[2] == kept[0]
    assert torch._functorch.config.activation_memory_budget == 1.0


@pytest.mark.slow
def test_attention_is_not_recomputed_for_memory() -> None:
    """PyTorch takes it for free where it doesn't know it, on a CPU too."""
    torch._dynamo.reset()
    model = build_model(ModelConfig(**MODEL), seq_len=64, seed=0).train()
    compile_layers(model, 0.3)
    x = torch.zeros(2, 64, dtype=torch.long)
    for _ in range(2):
        with torch.profiler.profile() as profile:
            model.base_model(input_ids=x, use_cache=False).last_hidden_state.sum().backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    forward = [n for key, n in calls.items() if key.endswith("flash_attention_for_cpu")]
    backward = [n for key, n in calls.items() if key.endswith("flash_attention_for_cpu_backward")]
    assert forward == backward == [model.config.num_hidden_layers]


@pytest.mark.slow
def test_compiled_layers_can_be_recomputed(corpus: Path, tmp_path: Path) -> None:
    torch._dynamo.reset()
    for recompute in (False, True):
        settings = {"precision": "fp32", "compile": True, "checkpoint_activations": recompute}
        train(tiny("bpt", corpus, tmp_path / str(recompute), train=settings))
    kept, recomputed = losses(tmp_path / "False"), losses(tmp_path / "True")
    for (_, one), (_, other) in zip(kept, recomputed, strict=True):
        assert one == pytest.approx(other, abs=1e-3)
