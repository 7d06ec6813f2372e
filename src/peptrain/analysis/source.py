"""The matrices of a run at one of its checkpoints, or of a Hugging Face directory, in float64."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from peptrain.errors import CheckpointError, Unsupported
from peptrain.models.auto import load_model
from peptrain.models.sites import ReparamLinear, decoder_layers, find_sites
from peptrain.runs.build import Opened, bounds, open_run
from peptrain.runs.checkpoint import available, step_of
from peptrain.runs.directory import RunDir, refuse_known
from peptrain.runs.select import at, checksums, may_vanish
from peptrain.settings.fields import intervals

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("peptrain")
Linear = nn.Linear | ReparamLinear


@dataclass(frozen=True)
class Source:
    """A model whose matrices are measured."""

    name: str
    """The run, with its step, or the Hugging Face directory, for messages."""
    path: Path
    model: PreTrainedModel
    """The model with the method's layers, on the CPU."""
    opened: Opened | None = None
    """The run, without the tensors of its checkpoint; None for a Hugging Face directory."""

    @property
    def step(self) -> int | None:
        return None if self.opened is None else self.opened.saved.step

    @property
    def layers(self) -> dict[str, Linear]:
        """Every matrix inside a decoder layer by its name, adapted or not."""
        return {site.name: site.module for site in find_sites(self.model)}

    def dense(self) -> PreTrainedModel:
        """Return the dense equivalent in fp32."""
        model = self.model if self.opened is None else self.opened.dense_twin()
        model.float()
        return model

    def place(self, name: str) -> tuple[int, str]:
        """Return `place_of` the matrix."""
        return place_of(self.model, name)


def place_of(model: nn.Module, name: str) -> tuple[int, str]:
    """Return a layer's number and the name of a matrix in it: (0, "mlp.down_proj")."""
    stack, _ = decoder_layers(model)
    layer, _, module = name.removeprefix(f"{stack}.").partition(".")
    return int(layer), module


def is_run(path: Path) -> bool:
    """Return whether `path` is a run or RUN@STEP, and not a Hugging Face directory.

    Raises CheckpointError if it is neither.
    """
    directory, step = at(path)
    if RunDir(directory).config_file.is_file():
        return True
    if step is None and (path / "config.json").is_file():
        return False
    refuse_known(path)
    raise CheckpointError(
        f"{path}: neither a run directory (no config.toml) nor a Hugging Face model (no"
        " config.json); give RUN, RUN@STEP or a directory of either kind"
    )


def open_source(path: Path) -> Source:
    """Open a run at its latest checkpoint, RUN@STEP, or a Hugging Face directory.

    Raises CheckpointError if it can't be read, and Unsupported for a run whose method has no dense
    equivalent.
    """
    if not is_run(path):
        return Source(str(path), path, pretrained(path, torch.float32))
    opened = open_run(path)
    method = opened.config.method
    if not method.has_dense_equivalent:
        raise Unsupported(
            f"{path}: {method.name} has no dense equivalent, so its layers have no matrices to"
            " analyze; give a run of another method"
        )
    saved = replace(opened.saved, model={}, optimizer={})  # of several checkpoints at a time
    opened = replace(opened, saved=saved)
    return Source(f"{opened.run.path}@{saved.step}", opened.run.path, opened.model, opened)


def pretrained(path: Path, dtype: torch.dtype | Literal["auto"]) -> PreTrainedModel:
    """Load the model of a Hugging Face directory.

    Raises CheckpointError if it can't be read or lacks weights.
    """
    try:
        model, report = load_model(path, dtype)
    except (OSError, ValueError, RuntimeError, SafetensorError, Unsupported) as error:
        raise CheckpointError(f"{path}: can't be read: {error}") from error
    if lacking := sorted(
        [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    ):
        raise CheckpointError(
            f"{path}: {lacking[0]} and {len(lacking) - 1} more weights are missing or have another"
            " shape than config.json implies; give a complete model"
        )
    model.eval()
    return model


def kept_steps(run: RunDir) -> list[int]:
    """Return the steps of the checkpoints that the run keeps, ascending."""
    return [step_of(path) for path in available(run.checkpoints)]


def digest(source: Source) -> str:
    """Return checksums that change with the weights of `source`."""
    if source.opened is None:
        files = sorted(source.path.glob("*.safetensors"))
        return " ".join(f"{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files)
    return checksums(source.opened.run, source.opened.saved.step)


def weight_of(layer: Linear, device: torch.device | str = "cpu") -> Tensor:
    """Return the dense weight of a layer, [n, m], computed in float64 on `device`."""
    with torch.no_grad():
        if not isinstance(layer, ReparamLinear):
            return layer.weight.detach().to(device, torch.float64)
        wide = copy.deepcopy(layer).to(device, torch.float64)
        return wide.effective_weight().detach().double()


def factors_of(layer: Linear, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Return the two-dimensional parameters of a replaced layer but its base, in float64."""
    if not isinstance(layer, ReparamLinear):
        return {}
    named = layer.named_parameters()
    return {
        name: p.detach().to(device, torch.float64)
        for name, p in named
        if p.ndim == 2 and name != "weight"
    }


@dataclass(frozen=True)
class Ranks:
    """The largest ranks that the matrices of a layer can have by its structure."""

    full: int
    """min(n, m)."""
    weight: int
    update: int
    """Of the change between two steps."""
    factors: int = 0
    """r, 0 for a layer without two factors."""
    additive: bool = False
    """Whether W changes only by s B A, so by at most r in a cycle that begins with B A = 0."""

    fresh: bool = False
    """Whether B A is 0, as just after a merge."""

    def change(self, merges: int) -> int:
        """Return the rank of the change since a step at which B A was 0, after `merges` merges."""
        cycles = max(1, merges if self.fresh else merges + 1)
        return min(self.full, cycles * self.factors) if self.additive else self.update


def ranks_of(layer: Linear) -> Ranks:
    """Return the ranks that the parameters of a layer allow.

    W = B A has rank r and changes by at most 2r. W + s B A has full rank and changes by 2r between
    two steps. A layer with diagonals, magnitudes or sparse values has full rank in both, like a
    dense one.
    """
    full = min(layer.out_features, layer.in_features)
    factors = factors_of(layer)
    if len(factors) != 2:
        return Ranks(full, full, full)
    inner = min(full, *(min(p.shape) for p in factors.values()))
    names = {name: p for name, p in layer.named_parameters() if name != "bias"}
    if any(p.ndim == 1 and p.numel() > 1 for p in names.values()):
        return Ranks(full, full, full, inner)
    additive = "weight" in names
    fresh = not all(p.any() for p in factors.values())
    return Ranks(full, full if additive else inner, min(full, 2 * inner), inner, additive, fresh)


@dataclass(frozen=True)
class References:
    """What a checkpoint is compared with: other checkpoints of its run, where they are kept."""

    start: Source | None = None
    """Step 0."""
    warm: Source | None = None
    """The end of the full-rank warm start."""
    before: Source | None = None
    """The step before."""
    cycles: tuple[Source, ...] = ()
    """The last two merges before this one, or the start of the phase; empty unless this step is a
    merge and both are kept."""
    missing: Mapping[str, str] | None = None
    """Why a comparison can't be made, by what it would have measured."""


def references(source: Source) -> References:
    """Open the checkpoints that `source` is compared with. Raises CheckpointError if shapes differ.

    A comparison is left out where its checkpoint is not kept (`train.keep_at`), or is damaged.
    """
    if source.opened is None:
        why = "a Hugging Face directory has no other steps"
        return References(missing=dict.fromkeys(("from_start", "from_warm", "update"), why))
    step, run = source.opened.saved.step, source.opened.run
    kept, missing = set(kept_steps(run)), dict[str, str]()

    def opened(what: str, wanted: int) -> Source | None:
        if wanted >= step:
            missing[what] = f"step {step} is not after step {wanted}"
        elif wanted not in kept:
            missing[what] = f"the checkpoint of step {wanted} is not kept (train.keep_at)"
        else:
            damaged: list[str] = []
            with may_vanish(other := Path(f"{run.path}@{wanted}"), damaged=damaged):
                return _alike(open_source(other), source)
            became = "is damaged" if damaged else "was deleted meanwhile"
            missing[what] = f"the checkpoint of step {wanted} {became}"
        return None

    ends = bounds(source.opened.config)
    start = opened("from_start", 0)
    warm = opened("from_warm", ends[1]) if len(ends) > 2 else None
    if len(ends) == 2:
        missing["from_warm"] = "the run has no warm start"
    before = start if step == 1 else opened("update", max(step - 1, 0))
    boundaries = _merges(source.opened)[-3:]
    whole = len(boundaries) == 3 and boundaries[-1] == step and set(boundaries) <= kept
    earlier: list[Source] = []
    for other in (Path(f"{run.path}@{s}") for s in boundaries[:2] if whole):
        with may_vanish(other, damaged=[]):
            earlier.append(open_source(other))
    return References(start, warm, before, tuple(earlier) if earlier[1:] else (), missing)


def _merges(opened: Opened) -> list[int]:
    """Return the step at which the phase began and those of its merges, up to the checkpoint."""
    step, ends = opened.saved.step, bounds(opened.config)
    begin = ends[opened.saved.phase]
    every = intervals(opened.config.method).get("merge_every", 0)
    if not opened.config.method.merges or not every:
        return [begin]
    last = opened.config.train.steps
    return [begin, *(s for s in range(every, step + 1, every) if begin < s < last)]


def merges_in_phase(source: Source) -> tuple[int, int]:
    """Return (the step at which the phase of `source` began, the merges since)."""
    assert source.opened is not None
    begin, *merged = _merges(source.opened)
    return begin, len(merged)


def _alike(one: Source, other: Source) -> Source:
    """Return `one`. Raise CheckpointError, naming a matrix, unless both have the same matrices."""
    theirs, ours = ({name: [m.out_features, m.in_features] for name, m in s.layers.items()}
                    for s in (one, other))  # fmt: skip
    for name in sorted(theirs.keys() | ours.keys()):
        has, had = ours.get(name, "nothing"), theirs.get(name, "nothing")
        if has != had:
            raise CheckpointError(
                f"{other.name}: has {has} for {name}, but {one.name} has {had}; compare models of"
                " one shape"
            )
    return one


def check_alike(one: Source, other: Source) -> None:
    """Raise CheckpointError, naming a matrix, unless both have the same matrices."""
    _alike(one, other)
