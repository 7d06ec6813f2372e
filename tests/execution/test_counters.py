"""What is counted of computations on real tensors."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from peptrain.execution.counters import Assent, LiveBytes, Operations, Products, touches_tensors


def test_a_storage_counts_once_while_it_lives() -> None:
    x = torch.zeros(100)
    with LiveBytes([x, x[:50], None]) as live:
        assert live.now == 400
        y = x + 1
        z = y.view(10, 10)[3:]
        y.add_(1)
        assert live.now == 800
        del y
        assert live.now == 800
        del z
        assert live.now == 400
    assert live.peak == 800


def test_what_autograd_keeps_is_alive() -> None:
    x = torch.zeros(100, requires_grad=True)
    with LiveBytes(x) as live:
        y = x.exp().sum()
        assert live.now == 400 + 400 + 4
        y.backward()
        assert live.now == 400 + 4 + 400  # the result of exp is gone, a gradient has come
        del y
        assert live.now == 800


def test_sizes_are_rounded_up_to_the_grain() -> None:
    x = torch.zeros(1)
    with LiveBytes(x, grain=512) as live:
        y = torch.cat([x] * 129)
        assert live.now == 512 + 1024 and len(y) == 129


class Factored(nn.Module):
    """y = x (W + B A)ᵀ, [5, 3], of rank 2."""

    def __init__(self) -> None:
        super().__init__()
        self.W, self.B, self.A = (nn.Parameter(torch.ones(s)) for s in ((5, 3), (5, 2), (2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.W + self.B @ self.A)


def test_products_are_sorted_by_module_and_shape_in_both_passes() -> None:
    inner, outer = Factored(), nn.Sequential(nn.Linear(3, 3), Factored())
    outer[1] = inner
    counts = Products({outer: None, inner: (5, 3)}, tokens=7)
    x, head = torch.ones(7, 3, requires_grad=True), torch.ones(11, 5, requires_grad=True)
    with counts.counting():
        F.linear(outer(x), head).sum().backward()
    assert counts.flops == {
        "dense": 3 * 2 * 7 * 3 * 3 + 3 * 2 * 7 * 5 * 3,
        "head": 3 * 2 * 7 * 11 * 5,
    }
    assert counts.fixed == {"low_rank": 3 * 2 * 5 * 3 * 2}  # B A, and the gradients of both
    assert counts.total() == sum(counts.flops.values()) + 180
    assert not inner._forward_hooks and not outer._forward_pre_hooks


def test_attention_is_counted_with_fewer_key_heads() -> None:
    counts = Products()
    q, k = torch.ones(2, 4, 6, 8, requires_grad=True), torch.ones(2, 1, 6, 8, requires_grad=True)
    with counts.counting():
        y = F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)
        assert counts.flops == {"attention": 2 * 2 * 2 * 4 * 6 * 6 * 8}
        y.sum().backward()
    assert counts.flops == {"attention": 7 * 2 * 2 * 4 * 6 * 6 * 8}


def test_products_that_are_added_in_place_are_counted() -> None:
    counts = Products()
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    with counts:
        torch.zeros(2, 4).addmm_(a, b)
        torch.mm(a, b, out=torch.zeros(2, 4))
    assert counts.flops == {"head": 2 * 2 * 2 * 3 * 4}


def test_decompositions_are_counted_by_matrix() -> None:
    counts, X = Products(), torch.eye(3).expand(5, 3, 3)
    with counts:
        torch.linalg.qr(X)
        torch.linalg.svd(X[0])
        torch.linalg.eigh(X[:2])
    assert counts.decompositions == {"qr": 5, "svd": 1, "eigh": 2}


def test_operations_are_those_that_compute() -> None:
    x = torch.ones(2, 3)
    with Operations() as one:
        y = x.view(6).double().exp()
    with Operations() as other:
        z = x.exp().T
    assert y.shape != z.shape
    assert one.seen == other.seen and one.seen.total() == 1


@pytest.mark.parametrize(
    "read", [lambda t: bool(t.any()), lambda t: t.sum().item() == 1, lambda t: all(t.tolist())]
)
def test_what_is_read_of_fake_tensors_is_true(read: Callable[[Tensor], bool]) -> None:
    with FakeTensorMode(), Assent():
        assert read(torch.zeros(3))


def test_touching_is_seen_and_stopped() -> None:
    x = torch.zeros(3)
    assert touches_tensors(lambda: x.add_(1))
    assert not x.any()
    assert not touches_tensors(lambda: (x.shape, torch.Generator().manual_seed(1)))
    with pytest.raises(ValueError):
        touches_tensors(lambda: int("one"))
