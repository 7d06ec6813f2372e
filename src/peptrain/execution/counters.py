"""Count live bytes, FLOPs of products and matrix decompositions, on real or fake tensors."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
MatrixShape = tuple[int, int]


class _Mode(TorchDispatchMode):
    """Observe every operation on tensors, after it ran in the modes below, such as fake tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        self.saw(func, args, out)
        return out

    def saw(self, func: Any, args: Any, out: object) -> None:
        """Called after an operation ran."""
        raise NotImplementedError


class LiveBytes(_Mode):
    """Track the bytes of live tensors: `tensors` and those created under this mode.

    Every storage counts once, from the operation that returns it until it is freed, rounded up to
    a multiple of `grain`, as by an allocator. Workspaces that a kernel allocates and frees while it
    runs are not seen. (torch.distributed's MemTracker gives the same values to the byte, but does
    not support a second micro-batch or layers whose input needs no gradient.)
    """

    def __init__(self, tensors: object = (), grain: int = 1) -> None:
        super().__init__()
        self.grain = grain
        self.now = self.peak = 0
        self._alive: set[int] = set()
        self._watch(tensors)

    def saw(self, func: Any, args: Any, out: object) -> None:
        self._watch(out)

    def _watch(self, tensors: object) -> None:
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = id(storage), -(-storage.nbytes() // self.grain) * self.grain
                if key not in self._alive:
                    self._alive.add(key)
                    weakref.finalize(storage, self._freed, key, size).atexit = False
                    self.now += size
                    self.peak = max(self.peak, self.now)

    def _freed(self, key: int, size: int) -> None:
        self._alive.remove(key)
        self.now -= size


def _attention(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(*_as_many_heads(*(t.shape for t in args[:3]))))


def _attention_backward(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
    dy, *qkv = (t.shape for t in args[:4])
    return int(sdpa_backward_flop_count(dy, *_as_many_heads(*qkv)))


def _as_many_heads(q: torch.Size, k: torch.Size, v: torch.Size) -> tuple[Any, ...]:
    """Expand k and v to q's head count: older FLOP formulas don't support grouped queries."""
    return tuple(q), (*q[:2], *k[2:]), (*q[:2], *v[2:])


ATTENTION: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_cudnn_attention: _attention,
    aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
    aten.bmm: flop_registry[aten.bmm],
    aten.baddbmm: flop_registry[aten.baddbmm],
}
"""All L x L scores of a head are counted, as in PyTorch's counter and the literature, although
causal kernels skip half of them. The backward pass counts the scores again."""
PRODUCTS: dict[Any, Callable[..., int]] = {
    **{op: flop_registry[op] for op in (aten.mm, aten.addmm)},
    aten.addmm_: flop_registry[aten.addmm],
}
DECOMPOSITIONS = {
    "linalg_qr": "qr",
    "_linalg_svd": "svd",
    "_linalg_eigh": "eigh",
    "linalg_cholesky_ex": "cholesky",
    "linalg_solve_triangular": "triangular solve",
    "_linalg_solve_ex": "solve",
    "linalg_inv_ex": "inverse",
}


class Products(_Mode):
    """Count FLOPs of matrix products, two per multiply-add, by kind.

    `flops` contains the products with a side of `tokens`. `fixed` contains products of weights
    alone, such as W + B A, which do not depend on the number of tokens. Products between tokens are
    of kind attention. A product in a module of shape n x m is dense if its sides are tokens, n and
    m, otherwise low_rank. In a module without a shape it is dense, and outside all modules it
    belongs to the head. `decompositions` counts matrices.

    A backward node belongs to the innermost module in whose forward pass it was created. `tokens`
    must differ from every side of every parameter.
    """

    def __init__(
        self, modules: Mapping[nn.Module, MatrixShape | None] | None = None, tokens: int = 0
    ) -> None:
        super().__init__()
        self.modules, self.tokens = modules or {}, tokens
        self.flops: Counter[str] = Counter()
        self.fixed: Counter[str] = Counter()
        self.decompositions: Counter[str] = Counter()
        self._inside: list[nn.Module] = []
        self._made_in: dict[int, nn.Module] = {}

    def total(self) -> int:
        return self.flops.total() + self.fixed.total()

    def saw(self, func: Any, args: Any, out: object) -> None:
        packet, name = func.overloadpacket, func.overloadpacket.__name__
        if packet in ATTENTION:
            self.flops["attention"] += ATTENTION[packet](*args, out_val=out)
        elif packet in PRODUCTS:
            self._product(PRODUCTS[packet](*args, out_val=out), *args[-2:])
        elif name in DECOMPOSITIONS:
            self.decompositions[DECOMPOSITIONS[name]] += args[0].shape[:-2].numel()

    def _product(self, flops: int, left: Tensor, right: Tensor) -> None:
        sides = sorted((*left.shape, right.shape[-1]))
        counts = self.flops if self.tokens in sides else self.fixed
        module = self._module()
        if module is None:
            self.flops["head"] += flops  # its chunks have other numbers of tokens
        elif (shape := self.modules[module]) is None or sides == sorted((self.tokens, *shape)):
            counts["dense"] += flops
        else:
            counts["low_rank"] += flops

    def _module(self) -> nn.Module | None:
        if self._inside:
            return self._inside[-1]
        node = torch._C._current_autograd_node()
        return None if node is None else self._made_in.get(node._sequence_nr())

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count operations in this context, with hooks on the modules that are removed after it."""
        begun: list[int] = []

        def enter(module: nn.Module, *_: object) -> None:
            self._inside.append(module)
            begun.append(_next_node())

        def leave(module: nn.Module, *_: object) -> None:
            self._inside.pop()
            for node in range(begun.pop(), _next_node()):
                self._made_in.setdefault(node, module)

        handles = [module.register_forward_pre_hook(enter) for module in self.modules]
        # A recomputed forward pass ends with an exception once all needed activations are there.
        handles += [m.register_forward_hook(leave, always_call=True) for m in self.modules]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()


def _next_node() -> int:
    """Return the sequence number of the next node of the autograd graph."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number


class Operations(_Mode):
    """Count how often each operation ran, except views and casts."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[object] = Counter()

    def saw(self, func: Any, args: Any, out: object) -> None:
        silent = func.is_view or func.overloadpacket in (aten._to_copy, aten._unsafe_view)
        if func.namespace == "aten" and not silent:
            self.seen[func] += 1


class Assent(_Mode):
    """Return 1 (true) for every value read from a fake tensor.

    LORO's exact step needs this, because it reads whether its fast form succeeded.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func is aten._local_scalar_dense.default:
            return 1
        return func(*args, **(kwargs or {}))


class _Operation(Exception):
    """An operation on tensors was about to run."""


class _Abstinence(_Mode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func.namespace == "aten":
            raise _Operation
        return func(*args, **(kwargs or {}))


def touches_tensors(action: Callable[[], object]) -> bool:
    """Return whether `action` would run an operation on tensors; it stops before the first one."""
    try:
        with _Abstinence():
            action()
    except _Operation:
        return True
    return False
