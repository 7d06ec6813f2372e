"""A phase of a run on fake tensors, which have shapes and no numbers: what its steps take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from peptrain.config import RunConfig
from peptrain.distributed.world import World
from peptrain.errors import Unsupported
from peptrain.execution.attention import WHOLE_WINDOWS
from peptrain.execution.counters import Assent, LiveBytes, MatrixShape, Products, touches_tensors
from peptrain.execution.forward_backward import EagerSteps
from peptrain.execution.padding import pad_mlps
from peptrain.methods.base import Method
from peptrain.models.hf import autocast, count_parameters
from peptrain.models.sites import decoder_layers, find_sites, reparametrized
from peptrain.optim.adamw import clip_gradients
from peptrain.rng import Rng
from peptrain.runs.build import build, plain_model
from peptrain.settings.fields import intervals
from peptrain.training.state import prepare

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GRAIN = 512
"""Bytes: CUDA's allocator rounds every tensor up to a multiple of this."""
KINDS = ("dense", "low_rank", "attention", "head")


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Tensors made here are fake: they have a shape and a dtype, and take no memory.

    Raises Unsupported where something looks at a number, since there are none.
    """
    try:
        with FakeTensorMode():
            yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise Unsupported(
            "estimate: this model or method looks at numbers on its way, so it can't be estimated"
            f" without them ({error})"
        ) from error


@dataclass(frozen=True)
class Event:
    """What a method does now and then: a merge, a reset, an exact step."""

    what: str
    """The counts that it reports, or the setting that it comes with."""
    times: int
    """In the phase."""
    flops: int
    """Of matrix products, each time; of an optimizer's step as a whole."""
    decompositions: dict[str, int]
    """Matrices that are factored or solved with, by kind; not in `flops`."""
    peak_bytes: int
    """The most that is in tensors meanwhile."""

    @property
    def work(self) -> tuple[object, ...]:
        return self.flops, *sorted(self.decompositions.items())


class DenseBaseline:
    """The dense model, as far as the method's is compared with it.

    Raises Unsupported for one with experts, of which a token meets a few that only numbers tell.
    """

    def __init__(self, config: RunConfig[Method]) -> None:
        model = plain_model(config)
        if any(p.ndim > 2 for p in decoder_layers(model)[1].parameters()):
            raise Unsupported(
                f"estimate: {type(model).__name__} has experts or convolutions in its decoder"
                " layers, which are not counted; choose a dense decoder"
            )
        tables: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
        self.parameters = count_parameters(model)
        self.embedding = sum(p.numel() for p in {t.weight for t in tables if t is not None})
        """Parameters of the input embedding and the output head, once when they are tied."""
        self.sites: dict[str, MatrixShape] = {site.name: site.shape for site in find_sites(model)}
        self.sides = _sides(model)


class DryRun:
    """One phase of a run, built and stepped as the trainer does it: uncompiled, on one device.

    Made and used under `fake_tensors`. The tensors are a CPU's for a GPU too, where their
    shapes and dtypes are the same; on a GPU MLPs are padded, and sizes rounded up.
    """

    def __init__(
        self,
        config: RunConfig[Method],
        dense: DenseBaseline,
        phase: int,
        steps: range,
        *,
        rows: int,
        on_gpu: bool,
    ) -> None:
        """steps: of the phase. rows: of a step, on one rank."""
        self.config, self.dense, self.rows, self.on_gpu = config, dense, rows, on_gpu
        self.begin, self.end = steps.start, steps.stop
        self.model = build(config, phase)
        _attend_without_masks(self.model)
        alone = World(0, 1, torch.device("cpu"))
        self.optimizer, self.forward_backward = prepare(self.model, config, alone, phase)
        self._first_step()
        if on_gpu:
            pad_mlps(self.model, tried=False)

    def _first_step(self) -> None:
        """From here on there are moments, and what forward and backward compute is known."""
        t = self.config.train
        sides = self.dense.sides | _sides(self.model)
        rows = next(rows for rows in count(1) if rows * t.seq_len not in sides)
        self.tokens = rows * t.seq_len
        modules: dict[nn.Module, MatrixShape | None] = dict.fromkeys(decoder_layers(self.model)[1])
        modules |= {self.model.get_submodule(name): at for name, at in self.dense.sites.items()}
        self.forward, self.training = (Products(modules, self.tokens) for _ in range(2))
        assert isinstance(self.forward_backward, EagerSteps) and t.precision is not None
        windows = _windows(rows, t.seq_len)
        with torch.no_grad(), autocast(t.precision, torch.device("cpu")), self.forward.counting():
            self.forward_backward.loss(windows)
        with self.training.counting():
            self.forward_backward([windows])
        self._moved = [p for p in self.model.parameters() if p.grad is not None]
        self.gradient_bytes = _bytes(p.grad for p in self._moved)
        groups = self.optimizer.param_groups
        before = [{k: v for k, v in g.items() if type(v) is int} for g in groups]
        self._step()
        self._clocks = [
            (group, key)
            for group, numbers in zip(groups, before, strict=True)
            for key, number in numbers.items()
            if group[key] == number + 1
        ]
        """The whole numbers of the optimizer's groups that a step moves on by one."""

    def flops_per_token(self, of: Products, micro_batch: int) -> dict[str, float]:
        """By kind, with what is computed once for each micro-batch shared among its tokens."""
        fixed = micro_batch * self.config.train.seq_len
        return {k: of.flops[k] / self.tokens + of.fixed[k] / fixed for k in KINDS}

    @property
    def weights(self) -> list[Tensor]:
        """The parameters, and what the method's layers hold beside them."""
        beside = {b for layer in reparametrized(self.model) for b in layer.buffers()}
        return [*self.model.parameters(), *beside]

    @property
    def state(self) -> list[Tensor]:
        """What the optimizer keeps for the parameters, scalars left out."""
        kept = (t for state in self.optimizer.state.values() for t in state.values())
        return [t for t in kept if isinstance(t, Tensor) and t.ndim > 0]

    def weight_bytes(self) -> int:
        return _bytes(self.weights)

    def state_bytes(self) -> int:
        return _bytes(self.state)

    def paper_bytes(self) -> int:
        """Weights and optimizer state as the literature counts them, with no gradients and no
        activations: 2 bytes a number, as in bf16, and 8 a stored index."""
        stored = [*self.weights, *self.state]
        return sum(t.numel() * (2 if t.is_floating_point() else 8) for t in stored)

    def step_peak(self, micro_batch: int) -> int:
        """The most bytes in tensors during a step: forward, backward, clipping, the optimizer.

        Of several micro-batches in the second one: the gradients of the first are there.
        """
        windows = _windows(self.rows, self.config.train.seq_len)
        parts = torch.split(windows, micro_batch)
        if len(parts) > 1:
            self._fill_gradients()
        with self._live(windows) as live:
            self.forward_backward(parts[:2][-1:])
            self._step()
        peak: int = live.peak
        return peak

    def events(self) -> list[Event]:
        """What happens now and then, between two steps or in some of them."""
        return [*self._between_steps(), *self._steps_apart()]

    def _between_steps(self) -> list[Event]:
        """Of the steps after which the method touches tensors, one of each kind is taken: steps
        are alike if they are multiples of the same of its intervals."""
        alike: dict[tuple[str, ...], list[int]] = defaultdict(list)
        every = intervals(self.config.method)
        for step in range(self.begin + 1, self.end):
            if touches_tensors(partial(self._after, step)):
                alike[tuple(name for name in every if step % every[name] == 0)].append(step)
        return [self._event(partial(self._after, s[0]), len(s)) for s in alike.values()]

    def _after(self, step: int) -> str:
        """Do what comes after `step`; the names of what the method says it has done."""
        rng = Rng(self.config.train.seed)
        return ", ".join(self.config.method.after_step(self.model, self.optimizer, step, rng))

    def _steps_apart(self) -> list[Event]:
        """The optimizer's usual step, if it has products, and those that compute something else:
        the first, and where an interval ends by its clocks, which count from 1 or from 0."""
        steps = self.end - self.begin
        self._fill_gradients()

        def stepped(name: str, now: int) -> str:
            for group, key in self._clocks:
                group[key] = now
            self.optimizer.step()
            return name

        def first() -> str:
            kept, self.optimizer.state = self.optimizer.state, defaultdict(dict)
            stepped("first step", 0)
            self.optimizer.state = kept
            return "first step"

        usual = self._event(partial(stepped, "optimizer step", 1), steps)
        apart: dict[tuple[object, ...], Event] = {}
        names: dict[int, str] = {}
        for name, every in intervals(self.config.method).items():
            names.setdefault(every, name)
        for every, name in sorted(names.items()) if self._clocks else ():
            for now, times in ((every - 1, steps // every), (every, (steps - 1) // every)):
                event = self._event(partial(stepped, name, now), times)
                if event.work != usual.work and event.work not in apart and times:
                    apart[event.work] = event
                    break
        begins = self._event(first, 1)
        if begins.work != usual.work:
            like = apart.get(begins.work, replace(begins, times=0))
            apart[begins.work] = replace(like, times=like.times + 1)
        self.optimizer.zero_grad()
        usual = replace(usual, times=steps - sum(event.times for event in apart.values()))
        found = [usual, *apart.values()]
        return [e for e in found if e.times and (e.flops or e.decompositions)]

    def _event(self, action: Callable[[], str], times: int) -> Event:
        products = Products()
        with Assent(), self._live() as live, products:
            what = action()
        flops, decompositions = products.total(), dict(products.decompositions)
        return Event(what, times, flops, decompositions, live.peak)

    def _live(self, windows: Tensor | None = None) -> LiveBytes:
        """With all that is there between two steps, and the gradients if they are."""
        parameters = list(self.model.parameters())
        state = [t for s in self.optimizer.state.values() for t in s.values()]
        there = [*parameters, *self.model.buffers(), *(p.grad for p in parameters), *state, windows]
        return LiveBytes(there, GRAIN if self.on_gpu else 1)

    def _fill_gradients(self) -> None:
        for p in self._moved:
            p.grad = torch.empty_like(p)

    def _step(self) -> None:
        clip_gradients(self.model, self.config.optim.clip)
        with Assent():
            self.optimizer.step()
        self.optimizer.zero_grad()


def _attend_without_masks(model: PreTrainedModel) -> None:
    """As on a GPU, and as Hugging Face's attention does by itself where there are numbers: it
    makes masks for fake tensors, which it takes for those of a compiler."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(WHOLE_WINDOWS, sdpa_attention_forward)
        model.set_attn_implementation(WHOLE_WINDOWS)


def _windows(rows: int, seq_len: int) -> Tensor:
    return torch.zeros(rows, seq_len + 1, dtype=torch.long)


def _sides(model: PreTrainedModel) -> set[int]:
    return {side for p in model.parameters() for side in p.shape}


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
