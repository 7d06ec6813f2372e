"""A pass over a layer's graph: thin linear maps of one input become one product."""

from __future__ import annotations

import operator
from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files


class StackThinLinears(CustomGraphPass):
    """y_i = x W_iᵀ for i = 1..k are slices of x [W_1; ...; W_k]ᵀ; so compute that.

    The A of q, k, v and of gate, up, in W = B A: one product in place of three or two in the
    forward pass, and in the backward pass one in place of their sum for dx. Thin, that is with no
    more rows in all than columns, because the weights are copied to be side by side.
    """

    def __call__(self, graph: fx.Graph) -> None:
        of_input: dict[Any, list[fx.Node]] = defaultdict(list)
        for node in graph.find_nodes(op="call_function", target=F.linear):
            if _plain(node):
                of_input[node.args[0]].append(node)
        for linears in of_input.values():
            if len(linears) > 1 and _thin(linears):
                _stack(graph, linears)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _plain(node: fx.Node) -> bool:
    """Whether it is the inner map of (x Aᵀ) Bᵀ, without a bias, and A is there from the start.

    Another use of y_i might not take a slice: a view, say.
    """
    inner = all(user.target is F.linear and user.args[:1] == (node,) for user in node.users)
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    weight = node.args[1] if len(node.args) > 1 else None
    there = isinstance(weight, fx.Node) and weight.op == "placeholder"
    return inner and bias is None and there


def _rows(node: fx.Node) -> list[int]:
    return list(_weight(node).meta["example_value"].shape)


def _weight(node: fx.Node) -> fx.Node:
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    return weight


def _thin(linears: list[fx.Node]) -> bool:
    shapes = [_rows(node) for node in linears]
    return sum(n for n, _ in shapes) <= shapes[0][1]


def _stack(graph: fx.Graph, linears: list[fx.Node]) -> None:
    with graph.inserting_before(linears[0]):
        W = graph.call_function(torch.cat, ([_weight(node) for node in linears],))
        y = graph.call_function(F.linear, (linears[0].args[0], W))
        parts = graph.call_function(torch.split, (y, [_rows(node)[0] for node in linears], -1))
        slices = [graph.call_function(operator.getitem, (parts, i)) for i in range(len(linears))]
    for node, part in zip(linears, slices, strict=True):
        node.replace_all_uses_with(part)
        graph.erase_node(node)
