"""Apply a method to any nn.Module with linear layers, for use in your own training loop."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from peptrain.config import settled
from peptrain.errors import ConfigError
from peptrain.methods.base import Method, Metrics
from peptrain.models.dense import densify
from peptrain.models.probe import is_linear_map
from peptrain.models.sites import Site, find_sites, reparametrized
from peptrain.optim import schedule
from peptrain.optim.adamw import (
    OptimConfig,
    check_groups,
    clip_gradients,
    learning_rates,
    set_lr,
)
from peptrain.optim.schedule import ScheduleConfig
from peptrain.rng import Rng

log = logging.getLogger("peptrain")


class Adapted:
    """A model whose layers a method has replaced, and its optimizer. Created by `adapt`."""

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        *,
        steps: int,
        optim: OptimConfig,
        schedule_config: ScheduleConfig,
        seed: int,
        fresh: bool,
    ) -> None:
        if layer := next(reparametrized(model), None):
            raise ConfigError(
                f"model: {layer.site} is a {type(layer).__name__} already; adapt a new model, or"
                " the one that `dense()` of the first Adapted returns"
            )
        if fresh and (setting := method.needs_weights):
            raise ConfigError(
                f"{setting} needs the weights of a trained model; adapt one, without fresh=True"
            )
        if method.from_scratch_only and not fresh:
            raise ConfigError(
                f"fresh: must be True for {method.name}, whose layers can't represent the trained"
                " matrices of a model (got False); adapt a new model, or choose another method"
            )
        given = (method, optim, schedule_config)
        self.method, self.optim, config = settled(*given, steps, _width(model))
        self.model, self.steps, self.done = model, steps, 0
        """`done` counts the completed steps."""
        self._bounds = [b for b in self.method.phases(steps) if b < steps]
        self._phase, self._rng = 0, Rng(seed)
        self.schedule = self.method.schedule(schedule.build(config, steps))
        self.optimizer = self._install(fresh)

    def step(self) -> Metrics:
        """Update the model with the current gradients, then run the method's periodic events.

        Sets the learning rate, clips, updates and clears the gradients. Then merges or resets, or,
        at the end of a warm start, rebuilds the layers in place. Returns lr (and lr_NAME of groups
        with a name), grad_norm and the method's metrics. Raises ConfigError when all `steps` are
        done.
        """
        if self.done >= self.steps:
            raise ConfigError(f"steps: all {self.steps} are done; pass a larger `steps` to `adapt`")
        set_lr(self.optimizer, self.schedule(self.done))
        numbers: dict[str, Any] = {**learning_rates(self.optimizer)}
        numbers["grad_norm"] = clip_gradients(self.model, self.optim.clip)
        with _without_autocast(self.model):
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.done += 1
            last = self.done in (*self._bounds, self.steps)
            if not last or self.method.only_reports:
                numbers |= self.method.after_step(self.model, self.optimizer, self.done, self._rng)
            if self.done in self._bounds:
                self._next_phase()
        return numbers

    def dense(self) -> nn.Module:
        """Return the model with equivalent plain nn.Linear layers. This ends the training."""
        with _without_autocast(self.model):
            densify(self.model)
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """Return what a resume needs, except the data position and dropout's generator state."""
        model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        return {"done": self.done, "phase": self._phase, "model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state`. The model must have been adapted like the one that was saved.

        The learning rate and the schedule may differ. Raises ConfigError for a state with another
        warm start.
        """
        phase = bisect_right(self._bounds, state["done"])
        if not self._phase <= phase == state["phase"]:
            raise ConfigError(
                f"state: saved after step {state['done']} in phase {state['phase']}, but here that"
                f" step is in phase {phase} and the model in phase {self._phase}; adapt a new model"
                " with the same warm start"
            )
        while self._phase < phase:
            self._next_phase()
        then = [group.get("name") for group in state["optimizer"]["param_groups"]]
        now = [group.get("name") for group in self.optimizer.param_groups]
        if then != now:
            raise ConfigError(
                f"state: its optimizer has groups named {then}, but this one {now}; set"
                " optim.embedding_lr and optim.head_lr where they were set, and only there"
            )
        peaks = [group.get("initial_lr", group["lr"]) for group in self.optimizer.param_groups]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group, peak in zip(self.optimizer.param_groups, peaks, strict=True):
            group["initial_lr"] = peak
        self.done = state["done"]

    def _next_phase(self) -> None:
        """Rebuild the layers for the next phase. Parameters that stay keep their moments."""
        moments = self.optimizer.state
        densify(self.model)
        self._phase += 1
        self.optimizer = self._install(False)
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p in moments:
                    self.optimizer.state[p] = moments[p]
        self.method.on_phase_start(self.model, self.optimizer, self._phase)

    def _install(self, fresh: bool) -> Optimizer:
        sites = _sites(self.model, fresh)
        with _without_autocast(self.model):
            self.method.install(self.model, sites, self._rng, self._phase)
        optimizer = self.method.optimizer(self.model, sites, self.optim, self._phase)
        check_groups(optimizer, self.model, self.optim, self.method.optim_defaults)
        return optimizer


def adapt(
    model: nn.Module,
    method: Method,
    *,
    steps: int,
    optim: OptimConfig | None = None,
    schedule: ScheduleConfig | None = None,
    seed: int = 0,
    fresh: bool = False,
) -> Adapted:
    """Replace linear layers of `model` by those of `method`, in place, to train for `steps` steps.

        training = adapt(model, ReLoRA(rank=8), steps=1000, fresh=True)
        for x, y in batches:
            loss(model(x), y).backward()
            training.step()

    `fresh` means that the weights have just been initialised, so the method may draw its own, as in
    a run. Otherwise they are kept or, for W = B A, approximated by the truncated SVD.

    In a Hugging Face decoder the linear layers inside its blocks are eligible, in any other module
    every nn.Linear. Layers with shared weights are left out. The method's `targets`, `include` and
    `exclude` choose among the rest.

    Call `adapt` when the model is on its final device and before DistributedDataParallel. At the
    end of a warm start layers are rebuilt and `training.optimizer` is replaced, so wrap the model
    again. Settings that are not given take the method's defaults.
    """
    return Adapted(
        model,
        method,
        steps=steps,
        optim=optim or OptimConfig(),
        schedule_config=schedule or ScheduleConfig(),
        seed=seed,
        fresh=fresh,
    )


def _without_autocast(model: nn.Module) -> AbstractContextManager[object]:
    """Return a context without autocast, which would round products of weights."""
    device = next(model.parameters()).device.type
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()


def _sites(model: nn.Module, fresh: bool) -> list[Site]:
    model = getattr(model, "_orig_mod", model)  # set by torch.compile
    if isinstance(model, PreTrainedModel) and not model.config.is_encoder_decoder:
        sites = find_sites(model, fresh)
    else:
        sites = [Site(name, parent, _width(model), fresh) for name, parent in _linears(model)]
    if own := [site.name for site in sites if not is_linear_map(site.linear)]:
        log.info("not adapted because they are not x Wᵀ + bias: %s", ", ".join(own))
    sites = [site for site in sites if site.name not in own]
    shared = _shared(model)
    if tied := [site.name for site in sites if id(site.linear.weight) in shared]:
        log.info("not adapted because their weights are shared: %s", ", ".join(tied))
    return [site for site in sites if site.name not in tied]


READ_PAST_FORWARD = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""Modules that read `weight` of their layers directly, so a layer's own forward has no effect."""


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the name and parent of every nn.Linear, also of subclasses."""
    if isinstance(model, nn.Linear):
        raise ConfigError("model: a bare nn.Linear can't be replaced; wrap it in nn.Sequential")
    for parent_name, parent in model.named_modules():
        if isinstance(parent, READ_PAST_FORWARD):
            continue
        for name, module in parent.named_children():
            if isinstance(module, nn.Linear):
                yield f"{parent_name}.{name}".removeprefix("."), parent


def _shared(model: nn.Module) -> set[int]:
    """Return the ids of parameters with several names: tied weights, reused layers."""
    seen = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {key for key, times in seen.items() if times > 1}


def _width(model: nn.Module) -> int:
    """Return the hidden size: from the config, or the most frequent size of the linear layers."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PreTrainedModel):
        return int(model.config.get_text_config().hidden_size)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    sides = Counter(side for m in linears for side in (m.in_features, m.out_features))
    return max(sides, key=lambda side: (sides[side], side), default=0)
