"""LLaMA's decoder layer of low-rank maps in a few fused kernels, for `Method.fuse`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaRMSNorm,
)

from peptrain.kernels.lowrank import (
    Factors,
    Norm,
    added_linear,
    added_normed_mlp,
    fits_layer,
    rotated_qkv,
)
from peptrain.kernels.swiglu_mlp import LowRankMap, LowRankMLP


class LowRankLayer(LlamaDecoderLayer):
    """A LLaMA decoder layer whose forward pass is fused where possible.

    It is fused if its seven maps are LowRankMaps without biases, gradients are disabled and no
    cache is used, because cached keys would have their columns in another order. Apart from its
    products and attention, only the first norm's sum needs a pass over memory.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **settings: Any,
    ) -> Tensor:
        """Map [rows, L, d] to [rows, L, d]."""
        assert position_embeddings is not None
        settings |= {"position_ids": position_ids, "use_cache": use_cache}
        if not self._fits(hidden_states, position_embeddings[0], past_key_values):
            return super().forward(
                hidden_states,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                **settings,
            )
        attention = self.self_attn
        q_map, k_map, v_map, o_map, *mlp = _factors(self)
        cos, sin = (t.reshape(-1, t.shape[-1]) for t in position_embeddings)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        qkv = rotated_qkv(x, _norm(self.input_layernorm), q_map, k_map, v_map, cos, sin)
        heads = (*hidden_states.shape[:-1], -1, attention.head_dim)
        q, k, v = (t.view(heads).transpose(1, 2) for t in qkv)
        attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
        dropout = attention.attention_dropout if attention.training else 0.0
        rest = {"dropout": dropout, "scaling": attention.scaling, **settings}
        h, _ = attend(attention, q, k, v, attention_mask, **rest)
        x, mean = added_linear(x, h.reshape(x.shape[0], -1), o_map)
        x = added_normed_mlp(x, mean, _norm(self.post_attention_layernorm), *mlp)
        return x.view(hidden_states.shape)

    def _fits(self, x: Tensor, cos: Tensor, cache: Any) -> bool:
        if torch.is_grad_enabled() or cache is not None or not _is_lowrank(self):
            return False
        known = self.self_attn.config._attn_implementation in ALL_ATTENTION_FUNCTIONS
        return known and fits_layer(x, cos.shape[-1], _factors(self))


def fuse_layers(model: nn.Module) -> None:
    """Turn every LLaMA decoder layer of low-rank maps into a LowRankLayer, in place.

    Its MLP must already be a LowRankMLP. Layers of other models keep their forward pass.
    """
    for module in model.modules():
        if type(module) is LlamaDecoderLayer and _is_lowrank(module):
            module.__class__ = LowRankLayer


def _is_lowrank(layer: LlamaDecoderLayer) -> bool:
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    return (
        isinstance(layer.mlp, LowRankMLP)
        and type(layer.self_attn) is LlamaAttention
        and all(isinstance(m, layer.mlp.kind) and m.bias is None for m in _maps(layer))
        and all(type(norm) is LlamaRMSNorm for norm in norms)
    )


def _maps(layer: Any) -> list[LowRankMap]:
    """Return q, k, v, o, gate, up and down."""
    own = layer.self_attn
    return [own.q_proj, own.k_proj, own.v_proj, own.o_proj, *layer.mlp.layers()]


def _factors(layer: LlamaDecoderLayer) -> list[Factors]:
    return [(m.B, m.A) for m in _maps(layer)]


def _norm(module: LlamaRMSNorm) -> Norm:
    return Norm(module.weight, module.variance_epsilon)
