"""What is seen of a computation, on real or fake tensors: bytes alive, products, decompositions."""

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
    """Sees every operation on the tensors of its context, after what is below it: fake tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        self.saw(func, args, out)
        return out

    def saw(self, func: Any, args: Any, out: object) -> None:
        """An operation has run."""
        raise NotImplementedError


class LiveBytes(_Mode):
    """Bytes of the tensors that exist at once: `tensors`, and what is made under this mode.

    Every storage counts once, from the operation that returns it until it is freed, rounded up to
    a multiple of `grain`, as an allocator would. What a kernel takes and gives back while it runs
    is not seen. (torch.distributed's MemTracker gives the same numbers to the byte, but refuses a
    second micro-batch and layers whose input needs no gradient.)
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
    """Keys and values serve several query heads each; older formulas want as many of them."""
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
"""All L x L scores of a head count, as PyTorch's counter and the literature have it, though causal
kernels skip half of them; the backward pass counts the scores again."""
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
    """Floating-point operations of matrix products, two for a multiply-add, by what they are for.

    `flops` has those that involve `tokens` rows, `fixed` those of weights alone, such as W + B A,
    which are the same for any number of tokens. Kinds: attention is between tokens; a product in a
    module of shape n x m is dense if its sides are tokens, n and m, else low_rank; in one without a
    shape it is dense; outside of all it is the head's. `decompositions` counts matrices.

    A backward node is of the innermost module in whose forward pass it was made. `tokens` must be
    no side of any parameter.
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
            self.flops["head"] += flops  # in chunks of other numbers of tokens
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
        """Count what happens in this context; modules are known by hooks that go with it."""
        begun: list[int] = []

        def enter(module: nn.Module, *_: object) -> None:
            self._inside.append(module)
            begun.append(_next_node())

        def leave(module: nn.Module, *_: object) -> None:
            self._inside.pop()
            for node in range(begun.pop(), _next_node()):
                self._made_in.setdefault(node, module)

        handles = [module.register_forward_pre_hook(enter) for module in self.modules]
        # A recomputed forward pass ends by an exception once all that was wanted is there.
        handles += [m.register_forward_hook(leave, always_call=True) for m in self.modules]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()


def _next_node() -> int:
    """The number that the next node of the autograd graph gets."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number


class Operations(_Mode):
    """How often each operation ran, but for views and casts."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[object] = Counter()

    def saw(self, func: Any, args: Any, out: object) -> None:
        silent = func.is_view or func.overloadpacket in (aten._to_copy, aten._unsafe_view)
        if func.namespace == "aten" and not silent:
            self.seen[func] += 1


class Assent(_Mode):
    """Every number that is read of a fake tensor is 1, every truth true.

    For LORO's exact step, which reads whether its fast form was sound.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func is aten._local_scalar_dense.default:
            return 1
        return func(*args, **(kwargs or {}))


class _Operation(Exception):
    """A tensor was about to be touched."""


class _Abstinence(_Mode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func.namespace == "aten":
            raise _Operation
        return func(*args, **(kwargs or {}))


def touches_tensors(action: Callable[[], object]) -> bool:
    """Whether `action` would run an operation on tensors; it is stopped at the first."""
    try:
        with _Abstinence():
            action()
    except _Operation:
        return True
    return False
