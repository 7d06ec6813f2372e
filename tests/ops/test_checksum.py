"""Checksums of tensors, against Python's integers."""

import itertools

import pytest
import torch
from torch import Tensor

import peptrain.ops.checksum as module
from peptrain.ops.checksum import checksum

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32,
          torch.uint8, torch.bool)  # fmt: skip


def by_hand(tensor: Tensor) -> int:
    """The bytes of each element as a Python integer, weighted and summed without a limit."""
    size = tensor.element_size()
    raw = bytes(tensor.contiguous().flatten().view(torch.uint8).tolist())
    signed = size > 1
    parts = [raw[k : k + size] for k in range(0, len(raw), size)]
    values = [int.from_bytes(part, "little", signed=signed) for part in parts]
    total = sum((2 * k + 1) * value for k, value in enumerate(values)) % 2**64
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_the_sum_is_that_of_the_definition(
    dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    values = (torch.randn(5, 9, dtype=torch.float64) * 50).to(dtype)
    for tensor in (values, values.t(), values[:0], values[2, 3]):
        before = tensor.clone()
        assert checksum(tensor).item() == by_hand(tensor)
        assert torch.equal(tensor, before)


def test_any_change_of_one_element_changes_it() -> None:
    values = torch.tensor([0.0, 1.0, 1.0, -0.0])
    for k, bit in itertools.product(range(4), range(32)):
        changed = values.clone()
        changed.view(torch.int32)[k] ^= 1 << bit if bit < 31 else -(1 << 31)
        assert checksum(changed) != checksum(values)
    assert checksum(values[[1, 0, 2, 3]]) != checksum(values)
