"""A pass over a layer's joint graph: what is not recomputed however little may be kept."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.checkpoint import CheckpointPolicy


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
