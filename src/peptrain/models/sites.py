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
    """As in the state dict: "model.layers.0.mlp.up_proj"."""
    parent: nn.Module
    width: int
    """The model's hidden size, d in the papers."""
    fresh: bool = True
    """Whether the weight was only just initialised, so that a method may draw it again. One that
    comes from a trained model is to be kept, or approximated."""

    @property
    def module(self) -> nn.Linear | ReparamLinear:
        """What stands there now: after `install` the layer that replaced the nn.Linear, if any."""
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
    """y = x W_effᵀ + bias, with W_eff written in other parameters.

    A frozen base keeps the name `weight`, a bias the name `bias`, so Hugging Face's keys survive.
    A layer that is not linear in x has no W_eff: it leaves `effective_weight` alone, and its method
    says `has_dense_equivalent = False`.
    """

    site: str

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site.name
        self.out_features, self.in_features = site.shape
        self.bias = site.linear.bias

    def effective_weight(self) -> Tensor:
        """W_eff, [out, in], in at least fp32, on unsharded tensors.

        Raises Unsupported for a layer that has none.
        """
        raise Unsupported(
            f"{self.site}: {type(self).__name__} has no effective_weight(), so the model has no"
            " dense weights"
        )

    def extra_repr(self) -> str:
        shapes = ", ".join(f"{k}={list(p.shape)}" for k, p in self.named_parameters())
        return f"in={self.in_features}, out={self.out_features}, {shapes}"


def reparametrized(model: nn.Module) -> Iterator[ReparamLinear]:
    """Every layer that a method replaced, in the model's order."""
    return (m for m in model.modules() if isinstance(m, ReparamLinear))


def has_effective_weight(layer: ReparamLinear) -> bool:
    """Whether the layer's class defines `effective_weight`."""
    return type(layer).effective_weight is not ReparamLinear.effective_weight


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of decoder layers and its name: the longest list of modules of one class.

    Structure, not names: `model.layers`, `transformer.h` and the like are all found. Lists inside
    a decoder layer (experts, say) don't count. Raises Unsupported when there is none.
    """
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{o}.") for o, _ in lists)]
    uniform = [(n, m) for n, m in outer if len({type(layer) for layer in m}) == 1]
    if not uniform:
        raise Unsupported(
            f"{type(model).__name__} has no stack of like decoder layers, so there is nothing to"
            " adapt; peptrain works on decoder-only models such as Llama, Qwen2 and OLMo2"
        )
    return max(uniform, key=lambda named: len(named[1]))


def find_sites(model: PreTrainedModel, fresh: bool = True) -> list[Site]:
    """Every nn.Linear inside a decoder layer, or what replaced it, in the model's order; `fresh`
    as in Site."""
    stack, layers = decoder_layers(model)
    width = model.config.get_text_config().hidden_size
    found = _matrices(stack, layers)
    return [Site(name, parent, width, fresh) for name, parent in found]


def _matrices(name: str, parent: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and parents of the matrices below `parent`; what lies in a method's layer is its."""
    for child, module in parent.named_children():
        if isinstance(module, nn.Linear | ReparamLinear):
            yield f"{name}.{child}", parent
        else:
            yield from _matrices(f"{name}.{child}", module)


def warn_of_experts(model: PreTrainedModel) -> None:
    """Say what of the decoder layers no method can adapt."""
    experts = sum(p.numel() for p in decoder_layers(model)[1].parameters() if p.ndim > 2)
    if experts:
        log.warning(
            "%.1fM parameters of experts are no nn.Linear and stay as they are", experts / 1e6
        )
