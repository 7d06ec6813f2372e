"""The dtype in which sums and small changes are computed: never below fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(*dtypes: torch.dtype) -> torch.dtype:
    """The widest of `dtypes`, fp32 if they are narrower."""
    widest = torch.float32
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    return widest


def widened(*tensors: Tensor) -> list[Tensor]:
    """Each of `tensors` in its own dtype or fp32, whichever is wider."""
    return [t.to(at_least_fp32(t.dtype)) for t in tensors]
