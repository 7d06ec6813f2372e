"""LLaMA's decoder layer of low-rank maps as a few kernels, for `Method.accelerate`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from peptrain.methods.lowrank import LowRankLinear
from peptrain.ops.fused_lowrank import (
    Factors,
    Norm,
    added_linear,
    added_normed_mlp,
    fits_layer,
    rotated_qkv,
)


class LowRankLayer(LlamaDecoderLayer):
    """A decoder layer whose seven maps are LowRankLinear without biases; fused where no gradient is
    asked for and no cache is kept, whose keys would have their columns in another order.

    Between its products and attention nothing has a pass of its own but the norms' sums.
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
        """[rows, L, d] to [rows, L, d]."""
        assert position_embeddings is not None
        if not self._fits(hidden_states, position_embeddings[0], past_key_values):
            return super().forward(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **settings,
            )
        attention = self.self_attn
        cos, sin = (t.reshape(-1, t.shape[-1]) for t in position_embeddings)
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        qkv = rotated_qkv(x, _norm(self.input_layernorm), *self._qkv(), cos, sin)
        heads = (*hidden_states.shape[:-1], -1, attention.head_dim)
        q, k, v = (t.view(heads).transpose(1, 2) for t in qkv)
        attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
        rest = {"dropout": 0.0, "scaling": attention.scaling, **settings}
        h, _ = attend(attention, q, k, v, attention_mask, **rest)
        x, mean = added_linear(x, h.reshape(x.shape[0], -1), _factors(attention.o_proj))
        x = added_normed_mlp(x, mean, _norm(self.post_attention_layernorm), *self._mlp())
        return x.view(hidden_states.shape)

    def _fits(self, x: Tensor, cos: Tensor, cache: Any) -> bool:
        if torch.is_grad_enabled() or cache is not None:
            return False
        known = self.self_attn.config._attn_implementation in ALL_ATTENTION_FUNCTIONS
        return known and fits_layer(x, cos.shape[-1], self._qkv(), self._mlp())

    def _qkv(self) -> tuple[Factors, Factors, Factors]:
        own = self.self_attn
        return _factors(own.q_proj), _factors(own.k_proj), _factors(own.v_proj)

    def _mlp(self) -> tuple[Factors, Factors, Factors]:
        own = self.mlp
        return _factors(own.gate_proj), _factors(own.up_proj), _factors(own.down_proj)


def fuse_layers(model: nn.Module) -> None:
    """Turn every decoder layer of LLaMA's that is made of low-rank maps into a LowRankLayer, in
    place. Layers of other models keep their forward pass."""
    for module in model.modules():
        if type(module) is LlamaDecoderLayer and _is_lowrank(module):
            module.__class__ = LowRankLayer


def _is_lowrank(layer: LlamaDecoderLayer) -> bool:
    maps = [*layer.self_attn.children(), *(getattr(layer.mlp, n) for n in _MLP)]
    norms = (layer.input_layernorm, layer.post_attention_layernorm)
    return (
        all(isinstance(m, LowRankLinear) and m.bias is None for m in maps)
        and all(type(norm) is LlamaRMSNorm for norm in norms)
        and layer.mlp.config.hidden_act == "silu"
    )


_MLP = ("gate_proj", "up_proj", "down_proj")


def _factors(layer: Any) -> Factors:
    return layer.B, layer.A


def _norm(module: LlamaRMSNorm) -> Norm:
    return Norm(module.weight, module.variance_epsilon)
