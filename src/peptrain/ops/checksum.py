"""Checksums of tensors, computed where they are, to find replicas that differ."""

from __future__ import annotations

import torch
from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
CHUNK = 1 << 24
"""Elements at a time: 128 MiB for each of the three int64 temporaries."""


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """Return sum_i (2i + 1) bits_i mod 2^64 as an int64 scalar on the tensor's device.

    bits_i are the bits of element i as an integer. The weights are odd, so a change of any single
    element changes the sum.
    """
    flat = tensor.detach().contiguous().view(-1)
    bits = (flat.view(torch.uint8) if flat.dtype is torch.bool else flat).view(
        INTEGERS[flat.element_size()]
    )
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), CHUNK):
        part = bits[start : start + CHUNK].long()
        odd = torch.arange(2 * start + 1, 2 * (start + len(part)), 2, device=tensor.device)
        total += (part * odd).sum()
    return total
