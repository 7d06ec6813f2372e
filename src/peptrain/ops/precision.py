"""Dtypes of at least fp32, for sums and small updates."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(*dtypes: torch.dtype) -> torch.dtype:
    """Return the widest of `dtypes`, or fp32 if all are narrower."""
    widest = torch.float32
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def widened(*tensors: Tensor) -> list[Tensor]:
    """Return each tensor in its own dtype or fp32, whichever is wider."""
    return [t.to(at_least_fp32(t.dtype)) for t in tensors]
