"""Precision of sums, small updates and matrix products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def tf32_products() -> Iterator[None]:
    """Let a GPU round the entries of fp32 matrices to 11 bits before it multiplies them, as fp16
    has, with the range and the sums of fp32: its matrix units then do it several times as fast."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32"
    try:
        yield
    finally:
        products.fp32_precision = before
