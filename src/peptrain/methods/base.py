"""The base class of methods: a frozen dataclass of hyperparameters with seven optional hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import isfunction, signature
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from peptrain.models.sites import ReparamLinear as ReparamLinear
from peptrain.models.sites import Site as Site
from peptrain.models.sites import reparametrized as reparametrized
from peptrain.optim.adamw import Kind, OptimConfig, adamw
from peptrain.optim.muon import muon
from peptrain.optim.schedule import Schedule, ScheduleConfig
from peptrain.rng import Rng

Metrics = Mapping[str, Tensor | float]
"""Values for metrics.jsonl. Tensors are read only when the next row is written, to avoid a
host-device sync. A value whose name ends in `_warning` is also logged if it is not zero, and is the
largest since the row before."""


RENAMED_HOOKS = {"enter": "on_phase_start", "accelerate": "fuse"}


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base class of all methods. Its fields are hyperparameters only, never tensors or counters.

    The default hooks rebuild nothing, replace no layer, use AdamW on all trainable parameters, or
    Muon on the dense matrices among them, keep the moments in the next phase and the configured
    schedule, and do nothing between two steps.
    """

    name: ClassVar[str]
    purpose: ClassVar[str] = ""
    """What to use the method for, in a few words, for `peptrain methods`."""
    equation: ClassVar[str]
    """The weight of an adapted layer in one line, for `peptrain methods`."""
    optim_defaults: ClassVar[OptimConfig] = OptimConfig(
        lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, clip=1.0
    )
    """Defaults of the method, including its learning rate. They replace None in a configuration."""
    optim_kinds: ClassVar[tuple[Kind, ...]] = ("adamw", "muon")
    """The values of `optim.kind` that the method's `optimizer` implements. Others are refused. A
    class with an `optimizer` of its own has adamw only, unless it says otherwise."""
    schedule_defaults: ClassVar[ScheduleConfig] = ScheduleConfig(
        kind="cosine", decay_shape="cosine", floor=0.1, restart_every=0, restart_warmup=50
    )
    has_dense_equivalent: ClassVar[bool] = True
    """Whether every layer is a linear map with an `effective_weight`. If False, the model itself is
    evaluated, only the factorised form can be exported, and no phase may follow one with such
    layers."""
    activation: ClassVar[str | None] = None
    """The f of layers y = B f(A x) + bias without a dense equivalent, by its name in transformers
    (ACT2FN), such as "silu". It says that their only parameters are B [out, r], A [r, in] and maybe
    a bias, so that a run can be exported as two nn.Linear with f between them."""
    keeps_function_with: ClassVar[Mapping[str, Any] | None] = {}
    """Settings with which `install` leaves the model's function unchanged. None if there are none,
    because no dense W remains."""
    from_scratch_only: ClassVar[bool] = False
    """Whether every run must draw its weights, because the layers can neither keep nor approximate
    a given W. Then --init-from, and `adapt` without fresh, are refused."""
    zero_factor: ClassVar[bool] = False
    """Whether one factor of each layer starts at zero, so that the other one has no gradient in the
    first step."""
    merges: ClassVar[bool] = False
    """Whether `after_step` merges the factors and restarts one of them at zero."""
    only_reports: ClassVar[bool] = False
    """Whether `after_step` changes nothing, and returns metrics of the optimizer's step. Then it is
    called after the last step of a phase too."""

    @property
    def export_form(self) -> Literal["dense", "factorised"]:
        """The form of `peptrain export` that runs of the method have: dense, or else factorised."""
        return "dense" if self.has_dense_equivalent else "factorised"

    @property
    def needs_weights(self) -> str:
        """The setting with which a run must start from given weights, such as "method.around:
        frozen", because a random W would stay. Empty if there is none."""
        return ""

    def __init_subclass__(cls, **settings: Any) -> None:
        """Reject hooks with the names of older versions, which would never be called."""
        super().__init_subclass__(**settings)
        for old, new in RENAMED_HOOKS.items():
            if isfunction(vars(cls).get(old)):  # a hyperparameter may have this name
                raise TypeError(f"{cls.__name__}.{old}: this hook is now called {new}; rename it")
        if "optimizer" in vars(cls) and "optim_kinds" not in vars(cls):
            cls.optim_kinds = ("adamw",)  # it need not know the others, and would not refuse them
        if isfunction(hook := vars(cls).get("optimizer")):
            try:
                signature(hook).bind(*range(5))
            except TypeError:
                raise TypeError(
                    f"{cls.__name__}.optimizer: now takes (model, sites, optim, phase); add `sites`"
                ) from None

    def phases(self, steps: int) -> tuple[int, ...]:
        """Return the steps at which the model is rebuilt from its dense weights, ascending.

        Raises ConfigError if a run of `steps` steps cannot have one of them.
        """
        return ()

    def install(self, model: nn.Module, sites: Sequence[Site], rng: Rng, phase: int) -> None:
        """Replace layers of an unmodified model and freeze what this phase does not train.

        `sites` are all layers that may be replaced, with their dense weights. Checkpoints contain
        parameters but no buffers, and a resumed run calls `install` with a different W before it
        loads them. So a buffer must depend only on seed and shape, and whatever is computed from W
        must be a frozen Parameter.
        """

    def optimizer(
        self, model: nn.Module, sites: Sequence[Site], optim: OptimConfig, phase: int
    ) -> Optimizer:
        """Return the optimizer of a phase. The schedule multiplies each group's learning rate.

        `sites` are those passed to `install`: `site.module` is the current layer of a site, and
        `site.linear.weight` the matrix of a site that was not replaced. The learning rate of a
        group with a "name" is logged to metrics.jsonl as lr_NAME. Of the optimizer, a checkpoint
        contains only the tensors and numbers in each parameter's state and the integers in the
        groups (step counters).
        """
        if optim.kind == "muon":
            return muon(model, sites, optim, phase)
        return adamw(model, optim)

    def on_phase_start(self, model: nn.Module, optimizer: Optimizer, phase: int) -> None:
        """Called once at the start of every phase after the first. Parameters with unchanged name
        and shape still have their moments; clear here those that should not be kept."""

    def fuse(self, model: nn.Module) -> None:
        """Switch layers to the fused forms in kernels/, which need a GPU. Parameters keep their
        names, and results agree up to rounding, except that a diagonal entry of exactly 0 gets no
        gradient. Low-rank maps are fused only where no gradient is needed. A model whose MLPs were
        fused with gradients cannot be densified in place. Hooks on modules inside a fused module
        are not called."""

    def schedule(self, base: Schedule) -> Schedule:
        """Return the learning-rate multiplier for the complete run."""
        return base

    def after_step(self, model: nn.Module, optimizer: Optimizer, step: int, rng: Rng) -> Metrics:
        """Called after every step but, unless `only_reports`, the last of a phase; `step` steps
        have been completed."""
        return {}
