"""What a method is: a frozen dataclass of hyperparameters with seven optional hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import isfunction, signature
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from peptrain.models.sites import ReparamLinear as ReparamLinear
from peptrain.models.sites import Site as Site
from peptrain.models.sites import reparametrized as reparametrized
from peptrain.optim.adamw import OptimConfig, adamw
from peptrain.optim.schedule import Schedule, ScheduleConfig
from peptrain.rng import Rng

Metrics = Mapping[str, Tensor | float]
"""Numbers for metrics.jsonl. Tensors are read when the next row is written, so that nothing
waits for the device. A name that ends in `_warning` is also logged when it is not zero."""


RENAMED_HOOKS = {"enter": "on_phase_start", "accelerate": "fuse"}


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of every method: the fields are the hyperparameters, no tensor and no counter.

    A hook left alone means: no rebuilds, no layer replaced, AdamW on all that is trainable, moments
    that go on in the next phase, the schedule as configured, nothing between two steps.
    """

    name: ClassVar[str]
    equation: ClassVar[str]
    """One line for `peptrain methods`."""
    optim_defaults: ClassVar[OptimConfig] = OptimConfig(
        lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, clip=1.0
    )
    """The method's own defaults, the learning rate among them; a None falls back to these."""
    schedule_defaults: ClassVar[ScheduleConfig] = ScheduleConfig(
        kind="cosine", decay_shape="cosine", floor=0.1, restart_every=0, restart_warmup=50
    )
    has_dense_equivalent: ClassVar[bool] = True
    """Whether every layer is a linear map with an `effective_weight`. False: the model itself is
    evaluated, exported only in the factorised form, and no phase follows one with such layers."""
    keeps_function_with: ClassVar[Mapping[str, Any] | None] = {}
    """Settings under which installing leaves the model's function unchanged; None: it never does,
    since no dense W remains."""
    zero_factor: ClassVar[bool] = False
    """Whether one factor of each layer starts at zero, so that the other waits a step for its
    gradient."""
    merges: ClassVar[bool] = False
    """Whether `after_step` merges the factors and restarts one of them at zero."""

    def __init_subclass__(cls, **settings: Any) -> None:
        """Refuse hooks as older versions had them: called by no one, they would be lost."""
        super().__init_subclass__(**settings)
        for old, new in RENAMED_HOOKS.items():
            if isfunction(vars(cls).get(old)):  # a hyperparameter may have that name
                raise TypeError(f"{cls.__name__}.{old}: this hook is now called {new}; rename it")
        if isfunction(hook := vars(cls).get("optimizer")):
            try:
                signature(hook).bind(*range(5))
            except TypeError:
                raise TypeError(
                    f"{cls.__name__}.optimizer: takes (model, sites, optim, phase) now; add `sites`"
                ) from None

    def phases(self, steps: int) -> tuple[int, ...]:
        """The steps at which the model is rebuilt from its dense weights, ascending.

        Raises ConfigError for one that a run of `steps` can't have.
        """
        return ()

    def install(self, model: nn.Module, sites: Sequence[Site], rng: Rng, phase: int) -> None:
        """Replace layers of a model that is still plain, and freeze what the phase doesn't train.

        `sites` are all the layers that may be replaced; the dense weights are in them. A checkpoint
        keeps parameters and no buffers, and a resume installs on another W before it loads them: a
        buffer must follow from seed and shape, and what follows from W must be a frozen Parameter.
        """

    def optimizer(
        self, model: nn.Module, sites: Sequence[Site], optim: OptimConfig, phase: int
    ) -> Optimizer:
        """The phase's optimizer; the schedule multiplies the learning rate each group has here.

        `sites` are those `install` got: `site.module` is the layer that stands there now, and
        `site.linear.weight` a matrix that was left whole. A group with a "name" has its learning
        rate in metrics.jsonl as lr_NAME. A checkpoint keeps the tensors and numbers of the state of
        each parameter, and the integers of the groups (clocks); nothing else of the optimizer.
        """
        return adamw(model, optim)

    def on_phase_start(self, model: nn.Module, optimizer: Optimizer, phase: int) -> None:
        """Called once as a phase after the first begins. Parameters that kept their name and shape
        have brought their moments along; what shall not go on is forgotten here."""

    def fuse(self, model: nn.Module) -> None:
        """Let layers use the fused forms of ops/, which only a GPU can run. Parameters and their
        names stay; results are the same to rounding, except that a diagonal that is exactly 0 gets
        no gradient. Low-rank maps are fused where no gradient is asked for; a model whose MLPs
        were fused with gradients can't be densified in place. Hooks on modules within a fused one
        are not called."""

    def schedule(self, base: Schedule) -> Schedule:
        """The multiplier of the learning rates over the whole run."""
        return base

    def after_step(self, model: nn.Module, optimizer: Optimizer, step: int, rng: Rng) -> Metrics:
        """Called between steps, `step` of them completed; never after the last of a phase."""
        return {}
