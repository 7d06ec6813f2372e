"""The matrices of a model that a method may adapt, and the layers that replace them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from peptrain.errors import Unsupported

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("peptrain")


@dataclass(frozen=True)
class Site:
    """One matrix of the model that a method may adapt: an nn.Linear, or what replaced it."""

    name: str
    """Its name in the state dict: "model.layers.0.mlp.up_proj"."""
    parent: nn.Module
    width: int
    """The model's hidden size, d in the papers."""
    fresh: bool = True
    """Whether the weight is newly initialised, so that a method may draw it again. A weight from a
    trained model must be kept or approximated."""

    @property
    def module(self) -> nn.Linear | ReparamLinear:
        """The current module: the nn.Linear or, after `install`, the layer that replaced it."""
        module = getattr(self.parent, self.name.rpartition(".")[2])
        assert isinstance(module, nn.Linear | ReparamLinear)
        return module

    @property
    def linear(self) -> nn.Linear:
        """The nn.Linear, while it has not been replaced."""
        module = self.module
        assert isinstance(module, nn.Linear), f"{self.name} was replaced; use `module`"
        return module

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m) = (out, in)."""
        return self.module.out_features, self.module.in_features

    def replace(self, new: ReparamLinear) -> None:
        setattr(self.parent, self.name.rpartition(".")[2], new)


class ReparamLinear(nn.Module):
    """y = x W_effᵀ + bias, with W_eff computed from other parameters.

    A frozen base keeps the name `weight` and a bias the name `bias`, as in Hugging Face's keys;
    without a base `weight` is None.
    A layer that is not linear in x has no W_eff. It doesn't override `effective_weight`, and its
    method sets `has_dense_equivalent = False`.
    """

    site: str

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site.name
        self.out_features, self.in_features = site.shape
        self.bias = site.linear.bias
        self.register_parameter("weight", None)  # models such as T5 ask whether it is a tensor

    def effective_weight(self) -> Tensor:
        """Return W_eff [out, in] in at least fp32, on unsharded tensors.

        Raises Unsupported for a layer without one.
        """
        raise Unsupported(
            f"{self.site}: {type(self).__name__} has no effective_weight(), so the model has no"
            " dense weights"
        )

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{k}={list(p.shape)}" for k, p in self.named_parameters())
        return f"in={self.in_features}, out={self.out_features}, {shapes}"


def reparametrized(model: nn.Module) -> Iterator[ReparamLinear]:
    """Return every layer that replaced an nn.Linear, in the model's order."""
    return (m for m in model.modules() if isinstance(m, ReparamLinear))


def has_effective_weight(layer: ReparamLinear) -> bool:
    """Return whether the layer's class overrides `effective_weight`."""
    return type(layer).effective_weight is not ReparamLinear.effective_weight


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of decoder layers: the longest list of modules of one class.

    It is found by structure, not by a name such as `model.layers` or `transformer.h`. Lists inside
    a decoder layer (such as experts) don't count. Raises Unsupported if there is none.
    """
    return max(_stacks(model), key=lambda named: len(named[1]))


def _stacks(model: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """Return the name and every list of identical layers: of T5 those of encoder and decoder."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{o}.") for o, _ in lists)]
    uniform = [(n, m) for n, m in outer if len({type(layer) for layer in m}) == 1]
    if not uniform:
        raise Unsupported(
            f"{type(model).__name__} has no list of identical decoder layers, so there is nothing"
            " to adapt; peptrain works on decoder-only models such as Llama, Qwen2 and OLMo2"
        )
    return uniform


def find_sites(model: PreTrainedModel, fresh: bool = True) -> list[Site]:
    """Return every nn.Linear inside a decoder layer, or what replaced it, in the model's order.

    Of an encoder and decoder they are those in the layers of both. Those with `LEFT_DENSE` are left
    out. `fresh` is that of each Site.
    """
    both = getattr(model.config, "is_encoder_decoder", False)
    stacks = _stacks(model) if both else [decoder_layers(model)]
    width = model.config.get_text_config().hidden_size
    found = [matrix for stack in stacks for matrix in _matrices(*stack)]
    return [Site(name, parent, width, fresh) for name, parent in found]


LEFT_DENSE = "peptrain_left_dense"
"""Attribute of an nn.Linear that no method may replace (`probe.leave_dense`)."""


def _matrices(name: str, parent: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield name and parent of each matrix below `parent`, but of none inside a ReparamLinear."""
    for child, module in parent.named_children():
        if isinstance(module, nn.Linear | ReparamLinear):
            if not hasattr(module, LEFT_DENSE):
                yield f"{name}.{child}", parent
        else:
            yield from _matrices(f"{name}.{child}", module)


def check_adaptable(model: PreTrainedModel) -> None:
    """Raise Unsupported if `find_sites` finds nothing, with the matrices that there are."""
    if find_sites(model):
        return
    _, layers = decoder_layers(model)
    others = {
        type(module).__name__
        for module in layers.modules()
        if any(p.ndim == 2 for p in module.parameters(recurse=False))
    }
    raise Unsupported(
        f"{type(model).__name__}: has no nn.Linear inside its decoder layers to adapt"
        f"{f', only {sorted(others)[0]}' if others else ''}; choose method full, or a model such as"
        " Llama, Qwen2 or OLMo2"
    )


def warn_of_experts(model: PreTrainedModel) -> None:
    """Log how many parameters of experts in the decoder layers no method can adapt."""
    experts = sum(p.numel() for p in decoder_layers(model)[1].parameters() if p.ndim > 2)
    if experts:
        log.warning(
            "%.1fM parameters of experts are not nn.Linear and are not adapted", experts / 1e6
        )
