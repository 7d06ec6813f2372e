"""Rows of measures: one for each matrix and each thing that is measured of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from peptrain.analysis.source import (
    Linear,
    References,
    Source,
    factors_of,
    merges_in_phase,
    ranks_of,
    weight_of,
)
from peptrain.ops.singular import (
    condition,
    count_above,
    effective_rank,
    numerical_rank,
    ov_singular_values,
    ov_sum_factors,
    per,
    product_singular_values,
    singular_values,
    stable_rank,
    subspace_overlap,
)

TOLERANCES = (1e-2, 1e-3, 1e-6)
"""Of the numerical ranks, relative to sigma_1."""
THRESHOLD = 0.1
"""Of `above`, absolute: that of ReLoRA's Figure 4."""


@dataclass(frozen=True)
class Row:
    """What was measured of one matrix."""

    layer: int
    module: str
    """The name of the matrix in its layer, or "ov" for W_O W_V."""
    what: str
    """weight, from_start, from_warm, update, gradient, cycle, or factor.NAME."""
    shape: tuple[int, int]
    rank: int
    """The structural rank."""
    sigma: Tensor
    """Singular values, descending, on the CPU."""
    head: str = ""
    """Of an OV circuit: the number of the query head, or "sum"."""
    extra: Mapping[str, float] = field(default_factory=dict)
    """Measures that only this kind of row has."""

    def values(self) -> dict[str, object]:
        """Return the columns of the table, but run and step."""
        sigma, (n, m) = self.sigma, self.shape
        rank = min(self.rank, sigma.shape[-1])
        ranks = {f"rank_{t:.0e}".replace("e-0", "e-"): numerical_rank(sigma, t) for t in TOLERANCES}
        measured = {
            "effective_rank": effective_rank(sigma),
            "per": per(sigma, self.shape),
            "per_inter": per(sigma, self.shape, "inter"),
            "per_rank": per(sigma, self.shape, "rank", rank),
            "stable_rank": stable_rank(sigma),
            **ranks,
            f"above_{THRESHOLD}": count_above(sigma, THRESHOLD),
            "condition": condition(sigma, rank, max(n, m)),
            "frobenius": sigma.square().sum().sqrt(),
            "sigma_max": sigma[0],
            "sigma_min": sigma[rank - 1],
        }
        about = {"layer": self.layer, "module": self.module, "what": self.what, "head": self.head,
                 "rows": n, "columns": m, "structural_rank": rank}  # fmt: skip
        return {**about, **{k: v.item() for k, v in measured.items()}, **self.extra}


EXTRA = ("overlap", "error_factors", "error_factors_scaled", "error_loro", "error_tangent")
"""Columns that are empty in most rows."""


def rows_of_layer(
    source: Source, name: str, against: References, device: torch.device
) -> Iterator[Row]:
    """Yield the rows of one matrix but those of its gradient."""
    layer = source.layers[name]
    place, shape = source.place(name), (layer.out_features, layer.in_features)
    ranks, W = ranks_of(layer), weight_of(layer, device)
    begin, merges = merges_in_phase(source) if source.opened else (0, 0)

    def row(what: str, M: Tensor, rank: int, **extra: float) -> Row:
        n, m = M.shape
        return Row(*place, what, (n, m), rank, singular_values(M).cpu(), extra=extra)

    if ranks.weight < ranks.full:
        B, A = in_order(layer, device)
        yield Row(*place, "weight", shape, ranks.weight, product_singular_values(B, A).cpu())
    else:
        yield row("weight", W, ranks.weight)
    changes: list[Row] = []
    for what, other in (("from_start", against.start), ("from_warm", against.warm)):
        if other is not None:
            rank = ranks.change(merges) if other.step == begin else ranks.full
            changes.append(row(what, W - weight_of(other.layers[name], device), rank))
    if against.before is not None:
        before = against.before.layers[name]
        rank = ranks.update if type(before) is type(layer) else ranks.full
        known = [c for c in changes if against.before is against.start and c.what == "from_start"]
        changed = [replace(c, what="update") for c in known]
        changes += changed or [row("update", W - weight_of(before, device), rank)]
    yield from changes
    for factor, p in factors_of(layer, device).items():
        yield row(f"factor.{factor}", p, min(p.shape))
    if against.cycles and ranks.factors:
        bases = [_base(s.layers[name], device) for s in (*against.cycles, source)]
        older, newer = (b - a for a, b in pairwise(bases))
        overlap = cycle_overlap(older, newer, ranks.factors)
        yield row("cycle", newer, ranks.factors, overlap=overlap)


def cycle_overlap(older: Tensor, newer: Tensor, r: int) -> float:
    """Return |U_iᵀ U_j|_F^2 / r of the r left singular vectors of what two cycles merged.

    NaN if a matrix has values that are not finite or has no r directions, as 0 has none.
    """
    frames = []
    for D in (older, newer):
        if not D.isfinite().all() or not D.any():
            return float("nan")
        frames.append(torch.linalg.svd(D, full_matrices=False)[0][:, :r])
    return subspace_overlap(*frames).item()


def _base(layer: Linear, device: torch.device) -> Tensor:
    """Return the frozen matrix that merges change, or the dense weight before the first cycle."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return weight.detach().to(device, torch.float64)


def in_order(layer: Linear, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return B: [n, r] and A: [r, m] of a layer whose W is B A."""
    one, two = factors_of(layer, device).values()
    fits = one.shape[0] == layer.out_features and two.shape[1] == layer.in_features
    return (one, two) if fits else (two, one)


def heads_of(source: Source) -> tuple[int, int] | None:
    """Return the numbers of query heads and of key and value heads, None where unknown."""
    config = source.model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if isinstance(heads, int) and isinstance(kv_heads, int):
        return heads, kv_heads
    return None


def ov_pairs(source: Source) -> dict[int, tuple[str, str]]:
    """Return the names of W_O and W_V by layer: self_attn.o_proj and v_proj of matching shapes."""
    pairs, found, heads = {}, source.layers, heads_of(source)
    for name, out in found.items():
        value = found.get(name.removesuffix("o_proj") + "v_proj")
        if heads is None or not name.endswith(".o_proj") or value is None:
            continue
        width, rest = divmod(out.in_features, heads[0])
        fits = rest == 0 and value.out_features == heads[1] * width
        if fits and value.in_features == out.out_features:
            pairs[source.place(name)[0]] = (name, name.removesuffix("o_proj") + "v_proj")
    return pairs


def ov_rows(source: Source, layer: int, names: tuple[str, str], device: torch.device) -> list[Row]:
    """Return the rows of the OV circuits of one layer: of each query head, and of their sum."""
    out, value = (source.layers[name] for name in names)
    heads = heads_of(source)
    assert heads is not None
    W_O, W_V = weight_of(out, device), weight_of(value, device)
    d, width = W_O.shape[0], W_O.shape[1] // heads[0]
    most = min(ranks_of(out).weight, ranks_of(value).weight)
    each = ov_singular_values(W_O, W_V, *heads).cpu()
    total = product_singular_values(*ov_sum_factors(W_O, W_V, *heads)).cpu()
    rows = [
        Row(layer, "ov", "weight", (d, d), min(width, most), sigma, head=str(head))
        for head, sigma in enumerate(each)
    ]
    rank = min(d, heads[1] * width, most)
    return [*rows, Row(layer, "ov", "weight", (d, d), rank, total, head="sum")]
