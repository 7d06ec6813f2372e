"""Attention over full windows, without masks and with the fastest kernel for their length."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from peptrain.models.hf import vocabulary_size
from peptrain.models.probe import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("peptrain")

WHOLE_WINDOWS = "causal_sdpa"
"""Name of Hugging Face's own attention for which it builds no masks."""


SHORT = 64
"""Longest window, in tokens, for which cuDNN's attention is not the fastest. For 512 windows of 32
tokens and 32 heads of 64 it takes 348 µs on an H200, memory-efficient attention 193."""


TRITON = find_spec("triton") is not None
"""Checked once at import instead of in every layer of every pass."""


@torch.no_grad()
def attend_without_masks(model: PreTrainedModel, seq_len: int) -> bool:
    """Make attention causal by PyTorch's `is_causal` flag instead of masks.

    Return whether that was possible. In each forward pass Hugging Face checks whether windows are
    packed from several texts, which synchronises with the device. For a model that is being
    captured or traced it builds a mask that the fast kernels don't accept. A model whose logits
    would change, such as one with a sliding window, keeps its masks. Without masks a model must not
    be given padding, a cache with several new tokens, or a cache of fixed length (`StaticCache`),
    whose empty positions it would attend to.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if model.config._attn_implementation != "sdpa":
        return False
    # Compare with Hugging Face's own function, which is bit-identical if masks make no difference.
    AttentionInterface.register(WHOLE_WINDOWS, sdpa_attention_forward)
    ids = torch.arange(seq_len, device=model.device)[None] % vocabulary_size(model)
    with evaluating(model):
        before = model(input_ids=ids, use_cache=False).logits
        model.set_attn_implementation(WHOLE_WINDOWS)
        same = torch.equal(before, model(input_ids=ids, use_cache=False).logits)
    AttentionInterface.register(WHOLE_WINDOWS, _attention)
    if not same:
        model.set_attn_implementation("sdpa")
        log.info("keeping Hugging Face's attention masks: they do more than hide later tokens")
    return same


def _attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None = None,
    **own: Any,
) -> Any:
    """Compute Hugging Face's attention, q: [rows, heads, L, d], with the fastest kernel for L."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if q.shape[2] > SHORT:
        return sdpa_attention_forward(module, q, k, v, attention_mask, **own)
    plain = attention_mask is None and not own.get("dropout") and own.get("is_causal") is not False
    if plain and getattr(module, "is_causal", True) and TRITON:
        from peptrain.kernels.attention import fits_short, short_attention

        if fits_short(q, k, v):
            scale = own.get("scaling") or q.shape[-1] ** -0.5
            return short_attention(q, k, v, scale), None
    if not q.is_cuda:
        return sdpa_attention_forward(module, q, k, v, attention_mask, **own)
    order = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    order += [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        return sdpa_attention_forward(module, q, k, v, attention_mask, **own)
