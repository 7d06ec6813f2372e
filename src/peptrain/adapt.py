"""A method on any nn.Module with linear layers, in a training loop of one's own."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from peptrain import schedule
from peptrain.config import settled
from peptrain.dense import densify
from peptrain.errors import ConfigError
from peptrain.methods.base import Method, Metrics, Site
from peptrain.model import find_sites
from peptrain.optim import OptimConfig, clip_gradients, set_lr
from peptrain.rng import Rng
from peptrain.schedule import ScheduleConfig


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
        trained: bool,
    ) -> None:
        given = (method, optim, schedule_config)
        self.method, self.optim, config = settled(*given, steps, _width(model))
        self.model, self.steps, self.done = model, steps, 0
        """`done` counts the completed steps."""
        self._bounds = [b for b in self.method.phases(steps) if b < steps]
        self._phase, self._rng = 0, Rng(seed)
        self.schedule = self.method.schedule(schedule.build(config, steps))
        self.optimizer = self._install(fresh=not trained)

    def step(self) -> Metrics:
        """Move along the gradients that a backward pass has left, and do what is due after it.

        Sets the learning rate, clips, updates, clears the gradients; then merges, resets, or, where
        a warm start ends, rebuilds the layers in place. Returns lr, grad_norm and the method's own
        numbers. Raises ConfigError when all `steps` are done.
        """
        if self.done >= self.steps:
            raise ConfigError(f"steps: all {self.steps} are done; give `adapt` more of them")
        set_lr(self.optimizer, self.schedule(self.done))
        numbers: dict[str, Any] = {"lr": self.optimizer.param_groups[0]["lr"]}
        numbers["grad_norm"] = clip_gradients(self.model, self.optim.clip)
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
        densify(self.model)
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed training needs, but the data's place and dropout's generator."""
        model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        return {"done": self.done, "model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state`, on a model that was adapted just as the one it came from."""
        while self._phase < bisect_right(self._bounds, state["done"]):
            self._next_phase()
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = state["done"]

    def _next_phase(self) -> None:
        """From dense weights to the next phase's layers; moments stay with what stays."""
        moments = self.optimizer.state
        densify(self.model)
        self._phase += 1
        self.optimizer = self._install(fresh=False)
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p in moments:
                    self.optimizer.state[p] = moments[p]
        self.method.enter(self.model, self.optimizer, self._phase)

    def _install(self, fresh: bool) -> Optimizer:
        sites = _sites(self.model, fresh)
        self.method.install(self.model, sites, self._rng, self._phase)
        return self.method.optimizer(self.model, self.optim, self._phase)


def adapt(
    model: nn.Module,
    method: Method,
    *,
    steps: int,
    optim: OptimConfig | None = None,
    schedule: ScheduleConfig | None = None,
    seed: int = 0,
    trained: bool = False,
) -> Adapted:
    """Let `method` replace linear layers of `model`, in place, for a training of `steps` steps.

        training = adapt(model, ReLoRA(rank=8), steps=1000)
        for x, y in batches:
            loss(model(x), y).backward()
            training.step()

    Of a Hugging Face model the layers inside its decoder are eligible, of any other module every
    nn.Linear; the method's `targets`, `include` and `exclude` choose among them. `trained` says
    that the weights are to be kept, and not to be drawn anew. Call it where the model is to stay
    (its device), and before DistributedDataParallel, which does not outlive the end of a warm
    start. Settings left unset are the method's own, as in a run.
    """
    return Adapted(
        model,
        method,
        steps=steps,
        optim=optim or OptimConfig(),
        schedule_config=schedule or ScheduleConfig(),
        seed=seed,
        trained=trained,
    )


def _sites(model: nn.Module, fresh: bool) -> list[Site]:
    if isinstance(model, PreTrainedModel):
        return find_sites(model, fresh)
    width = _width(model)
    # Not its subclasses: nn.MultiheadAttention reads the weight of its own past its forward.
    return [
        Site(name, model.get_submodule(name.rpartition(".")[0]), width, fresh)
        for name, module in model.named_modules()
        if type(module) is nn.Linear
    ]


def _width(model: nn.Module) -> int:
    """The hidden size: what the config says, or the most frequent side of the linear layers."""
    if isinstance(model, PreTrainedModel):
        return int(model.config.get_text_config().hidden_size)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    sides = Counter(side for m in linears for side in (m.in_features, m.out_features))
    return max(sides, key=lambda side: (sides[side], side), default=0)
