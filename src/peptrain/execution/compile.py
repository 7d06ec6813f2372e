"""Compile decoder layers and recompute their activations, without changing what they compute."""

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
    """Return PyTorch's own compiler with our graph passes added.

    The function is cached per budget. If each layer had its own function, each would be compiled
    again. If different budgets shared one, a second model in the process would run with the first
    one's code.
    """

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
    """Compile each decoder layer and the final norm in place with torch.compile.

    All layers share one graph, and the keys of the state dict don't change.

    memory_budget: fraction of the activations kept by default that a compiled layer may keep for
    its backward pass; 0 recomputes everything.
    """
    name, layers = decoder_layers(model)
    for layer in layers:
        layer.compile(backend=inductor_with_passes(memory_budget))
    siblings = model.get_submodule(name.rpartition(".")[0]).children()
    for module in siblings:
        if "Norm" in type(module).__name__:
            module.compile()


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute each decoder layer in the backward pass instead of keeping its activations."""
    name = "activation_checkpointing_enable"  # transformers 5.17 only has the older name
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
