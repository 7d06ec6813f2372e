"""Attention over whole windows: without masks, by the kernel that is fast for their length."""

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
"""Hugging Face's own attention under a name that it makes no masks for."""


SHORT = 64
"""Tokens of a window up to which cuDNN's attention is not the fastest: 512 windows of 32 tokens and
32 heads of 64 take it 348 µs on an H200, the memory-efficient one 193."""


TRITON = find_spec("triton") is not None
"""Looked up once, not in every layer of every pass."""


@torch.no_grad()
def attend_without_masks(model: PreTrainedModel, seq_len: int) -> bool:
    """Let attention be causal by PyTorch's flag alone: every window is whole. Whether it could.

    Hugging Face looks in each forward pass whether windows are packed from several texts, and so
    waits for the device; and for a model that is being recorded or traced it builds the mask that
    fast kernels don't take. A model whose logits change, such as one with a sliding window, keeps
    its masks. One without them takes no padding, no cache with several new tokens, and none of
    a fixed length (`StaticCache`), whose empty places it would attend to.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if model.config._attn_implementation != "sdpa":
        return False
    # Asked of Hugging Face's function itself, whose numbers are the same to the last bit.
    AttentionInterface.register(WHOLE_WINDOWS, sdpa_attention_forward)
    ids = torch.arange(seq_len, device=model.device)[None] % vocabulary_size(model)
    with evaluating(model):
        before = model(input_ids=ids, use_cache=False).logits
        model.set_attn_implementation(WHOLE_WINDOWS)
        same = torch.equal(before, model(input_ids=ids, use_cache=False).logits)
    AttentionInterface.register(WHOLE_WINDOWS, _attention)
    if not same:
        model.set_attn_implementation("sdpa")
        log.info("attention keeps Hugging Face's masks, which do more than hide later tokens")
    return same


def _attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None = None,
    **own: Any,
) -> Any:
    """Hugging Face's attention, q: [rows, heads, L, d], by the kernel that is fast for L."""
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
