"""A method on any nn.Module with linear layers, in a training loop of one's own."""

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
from peptrain.models.sites import Site, find_sites
from peptrain.optim import schedule
from peptrain.optim.adamw import OptimConfig, clip_gradients, learning_rates, set_lr
from peptrain.optim.schedule import ScheduleConfig
from peptrain.rng import Rng

log = logging.getLogger("peptrain")


class Adapted:
    """A model whose layers a method has replaced, and what moves it. Made by `adapt`."""

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
        given = (method, optim, schedule_config)
        self.method, self.optim, config = settled(*given, steps, _width(model))
        self.model, self.steps, self.done = model, steps, 0
        """`done` counts the completed steps."""
        self._bounds = [b for b in self.method.phases(steps) if b < steps]
        self._phase, self._rng = 0, Rng(seed)
        self.schedule = self.method.schedule(schedule.build(config, steps))
        self.optimizer = self._install(fresh)

    def step(self) -> Metrics:
        """Move along the gradients that a backward pass has left, and do what is due after it.

        Sets the learning rate, clips, updates, clears the gradients; then merges, resets, or, where
        a warm start ends, rebuilds the layers in place. Returns lr (and lr_NAME of groups with a
        name), grad_norm and the method's own numbers. Raises ConfigError when all `steps` are done.
        """
        if self.done >= self.steps:
            raise ConfigError(f"steps: all {self.steps} are done; give `adapt` more of them")
        set_lr(self.optimizer, self.schedule(self.done))
        numbers: dict[str, Any] = {**learning_rates(self.optimizer)}
        numbers["grad_norm"] = clip_gradients(self.model, self.optim.clip)
        with _without_autocast(self.model):
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.done += 1
            if self.done in self._bounds:
                self._next_phase()
            elif self.done < self.steps:
                numbers |= self.method.after_step(self.model, self.optimizer, self.done, self._rng)
        return numbers

    def dense(self) -> nn.Module:
        """The model with plain nn.Linear layers again, the same function. Ends the training."""
        with _without_autocast(self.model):
            densify(self.model)
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs, but the data's place and dropout's generator."""
        model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        return {"done": self.done, "phase": self._phase, "model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, on a model that was adapted as the one it came from; the learning
        rate and the schedule may be others.

        Raises ConfigError for the state of another warm start.
        """
        phase = bisect_right(self._bounds, state["done"])
        if not self._phase <= phase == state["phase"]:
            raise ConfigError(
                f"state: {state['done']} steps are done, in phase {state['phase']}; here that is"
                f" phase {phase}, after {self._phase}; adapt a new model, with the same warm start"
            )
        while self._phase < phase:
            self._next_phase()
        peaks = [group.get("initial_lr", group["lr"]) for group in self.optimizer.param_groups]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for group, peak in zip(self.optimizer.param_groups, peaks, strict=True):
            group["initial_lr"] = peak
        self.done = state["done"]

    def _next_phase(self) -> None:
        """From dense weights to the next phase's layers; moments stay with what stays."""
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
        return self.method.optimizer(self.model, sites, self.optim, self._phase)


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
    """Let `method` replace linear layers of `model`, in place, for a training of `steps` steps.

        training = adapt(model, ReLoRA(rank=8), steps=1000, fresh=True)
        for x, y in batches:
            loss(model(x), y).backward()
            training.step()

    `fresh` says that the weights are only just initialised, so that a method may draw its own, as
    in a run; else they are kept, or for W = B A approximated by the truncated SVD.

    Of a Hugging Face decoder the layers inside its blocks are eligible, of any other module every
    nn.Linear whose weight is not shared; the method's `targets`, `include` and `exclude` choose
    among them. Call it where the model is to stay (its device), and before
    DistributedDataParallel, which does not outlive the end of a warm start; with a warm start
    `training.optimizer` is another one after it. Settings left unset are the method's own.
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
    """A context for products of weights, which a loop that is all within autocast would round."""
    device = next(model.parameters()).device.type
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()


def _sites(model: nn.Module, fresh: bool) -> list[Site]:
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if isinstance(model, PreTrainedModel) and not model.config.is_encoder_decoder:
        sites = find_sites(model, fresh)
    else:
        sites = [Site(name, parent, _width(model), fresh) for name, parent in _linears(model)]
    shared = _shared(model)
    if tied := [site.name for site in sites if id(site.linear.weight) in shared]:
        log.info("left as they are, their weights are shared: %s", ", ".join(tied))
    return [site for site in sites if site.name not in tied]


READ_PAST_FORWARD = (nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""Modules that read their layers' `weight` themselves, where a factor beside it does nothing."""


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every nn.Linear, and no subclass of it, by its name with its parent."""
    if isinstance(model, nn.Linear):
        raise ConfigError("model: a bare nn.Linear can't be replaced; wrap it in nn.Sequential")
    for parent_name, parent in model.named_modules():
        if isinstance(parent, READ_PAST_FORWARD):
            continue
        for name, module in parent.named_children():
            if type(module) is nn.Linear:
                yield f"{parent_name}.{name}".removeprefix("."), parent


def _shared(model: nn.Module) -> set[int]:
    """The ids of parameters that more than one name stands for: tied weights, reused layers."""
    seen = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return {key for key, times in seen.items() if times > 1}


def _width(model: nn.Module) -> int:
    """The hidden size: what the config says, or the most frequent side of the linear layers."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, PreTrainedModel):
        return int(model.config.get_text_config().hidden_size)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    sides = Counter(side for m in linears for side in (m.in_features, m.out_features))
    return max(sides, key=lambda side: (sides[side], side), default=0)
