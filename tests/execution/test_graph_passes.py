"""Thin products with a common factor become one, and the numbers stay."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from peptrain.execution.graph_passes import StackThinLinears, StackThinProducts
from peptrain.ops.linear import added_linear

Forward = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def inner(x: Tensor, A: Tensor, C: Tensor, B: Tensor) -> Tensor:
    return F.linear(F.linear(x, A), B) + F.linear(F.linear(x, C), B)


def viewed(x: Tensor, A: Tensor, C: Tensor, B: Tensor) -> Tensor:
    return F.linear(x, A).view(len(x), -1) + F.linear(x, C).view(len(x), -1)


def changed(x: Tensor, A: Tensor, C: Tensor, B: Tensor) -> Tensor:
    x = x + 1
    y = F.linear(x, A)
    x.mul_(2)
    return y + F.linear(x, C)


def of_vectors(x: Tensor, A: Tensor, C: Tensor, B: Tensor) -> Tensor:
    return F.linear(x, A[0]) + F.linear(x, C[0])


def wide(x: Tensor, A: Tensor, C: Tensor, B: Tensor) -> Tensor:
    A, C, B = (torch.cat([W] * 3) for W in (A, C, B))
    return F.linear(F.linear(x, A), B.mT) + F.linear(F.linear(x, C), B.mT)


@pytest.mark.parametrize(
    "forward, left", [(inner, 3), (viewed, 2), (changed, 2), (of_vectors, 2), (wide, 4)]
)
def test_only_the_inner_maps_of_one_input_are_stacked(forward: Forward, left: int) -> None:
    counts: list[int] = []

    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        StackThinLinears()(graph.graph)
        graph.recompile()
        counts.append(len(graph.graph.find_nodes(op="call_function", target=F.linear)))
        return graph

    torch._dynamo.reset()
    x, A, C, B = (torch.randn(*s) for s in ((3, 4, 8), (2, 8), (2, 8), (8, 2)))
    if forward is wide:
        B = B[:2].contiguous()
    params = [nn.Parameter(W) for W in (A, C, B)]
    torch.testing.assert_close(
        torch.compile(forward, backend=backend)(x, *params), forward(x, *params)
    )
    assert counts == [left]


def in_plain_operators(call: Any, inputs: list[Tensor]) -> tuple[list[Tensor], list[int]]:
    """The output and gradients of `call` in fp64 with StackThinProducts, and how many products it
    took away in the forward and in the backward graph."""
    taken: list[int] = []

    def compiled(graph: fx.GraphModule, _: Any) -> Any:
        before = len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default))
        StackThinProducts()(graph.graph)
        graph.graph.lint()
        graph.recompile()
        after = len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default))
        taken.append(before - after)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(  # as Inductor makes the graphs
        fw_compiler=compiled,
        bw_compiler=compiled,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    return results(torch.compile(call, backend=backend, fullgraph=True), inputs), taken


def results(call: Any, inputs: list[Tensor]) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    y = call(*leaves)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return [y.detach(), *(t.grad for t in leaves if t.grad is not None)]


def added(x: Tensor, *weights: Tensor) -> Tensor:
    maps = zip(weights[::3], weights[1::3], weights[2::3], strict=True)
    return torch.stack([added_linear(x, *parts) for parts in maps]).sin()


def drawn(*shapes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]


@pytest.mark.parametrize("r, taken", [(2, 4), (4, 4), (5, 0)])
def test_thin_products_of_a_backward_pass_are_stacked(r: int, taken: int) -> None:
    """x Aᵀ and (dy B)ᵀ x of three maps of one x with 16 columns; a rank above 4 is not thin."""
    inputs = drawn((6, 16), *[(8, 16), (8, r), (r, 16)] * 3)
    found, fewer = in_plain_operators(added, inputs)
    assert sum(fewer) == taken  # the compiler may have moved x Aᵀ to the forward pass
    for one, other in zip(found, results(added, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_no_more_products_are_stacked_than_x_has_columns() -> None:
    inputs = drawn((6, 16), (4, 3), *[(16, 4)] * 6)

    def call(x: Tensor, M: Tensor, *weights: Tensor) -> Tensor:
        return torch.cat([x @ W @ M for W in weights], 1).sin()

    found, fewer = in_plain_operators(call, inputs)
    assert fewer[0] == 3  # four become one, and the other two stay
    for one, other in zip(found, results(call, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_columns_that_other_operators_read_are_not_stacked() -> None:
    """They would copy them."""
    inputs = drawn((6, 16), (16, 4), (16, 4))
    _, fewer = in_plain_operators(lambda x, W, V: (x @ W).sin() + (x @ V).cos(), inputs)
    assert fewer[0] == 0


def chained(x: Tensor, W: Tensor, M: Tensor) -> Tensor:
    """x is in three products, the second of which needs the first and the third neither."""
    first = x @ W @ M
    second = x @ (W * first.sum()) @ M
    return second + x @ W.sin() @ M


def crossed(x: Tensor, W: Tensor, M: Tensor) -> Tensor:
    """Of two factors with two products each, the second of either needs the first of the other."""
    z = x + 1
    a, b = x @ W @ M, z @ W.sin() @ M
    return x @ (W * b.sum()) @ M + z @ (W * a.sum()) @ M


@pytest.mark.parametrize("call", [chained, crossed])
def test_a_product_is_not_stacked_with_what_it_needs(call: Any) -> None:
    inputs = drawn((6, 16), (16, 4), (4, 3))
    found, fewer = in_plain_operators(call, inputs)
    assert fewer[0] == 1
    for one, other in zip(found, results(call, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


class LowRankMaps(nn.Module):
    """Maps B_i A_i of one x, each under a function of its own."""

    def __init__(self, *shapes: tuple[int, int]) -> None:
        super().__init__()
        self.A = nn.ParameterList(torch.randn(r, 16) for _, r in shapes)
        self.B = nn.ParameterList(torch.randn(n, r) for n, r in shapes)

    def forward(self, x: Tensor) -> Tensor:
        y = [F.linear(F.linear(x, A), B) for A, B in zip(self.A, self.B, strict=True)]
        return torch.cat([one * (i + 1) for i, one in enumerate(y)], -1)


@pytest.mark.parametrize(
    "shapes, grad, batched",
    [
        ([(8, 2)] * 3, False, 1),
        ([(8, 2)] * 3, True, 0),
        ([(8, 2), (6, 2)], False, 0),
        ([(8, 2), (8, 3)], False, 0),
    ],
)
def test_outer_maps_are_batched_without_gradients(
    shapes: list[tuple[int, int]], grad: bool, batched: int
) -> None:
    counts: list[int] = []

    def backend(graph: fx.GraphModule, inputs: Any) -> Any:
        StackThinLinears()(graph.graph)
        graph.graph.lint()
        graph.recompile()
        counts.append(len(graph.graph.find_nodes(op="call_function", target=torch.bmm)))
        return graph

    torch._dynamo.reset()
    maps, x = LowRankMaps(*shapes), torch.randn(3, 5, 16)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(torch.compile(maps, backend=backend)(x), maps(x))
        assert counts == [batched]
        for length in (6, 7):  # compiled again, and at last for any length
            x = torch.randn(3, length, 16)
            torch.testing.assert_close(torch.compile(maps, backend=backend)(x), maps(x))
