"""Passes over a compiled layer's graph that stack thin products and keep attention's results.

A product with only r columns uses a GPU badly, and reads all of its other factor for little work.
Therefore products with a common factor are stacked into one.
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
    """Compute y_i = x W_iᵀ, i = 1..k, as slices of x [W_1; ...; W_k]ᵀ.

    This applies to the A of q, k, v and of gate, up in W = B A. One product replaces three or two
    in the forward pass, and one replaces their sum for dx in the backward pass. Only thin weights
    are stacked, with no more rows in total than columns, because stacking copies them.
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
    """Return whether the node is the inner map of (x Aᵀ) Bᵀ, without a bias and with A an input.

    Other users of y_i, such as a view, might not accept a slice.
    """
    inner = all(user.target is F.linear and user.args[:1] == (node,) for user in node.users)
    return inner and _plain_weight(node)


def _plain_weight(node: fx.Node) -> bool:
    """Return whether the map has no bias and its weight is an input of the graph."""
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
    if not torch.is_grad_enabled():  # in training, the backward pass would copy the gradients
        _batch(graph, y, slices)


def _batch(graph: fx.Graph, z: fx.Node, parts: list[fx.Node]) -> None:
    """Compute z_i B_iᵀ, for the parts z_i of z, as one batched product if the shapes agree."""
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
    """Compute x W_i, i = 1..k, as slices of x [W_1 ... W_k], and V_i x as slices of [V_1; ...] x.

    The pass works on the forward or backward graph made by autograd. It finds x A_iᵀ and t_iᵀ x of
    maps with a hand-written backward pass, such as W + B A. Products are thin if r is at most a
    quarter of x's columns. Together they may have at most as many as x, since stacking copies the
    factors. A slice of columns is strided: another product reads it directly, other operators copy
    it.
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
    """Return (r, columns of x) of x W or V x, where x is argument `common` of the product."""
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
    """Return whether only products read the node, transposed or not.

    An output of the graph counts as read by a product of the next one.
    """
    return all(
        user.op == "output" or user.target is mm or (user.target is permute and _for_products(user))
        for user in node.users
    )


def _fitting(products: list[fx.Node], common: int) -> list[fx.Node]:
    """Choose, in order, products that are thin together and don't depend on one another."""
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
    """Replace the products by slices of one; the caller sorts the graph topologically."""
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
    """Concatenate operands; transposed ones before their transposition, so rows are contiguous."""
    cat = torch.ops.aten.cat.default
    if any(node.target is not permute for node in operands):
        return _call(graph, cat, operands, dim)
    plain = _call(graph, cat, [node.args[0] for node in operands], 1 - dim)
    return _call(graph, permute, plain, [1, 0])


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """Add a node with the fake value that later passes need."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*fx.node.map_arg(args, lambda n: n.meta["val"]))
    return node


class KeepAttention(CustomGraphPass):
    """Keep the results of attention under any memory budget except 0, which keeps nothing.

    PyTorch estimates the cost of a recomputation by its FLOPs, but treats operators missing from
    its list of expensive ones as free. The attention of cuDNN and of the CPU is not on that list,
    although it takes four times as long per element of its result as a product of rank d/4.
    Recomputed layers (train.checkpoint_activations) have a policy of their own for every node.
    """

    def __call__(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            name = str(node.target)
            if "scaled_dot_product" in name and "backward" not in name:
                node.meta.setdefault("recompute", CheckpointPolicy.MUST_SAVE)

    def uuid(self) -> Any:
        return get_hash_for_files((__file__,))
