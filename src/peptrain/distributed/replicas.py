"""Equal models on several processes: sent once, and their gradients summed after every pass."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peptrain.distributed.owners import send_
from peptrain.distributed.world import World
from peptrain.errors import Unsupported

ALONE = "several processes need the same parameters in every step; train it in one process"


class Replicas:
    """A module that every process has, with rank 0's parameters.

    There is no wrapper, so passes are recorded, compiled and fused as in one process, and a phase
    may change what is trained. Buffers are constants that follow from the seed and are not sent.
    """

    def __init__(self, module: nn.Module, here: World, dtype: torch.dtype | None) -> None:
        """dtype: that in which gradients are summed. None: their own."""
        self.here, self.dtype = here, dtype
        # Frozen ones too, which a method may train later. The module is a loss around `model`.
        named = module.named_parameters()
        self.names: dict[Tensor, str] = {p: name.removeprefix("model.") for name, p in named}
        self.moved: set[Tensor] = set()
        """Parameters with a gradient, the same in every step and on every rank."""
        with here.within(here.slow):
            send_((p, 0) for p in self.names)

    def sum_gradients(self) -> None:
        """Replace each gradient by its sum over the ranks, in place, with one call for a dtype.

        Raises Unsupported if other parameters have gradients than on another rank or in the first
        step, because the ranks would add up tensors that do not belong together, and for a sparse
        gradient.
        """
        moved = [p for p in self.names if p.grad is not None]
        if not self.moved:
            self._check_alike(moved)
            self.moved = set(moved)
        elif other := self.moved.symmetric_difference(moved):
            name = min(self.names[p] for p in other)
            raise Unsupported(f"{name}: has a gradient in some steps only; {ALONE}")
        alike: dict[torch.dtype, list[Tensor]] = {}
        for p in moved:
            assert p.grad is not None
            if p.grad.layout != torch.strided:
                raise Unsupported(
                    f"{self.names[p]}: has a sparse gradient, which several processes can't sum;"
                    " make the layer with sparse=False, or train in one process"
                )
            alike.setdefault(p.grad.dtype, []).append(p.grad)
        for dtype, gradients in alike.items():
            if self.dtype in (None, dtype):
                _sum(gradients)
                continue
            copies = [gradient.to(self.dtype) for gradient in gradients]
            _sum(copies)
            torch._foreach_copy_(gradients, copies)

    def _check_alike(self, moved: list[Tensor]) -> None:
        found = self.here.gather([self.names[p] for p in moved])
        for rank, names in enumerate(found):
            if other := set(names).symmetric_difference(found[0]):
                raise Unsupported(
                    f"{min(other)}: has a gradient on rank 0 or on rank {rank}, but not on both;"
                    f" {ALONE}"
                )


def _sum(tensors: list[Tensor]) -> None:
    """Sum each tensor over the ranks. On a GPU the program does not wait."""
    group = dist.group.WORLD
    assert group is not None
    group.allreduce_coalesced(tensors).wait()
