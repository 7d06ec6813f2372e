"""The dense equivalent of a model: every replaced layer as its effective weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from peptrain.models.sites import ReparamLinear, reparametrized

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights by Hugging Face's names, with `effective_weight()` for replaced layers.

    Shared parameters appear once. Tensors are copies on the model's device.
    """
    layers = {layer.site: layer for layer in reparametrized(model)}
    owned = {
        f"{layer.site}.{name}" for layer in layers.values() for name, _ in layer.named_parameters()
    }
    state = {n: p.detach().clone() for n, p in model.named_parameters() if n not in owned}
    for site, layer in layers.items():
        state[f"{site}.weight"] = layer.effective_weight().detach().clone()
        if layer.bias is not None:
            state[f"{site}.bias"] = layer.bias.detach().clone()
    return state


@torch.no_grad()
def densify(model: nn.Module) -> None:
    """Turn every ReparamLinear of the model into an nn.Linear with its effective weight."""
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, ReparamLinear):
            continue
        dtype = max(layer.parameters(), key=lambda p: p.ndim).dtype
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(layer.effective_weight().to(dtype))
        plain.bias = layer.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain.train(layer.training))


@torch.no_grad()
def load_dense(model: PreTrainedModel, state: Mapping[str, Tensor]) -> None:
    """Copy dense weights into a plain model of the same shape."""
    own = dict(model.named_parameters())
    assert own.keys() == state.keys(), own.keys() ^ state.keys()
    for name, p in own.items():
        p.copy_(state[name])
