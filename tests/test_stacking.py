"""Thin linear maps of one input become one product, and the numbers stay."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, fx, nn

from peptrain.stacking import StackThinLinears

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
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(forward, backend=backend)(x, *params),
                                   forward(x, *params))  # fmt: skip
    assert counts == [left]
