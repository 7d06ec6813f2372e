"""How a Hugging Face model is run: compiled, recomputed, without masks. Never what it computes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch._functorch.config as functorch
from torch import fx

from peptrain.models.sites import decoder_layers

if TYPE_CHECKING:
    from torch._inductor.utils import InputType
    from transformers import PreTrainedModel

log = logging.getLogger("peptrain")


@cache
def inductor_with_passes(memory_budget: float) -> Callable[..., Any]:
    """PyTorch's own compiler with our passes. One function for all layers, or each of them would
    be compiled again; another one for another budget, or a second model of the process would be
    run with the code of the first."""

    def compiled(graph: fx.GraphModule, inputs: Sequence[InputType]) -> Any:
        from torch._inductor.compile_fx import compile_fx  # seconds to import

        from peptrain.execution.graph_passes import (
            KeepAttention,
            StackThinLinears,
            StackThinProducts,
        )

        passes = {
            "joint_custom_pre_pass": KeepAttention(),
            "pre_grad_custom_pass": StackThinLinears(),
            "post_grad_custom_pre_pass": StackThinProducts(),
        }
        with functorch.patch(activation_memory_budget=memory_budget):
            return compile_fx(graph, inputs, config_patches=passes)

    return compiled


def compile_layers(model: PreTrainedModel, memory_budget: float = 1.0) -> None:
    """torch.compile each decoder layer in place: one graph serves all, state keys stay. The norm
    after the last of them is compiled as well.

    memory_budget: the part of the activations that a compiled layer may keep for its backward
    pass, of those kept by default; 0 recomputes everything.
    """
    name, layers = decoder_layers(model)
    for layer in layers:
        layer.compile(backend=inductor_with_passes(memory_budget))
    beside = model.get_submodule(name.rpartition(".")[0]).children()
    for module in beside:
        if "Norm" in type(module).__name__:
            module.compile()


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    name = "activation_checkpointing_enable"  # transformers 5.17 has the older name only
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
