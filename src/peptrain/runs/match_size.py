"""Find a dense model with as many parameters as another run trains: Control of ReLoRA, Table 2."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from peptrain.config import RunConfig
from peptrain.errors import ConfigError
from peptrain.methods.base import Method
from peptrain.methods.full import Full
from peptrain.models.hf import ModelConfig, build_model, count_parameters, hf_config
from peptrain.models.sites import decoder_layers, find_sites
from peptrain.rng import Rng
from peptrain.runs.build import checked_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("peptrain")
STEP = 8
"""f is a multiple of this: 16 bytes of bf16, for fast matrix products on a GPU."""


@dataclass(frozen=True)
class SmallerDecoder:
    """A smaller decoder: hidden size d, MLP width f, L layers, its heads and parameter count."""

    d: int
    f: int
    L: int
    heads: int
    kv: int
    parameters: int


def matched(config: RunConfig[Any]) -> RunConfig[Any]:
    """Return `config` with its model shrunk to the number of parameters that another run trains.

    The full-size model is that of `config`, or that of the run if `config` sets no model. Heads
    keep their size, and f is the multiple of 8 for which the total agrees. Among all widths and
    depths, the one with f / d and d / L nearest to those of the full-size model is chosen.

    Raises ConfigError for another method than full, together with init_from, and when no smaller
    model has that number of parameters; CheckpointError if the other run's config.toml was edited.
    """
    path = config.match_trainable
    assert path is not None
    if not isinstance(config.method, Full):
        raise ConfigError(
            f"match_trainable: {path}: requires method full (got {config.method.name})"
        )
    if config.init_from is not None:
        raise ConfigError(
            f"match_trainable: {path}: shrinks the model, so it cannot be combined with init_from"
            f" {config.init_from}; leave out one of the two"
        )
    _, other, _ = checked_config(path)
    whole = other.model if config.model == ModelConfig() else config.model
    wanted = trained_by(other)
    best = _nearest(whole, config.train.seq_len, wanted, path)
    log.info("match_trainable: d %d, f %d, %d layers, %d heads: %.3fM parameters, to match the"
             " %.3fM that %s trains", best.d, best.f, best.L, best.heads, best.parameters / 1e6,
             wanted / 1e6, path)  # fmt: skip
    model = replace(
        whole,
        hidden_size=best.d,
        intermediate_size=best.f,
        layers=best.L,
        heads=best.heads,
        kv_heads=best.kv,
    )
    return replace(config, model=model, match_trainable=None)


def trained_by(config: RunConfig[Method]) -> int:
    """Count the parameters that a resolved `config` trains in its last phase, on device "meta"."""
    last = len(config.method.phases(config.train.steps))
    with torch.device("meta"):
        model = build_model(config.model, seq_len=config.train.seq_len, seed=0)
        config.method.install(model, find_sites(model), Rng(0), last)
    return count_parameters(model, trainable=True)


def _nearest(whole: ModelConfig, seq_len: int, wanted: int, path: Path) -> SmallerDecoder:
    hf = hf_config(whole, seq_len)
    d, f, L = hf.hidden_size, hf.intermediate_size, hf.num_hidden_layers

    def distortion(shape: SmallerDecoder) -> float:
        gated, deep = shape.f / shape.d / (f / d), shape.d / shape.L / (d / L)
        return abs(math.log(gated)) + abs(math.log(deep))

    shapes = [s for s in _shapes(whole, seq_len, wanted) if s.d < d or s.f < f or s.L < L]
    if not shapes:
        raise ConfigError(
            f"match_trainable: {path}: trains {wanted:,} parameters, but no smaller model of this"
            " architecture has that number; give a run that trains fewer parameters than the full"
            " model and more than its embeddings"
        )
    return min(shapes, key=distortion)


def _shapes(whole: ModelConfig, seq_len: int, wanted: int) -> Iterator[SmallerDecoder]:
    """Yield, for every width and depth, the f that brings the total nearest to `wanted`."""
    hf = hf_config(whole, seq_len)
    heads, kv = hf.num_attention_heads, hf.num_key_value_heads
    for n in range(1, heads + 1):
        if n * kv % heads:
            continue
        d = hf.hidden_size // heads * n
        narrow = replace(whole, hidden_size=d, heads=n, kv_heads=n * kv // heads, layers=1)
        rest, empty, slope = _parts(narrow, seq_len)
        for L in range(1, hf.num_hidden_layers + 1):
            f = round(((wanted - rest) / L - empty) / slope / STEP) * STEP
            if 0 < f <= hf.intermediate_size:
                total = rest + L * (empty + slope * f)
                yield SmallerDecoder(d, f, L, n, n * kv // heads, total)


def _parts(model: ModelConfig, seq_len: int) -> tuple[int, int, int]:
    """Return parameter counts: outside the layers, of a layer without its MLP, per unit of f."""

    def counted(f: int) -> tuple[int, int]:
        made = _on_meta(replace(model, intermediate_size=f), seq_len)
        layer = count_parameters(decoder_layers(made)[1])
        return count_parameters(made) - layer, layer

    (rest, one), (_, two) = counted(STEP), counted(2 * STEP)
    slope = (two - one) // STEP
    return rest, one - slope * STEP, slope


def _on_meta(model: ModelConfig, seq_len: int) -> PreTrainedModel:
    with torch.device("meta"):
        return build_model(model, seq_len=seq_len, seed=0)
