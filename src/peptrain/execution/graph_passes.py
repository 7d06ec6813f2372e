"""Passes over a compiled layer's graph: thin products become one, attention is not recomputed.

A product with r of its n columns fills a GPU badly, and reads all of its other factor for little;
so those with a common factor are stacked.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy

mm, permute = torch.ops.aten.mm.default, torch.ops.aten.permute.default


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
    return inner and _plain_weight(node)


def _plain_weight(node: fx.Node) -> bool:
    """Whether the map has no bias, and its weight is there from the start."""
    bias = node.args[2] if len(node.args) > 2 else node.kwargs.get("bias")
    weight = node.args[1] if len(node.args) > 1 else None
    return bias is None and isinstance(weight, fx.Node) and weight.op == "placeholder"


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
    if not torch.is_grad_enabled():  # in a backward pass their gradients would have to be copied
        _batch(graph, y, slices)


def _batch(graph: fx.Graph, z: fx.Node, parts: list[fx.Node]) -> None:
    """z_i B_iᵀ, for the parts z_i of z, as one batched product, if the B_i are alike."""
    outer = [user for part in parts for user in part.users]
    shapes = [node.meta["example_value"].shape for node in outer]
    alike = len({tuple(_rows(node)) for node in outer}) == 1 and all(map(_plain_weight, outer))
    fixed = all(isinstance(size, int) for shape in shapes for size in shape)
    if not (alike and fixed and all(len(part.users) == 1 for part in parts)):
        return
    with graph.inserting_before(parts[-1].next):
        rows = graph.call_method("reshape", (z, -1, len(parts), _rows(outer[0])[1]))
        weights = graph.call_function(torch.stack, ([_weight(node) for node in outer],))
        factors = [
            graph.call_method("transpose", (t, *d)) for t, *d in ((rows, 0, 1), (weights, 1, 2))
        ]
        y = graph.call_function(torch.bmm, tuple(factors))
        each = [graph.call_function(operator.getitem, (y, i)) for i in range(len(outer))]
        results = [
            graph.call_method("reshape", (one, tuple(shape)))
            for one, shape in zip(each, shapes, strict=True)
        ]
    for node, result in zip(outer, results, strict=True):
        node.replace_all_uses_with(result)
        graph.erase_node(node)


class StackThinProducts(CustomGraphPass):
    """x W_i for i = 1..k are slices of x [W_1 ... W_k], and V_i x of [V_1; ...; V_k] x.

    In the graph that autograd has made, forward or backward: x A_iᵀ and t_iᵀ x of maps whose
    backward pass is written by hand, W + B A for one. Thin: r is at most a quarter of x's columns,
    and all of them together at most as many, since what is stacked is copied. A slice of columns is
    strided, which another product takes as it is and other operators copy.
    """

    def __call__(self, graph: fx.Graph) -> None:
        from torch._inductor.pattern_matcher import stable_topological_sort

        for common in (0, 1):
            groups: dict[Any, list[fx.Node]] = defaultdict(list)
            for node in graph.find_nodes(op="call_function", target=mm):
                if _is_thin(node, common):
                    groups[node.args[common]].append(node)
            for products in groups.values():
                _stack_products(graph, _fitting(products, common), common)
        stable_topological_sort(graph)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))


def _thickness(node: fx.Node, common: int) -> tuple[int, int]:
    """(r, the columns of x) of x W or V x, where x is argument `common` of the product."""
    (n, _), (_, m) = (_operand(node, i).meta["val"].shape for i in (0, 1))
    columns = _operand(node, common).meta["val"].shape[1]
    return (m if common == 0 else n), columns


def _operand(node: fx.Node, i: int) -> fx.Node:
    operand = node.args[i]
    assert isinstance(operand, fx.Node)
    return operand


def _is_thin(node: fx.Node, common: int) -> bool:
    r, columns = _thickness(node, common)
    if not (isinstance(r, int) and isinstance(columns, int) and 4 * r <= columns):
        return False
    return common == 1 or _for_products(node)


def _for_products(node: fx.Node) -> bool:
    """Whether other products alone read it, transposed or not, in this pass or the next."""
    return all(
        user.op == "output" or user.target is mm or (user.target is permute and _for_products(user))
        for user in node.users
    )


def _fitting(products: list[fx.Node], common: int) -> list[fx.Node]:
    """The first of them, as many as are thin together; none that needs the result of another."""
    chosen: list[fx.Node] = []
    total, later = 0, set[fx.Node]()
    for node in products:
        r, columns = _thickness(node, common)
        needing = _descendants(node)
        if total + r <= columns and node not in later and needing.isdisjoint(chosen):
            total += r
            chosen.append(node)
            later |= needing
    return chosen


def _descendants(node: fx.Node) -> set[fx.Node]:
    found, pending = set[fx.Node](), [node]
    while pending:
        new = [user for user in pending.pop().users if user not in found]
        found.update(new)
        pending += new
    return found


def _stack_products(graph: fx.Graph, products: Sequence[fx.Node], common: int) -> None:
    """Where the new nodes stand is left to a topological sort."""
    if len(products) < 2:
        return
    dim = 1 - common  # of the operands' r, and of the result's
    with graph.inserting_before(products[0]):
        stacked = _side_by_side(graph, [_operand(node, dim) for node in products], dim)
        x = products[0].args[common]
        factors = (x, stacked) if common == 0 else (stacked, x)
        y = _call(graph, mm, *factors)
        start = 0
        for node in products:
            end = start + _thickness(node, common)[0]
            part = _call(graph, torch.ops.aten.slice.Tensor, y, dim, start, end)
            node.replace_all_uses_with(part)
            start = end
    for node in products:
        graph.erase_node(node)


def _side_by_side(graph: fx.Graph, operands: list[fx.Node], dim: int) -> fx.Node:
    """Transposed ones before they are, so that rows are copied as they lie."""
    cat = torch.ops.aten.cat.default
    if any(node.target is not permute for node in operands):
        return _call(graph, cat, operands, dim)
    plain = _call(graph, cat, [node.args[0] for node in operands], 1 - dim)
    return _call(graph, permute, plain, [1, 0])


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """A node with the fake value that later passes look for."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]))
    return node


class KeepAttention(CustomGraphPass):
    """Keep the results of attention under any memory budget but 0, which keeps nothing.

    PyTorch weighs a recomputation by its multiplications, except for operators that are not on its
    list of costly ones, which are free. cuDNN's attention isn't, nor is the CPU's; it takes four
    times as long for each number it gives as a product of rank d/4.
    """

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            name = str(node.target)
            if "scaled_dot_product" in name and "backward" not in name:
                node.meta["recompute"] = CheckpointPolicy.MUST_SAVE

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))
