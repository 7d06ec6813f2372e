"""Dry run of one phase on fake tensors, which have shapes but no data: memory and FLOPs."""

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
from peptrain.execution.prepare import prepare
from peptrain.methods.base import Method
from peptrain.models.hf import autocast, count_parameters
from peptrain.models.sites import decoder_layers, find_sites, reparametrized
from peptrain.optim.adamw import clip_gradients
from peptrain.rng import Rng
from peptrain.runs.build import build, plain_model
from peptrain.settings.fields import intervals

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GRAIN = 512
"""CUDA's allocator rounds the size of every tensor up to a multiple of this many bytes."""
KINDS = ("dense", "low_rank", "attention", "head")


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Make every tensor created in this context fake: a shape and a dtype without memory.

    Raises Unsupported when the value of a tensor is read, since fake tensors have none.
    """
    try:
        with FakeTensorMode():
            yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise Unsupported(
            "estimate: this model or method reads tensor values, so it can't be estimated on fake"
            f" tensors ({error})"
        ) from error


@dataclass(frozen=True)
class Event:
    """A periodic or one-time operation of a method: a merge, a reset, an exact step."""

    what: str
    """The counts that the method reports, the name of its interval, "optimizer step" or "first
    step"."""
    times: int
    """Number of occurrences in the phase."""
    flops: int
    """FLOPs of the matrix products of one occurrence; for an optimizer step, of the full step."""
    decompositions: dict[str, int]
    """Number of matrices factored or solved with, by kind. They are not counted in `flops`."""
    peak_bytes: int
    """Peak bytes in tensors during the event."""

    @property
    def work(self) -> tuple[object, ...]:
        return self.flops, *sorted(self.decompositions.items())


class DenseBaseline:
    """Sizes of the dense model that the method's model is compared with.

    Raises Unsupported for experts and convolutions in the decoder layers. Which experts a token is
    routed to depends on tensor values.
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
        """Parameters of the input embedding and the output head, counted once if they are tied."""
        self.sites: dict[str, MatrixShape] = {site.name: site.shape for site in find_sites(model)}
        self.sides = _sides(model)


class DryRun:
    """One phase of a run, built and stepped as in the trainer, uncompiled and on one device.

    Create and use it under `fake_tensors`. The tensors are CPU tensors even for a run on a GPU,
    where shapes and dtypes are the same. For a GPU, MLPs are padded and sizes are rounded up.
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
        """steps: range of the phase. rows: sequences per step on one rank."""
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
        """Take one step, which creates the moments, and count the products of both passes."""
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
        self.moved = [p for p in self.model.parameters() if p.grad is not None]
        """Parameters with a gradient."""
        self.gradient_bytes = _bytes(p.grad for p in self.moved)
        groups = self.optimizer.param_groups
        before = [{k: v for k, v in g.items() if type(v) is int} for g in groups]
        self._step()
        self._clocks = [
            (group, key)
            for group, numbers in zip(groups, before, strict=True)
            for key, number in numbers.items()
            if group[key] == number + 1
        ]
        """Integers in the optimizer's groups that a step increments by one."""

    def flops_per_token(self, of: Products, micro_batch: int) -> dict[str, float]:
        """FLOPs per token by kind.

        What is computed once per micro-batch is divided by the micro-batch's tokens.
        """
        fixed = micro_batch * self.config.train.seq_len
        return {k: of.flops[k] / self.tokens + of.fixed[k] / fixed for k in KINDS}

    @property
    def weights(self) -> list[Tensor]:
        """The parameters of the model and the buffers of the method's layers."""
        buffers = {b for layer in reparametrized(self.model) for b in layer.buffers()}
        return [*self.model.parameters(), *buffers]

    @property
    def state(self) -> list[Tensor]:
        """The optimizer's state tensors, without scalars."""
        kept = (t for state in self.optimizer.state.values() for t in state.values())
        return [t for t in kept if isinstance(t, Tensor) and t.ndim > 0]

    def weight_bytes(self) -> int:
        return _bytes(self.weights)

    def state_bytes(self) -> int:
        return _bytes(self.state)

    def paper_bytes(self) -> int:
        """Weights and optimizer state as the literature counts them: 2 bytes per value, as in
        bf16, and 8 per stored index, without gradients and activations."""
        stored = [*self.weights, *self.state]
        return sum(t.numel() * (2 if t.is_floating_point() else 8) for t in stored)

    def step_peak(self, micro_batch: int) -> int:
        """Peak bytes in tensors during a step: forward, backward, clipping, optimizer.

        With several micro-batches the second one is measured, since the gradients of the first
        are in memory then.
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
        """Periodic and one-time events, between two steps or within a step."""
        return [*self._between_steps(), *self._steps_apart()]

    def _between_steps(self) -> list[Event]:
        """Run `after_step` for one step of each kind, among steps where it touches tensors.

        Two steps are of the same kind if they are multiples of the same intervals of the method.
        """
        alike: dict[tuple[str, ...], list[int]] = defaultdict(list)
        every = intervals(self.config.method)
        for step in range(self.begin + 1, self.end):
            if touches_tensors(partial(self._after, step)):
                alike[tuple(name for name in every if step % every[name] == 0)].append(step)
        return [self._event(partial(self._after, s[0]), len(s)) for s in alike.values()]

    def _after(self, step: int) -> str:
        """Run the method's `after_step` and return the names of the counts it reports."""
        rng = Rng(self.config.train.seed)
        return ", ".join(self.config.method.after_step(self.model, self.optimizer, step, rng))

    def _steps_apart(self) -> list[Event]:
        """The optimizer's usual step, if it has matrix products or decompositions, and the steps
        whose work differs: the first one, and those where an interval ends according to the
        optimizer's counters, which count from 1 or from 0."""
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
        """Count what is in memory between two steps, with the gradients if there are any."""
        parameters = list(self.model.parameters())
        state = [t for s in self.optimizer.state.values() for t in s.values()]
        there = [*parameters, *self.model.buffers(), *(p.grad for p in parameters), *state, windows]
        return LiveBytes(there, GRAIN if self.on_gpu else 1)

    def _fill_gradients(self) -> None:
        for p in self.moved:
            p.grad = torch.empty_like(p)

    def _step(self) -> None:
        clip_gradients(self.model, self.config.optim.clip)
        with Assent():
            self.optimizer.step()
        self.optimizer.zero_grad()


def _attend_without_masks(model: PreTrainedModel) -> None:
    """Use attention without masks, as on a GPU.

    On real tensors Hugging Face's attention skips the masks by itself. It takes fake tensors for
    those of a compiler and would create masks.
    """
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
