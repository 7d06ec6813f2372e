"""Spectral steps on W = B A: changes of B and A whose effect on W is bounded in spectral norm.

B: [n, r], A: [r, m], and with the gradient G of W, which is never formed, N_B = G Aᵀ and
N_A = Bᵀ G, or averages of them over steps. Each rule takes several pairs of one rank r and returns
(dB, dA) of each, to be subtracted. polar(X) is U Vᵀ of X = U S Vᵀ, by Newton-Schulz
(`newton_schulz.polar`). In what follows L_B L_Bᵀ = BᵀB and L_A L_Aᵀ = A Aᵀ, both damped.

Bᵀ and A are alike: wide matrices X [r, w], each with a partner. All Bᵀ of one width are one stack,
in memory still the matrices B, and all A of one width. All r x r matrices are another, so that the
number of operations that are launched does not depend on the number of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from peptrain.ops.newton_schulz import COEFFICIENTS, Polynomial, polar, polars, times
from peptrain.ops.precision import at_least_fp32, tf32_products

DAMPING = 1e-2
"""Added to BᵀB and A Aᵀ, relative to their mean eigenvalue σ². Then |L⁻¹| is at most 10 / σ, and
nearly singular factors take no large steps."""
POWER_ITERATIONS = 2
"""Of a step. They start where the step before ended, and the factors have moved little since."""
FLOOR = {torch.float32: 1e-6, torch.float64: 1e-14}
"""Damping of a Gram matrix of residuals, times r. These are singular wherever the gradient has a
low rank. Directions smaller than the floor's root, relative to the mean one, are shortened."""

Steps = list[tuple[Tensor, Tensor]]


class Pair(NamedTuple):
    """Factors and what they follow."""

    B: Tensor
    A: Tensor
    N_B: Tensor
    N_A: Tensor


class _Sides:
    """The 2k wide matrices of k pairs, those of B and those of A, both ordered by width."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs, k = pairs, len(pairs)
        widths = [p.B.shape[0] for p in pairs] + [p.A.shape[1] for p in pairs]
        order = sorted(range(2 * k), key=lambda side: (side >= k, widths[side]))
        place = {side: at for at, side in enumerate(order)}
        self.partners = [place[(side + k) % (2 * k)] for side in order]
        self.order = order
        kinds = groupby(order, key=lambda side: (side >= k, widths[side]))
        self.stacks = [list(found) for _, found in kinds]

    def factors(self) -> list[Tensor]:
        """Return Bᵀ and A, a stack [., r, w] for each width."""
        return self._stacked([p.B for p in self.pairs], [p.A for p in self.pairs])

    def followed(self) -> list[Tensor]:
        """Return N_Bᵀ and N_A likewise."""
        return self._stacked([p.N_B for p in self.pairs], [p.N_A for p in self.pairs])

    def _stacked(self, tall: list[Tensor], wide: list[Tensor]) -> list[Tensor]:
        each, k = tall + wide, len(tall)
        found = [torch.stack([each[i] for i in where]) for where in self.stacks]
        return [t.mT if where[0] < k else t for t, where in zip(found, self.stacks, strict=True)]

    def split(self, of_all: Tensor) -> tuple[Tensor, ...]:
        """Return the parts of [2k, ...] that belong to each stack."""
        parts: tuple[Tensor, ...] = torch.split(of_all, [len(where) for where in self.stacks])
        return parts

    def partnered(self, of_all: Tensor) -> Tensor:
        """Return [2k, ...] with each entry in the place of its partner's."""
        each = of_all.unbind()
        return torch.stack([each[i] for i in self.partners])

    def paired(self, of_all: Tensor) -> tuple[Tensor, Tensor]:
        """Return the entries of B and those of A, [k, ...] each, in the order of the pairs."""
        k, each = len(self.pairs), dict(zip(self.order, of_all.unbind(), strict=True))
        of_B, of_A = (torch.stack([each[i + first] for i in range(k)]) for first in (0, k))
        return of_B, of_A

    def unpaired(self, of_B: Sequence[Tensor], of_A: Sequence[Tensor]) -> Tensor:
        """Return [2k, ...] of the entries of B and those of A."""
        each = (*of_B, *of_A)
        return torch.stack([each[i] for i in self.order])

    def steps(self, stacks: Sequence[Tensor]) -> Steps:
        """Return (dB, dA) of each pair, in the dtype of what it follows, contiguous."""
        k, dtype = len(self.pairs), self.pairs[0].N_A.dtype
        found: list[Tensor] = [torch.empty(0)] * (2 * k)
        for where, stack in zip(self.stacks, stacks, strict=True):
            natural = (stack.mT if where[0] < k else stack).to(dtype).contiguous()
            for side, step in zip(where, natural.unbind(), strict=True):
                found[side] = step
        return list(zip(found[:k], found[k:], strict=True))


def factor_steps(pairs: Sequence[Pair], coefficients: Sequence[Polynomial] = COEFFICIENTS) -> Steps:
    """Return polar(N_B) and polar(N_A): Muon on each factor."""
    sides = _Sides(pairs)
    return sides.steps(polars(sides.followed(), coefficients))


def spectron_steps(
    pairs: Sequence[Pair],
    vectors: Sequence[tuple[Tensor, ...]],
    coefficients: Sequence[Polynomial] = COEFFICIENTS,
) -> tuple[Steps, Steps]:
    """Return ρ polar(N_B) and ρ polar(N_A) with ρ = 1 / (|B| + |A| + 1) in spectral norms, and the
    new vectors of the power iterations.

    For 0 <= lr <= 1 then |(B - lr dB)(A - lr dA) - B A| <= lr, as far as the polar factors and the
    norms are exact. vectors: unit vectors [r], near the first eigenvectors of BᵀB and A Aᵀ.
    Source: Spectron (Janson et al., 2026).
    """
    sides = _Sides(pairs)
    S = _grams(_products(sides.factors()))
    v = sides.unpaired(*zip(*vectors, strict=True)).to(S.dtype)
    norms, v = _spectral_norms(S, v)
    rho = 1 / (norms + sides.partnered(norms) + 1)
    steps = sides.steps(polars(sides.followed(), coefficients, scales=sides.split(rho)))
    of_B, of_A = sides.paired(v.to(pairs[0].A.dtype))
    return steps, list(zip(of_B.unbind(), of_A.unbind(), strict=True))


def lora_muon_steps(
    pairs: Sequence[Pair],
    damping: float = DAMPING,
    coefficients: Sequence[Polynomial] = COEFFICIENTS,
) -> Steps:
    """Return dB = polar(N_B L_A⁻ᵀ) L_A⁻¹ / 2 and dA = L_B⁻ᵀ polar(L_B⁻¹ N_A) / 2.

    |dB A| and |B dA| are at most 1/2. Without damping dB A + B dA depends on B A alone, and not on
    how it is factored. Source: LoRA-Muon (Cesista et al., 2026), whose inverse square roots give
    the same steps as Cholesky factors do.
    """
    sides = _Sides(pairs)
    roots = sides.partnered(_inverse_roots(_grams(sides.factors()), damping))
    followed = _products(sides.followed())
    split = [P.to(N.dtype) for P, N in zip(sides.split(roots), followed, strict=True)]
    seen = [times(P, N) for P, N in zip(split, followed, strict=True)]
    found = polars(seen, coefficients)
    return sides.steps([times(0.5 * P.mT, N) for P, N in zip(split, found, strict=True)])


def tangent_steps(
    pairs: Sequence[Pair],
    damping: float = DAMPING,
    coefficients: Sequence[Polynomial] = COEFFICIENTS,
) -> Steps:
    """Return (dB, dA) with dB A + B dA = P_T(polar(P_T(G))), T the tangent space at W = B A of the
    matrices of rank r.

    With U = B L_B⁻ᵀ, Vᵀ = L_A⁻¹ A, X = N_B L_A⁻ᵀ = G V and Y = L_B⁻¹ N_A = Uᵀ G, the projection
    P_T(G) = U C Vᵀ + D Vᵀ + U E has C = (UᵀX + Y V) / 2, D = X - U UᵀX and E = Y - Y V Vᵀ. In
    orthonormal bases Q_D of D and Q_Eᵀ of E it is K = [[C, E Q_E], [Q_Dᵀ D, 0]]. From its polar
    factor [[C', X'], [Y', .]] follow dB = (U C' / 2 + Q_D Y') L_A⁻¹ and
    dA = L_B⁻ᵀ (C' Vᵀ / 2 + X' Q_Eᵀ). Its product with G is the nuclear norm of P_T(G), and
    |dB A + B dA| is at most 2 / sqrt(3). With damping U and V are not quite orthonormal, D and E
    keep a part along them, and the limit is twice that: [U, Q_D] and [V, Q_E] have norms of up to
    sqrt(2), near it where a factor is nearly singular.

    On a GPU the products of fp32 matrices are in TF32. D and E are differences, whose rounding the
    polar factor enlarges, but less than it enlarges that of an N in bf16.
    """
    sides = _Sides(pairs)
    given = sides.factors()
    with tf32_products():
        S = _grams(given)
    roots = _inverse_roots(S, damping)
    factors, followed = _precise(given), _precise(sides.followed())
    across = sides.split(sides.partnered(roots))
    with tf32_products():
        frames = [P @ X for P, X in zip(sides.split(roots), factors, strict=True)]  # Uᵀ, or Vᵀ
        seen = [P @ N for P, N in zip(across, followed, strict=True)]  # Xᵀ, or Y
        inner = [T @ F.mT for T, F in zip(seen, frames, strict=True)]  # Xᵀ U, or Y V
        rest = [T - C @ F for T, C, F in zip(seen, inner, frames, strict=True)]  # Dᵀ, or E
        S = _grams(rest)
    tall = sides.split(_inverse_roots(S, FLOOR[S.dtype] * S.shape[-1]))
    with tf32_products():
        bases = [P @ D for P, D in zip(tall, rest, strict=True)]  # Q_Dᵀ, or Q_Eᵀ
        corners = [D @ Q.mT for D, Q in zip(rest, bases, strict=True)]  # Dᵀ Q_D, or E Q_E
        (C_B, C_A), (R_B, R_A) = (sides.paired(torch.cat(t)) for t in (inner, corners))
        C = 0.5 * (C_B.mT + C_A)
        K = torch.cat([torch.cat([C, R_A], -1), torch.cat([R_B.mT, torch.zeros_like(C)], -1)], -2)
        found = polar(K, coefficients)
        of_side = sides.split(sides.unpaired(found.mT.unbind(), found.unbind()))
        parts = zip(of_side, across, frames, bases, strict=True)
        return sides.steps([_lifted(M, F, Q, P) for M, P, F, Q in parts])


def _lifted(M: Tensor, F: Tensor, Q: Tensor, P: Tensor) -> Tensor:
    """Return Pᵀ (C' F / 2 + X' Q) for M = [[C', X'], [Y', .]]: dA, or dBᵀ with M transposed."""
    r = M.shape[-1] // 2
    C, X = M[:, :r, :r], M[:, :r, r:]
    return P.mT @ torch.baddbmm(X @ Q, C, F, alpha=0.5)


def _precise(stacks: Sequence[Tensor]) -> list[Tensor]:
    """Return the stacks in at least fp32."""
    return [X.to(at_least_fp32(X.dtype)) for X in stacks]


def _products(stacks: Sequence[Tensor]) -> list[Tensor]:
    """Return the stacks in the dtype of long products: bf16 on a GPU, unless they are float64."""
    narrow = stacks[0].is_cuda and stacks[0].dtype != torch.float64
    return [X.to(torch.bfloat16) for X in stacks] if narrow else _precise(stacks)


def _grams(stacks: Sequence[Tensor]) -> Tensor:
    """Return X Xᵀ of all wide matrices, [2k, r, r], in at least fp32."""
    return torch.cat([_gram(X) for X in stacks])


def _gram(X: Tensor) -> Tensor:
    if X.is_cuda and X.dtype == torch.bfloat16:  # the same sums as in fp32, and far cheaper
        return torch.bmm(X, X.mT, out_dtype=torch.float32)
    X = X.to(at_least_fp32(X.dtype))
    return X @ X.mT


def _inverse_roots(S: Tensor, damping: float) -> Tensor:
    """Return L⁻¹ with L Lᵀ = S + damping mean(diag S), [2k, r, r].

    A tiny number is added too, so that it is finite for S = 0. Nothing waits for the device: where
    S is singular and the damping 0, the result may be not finite, without an error.
    """
    mean = S.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None]
    least = torch.finfo(S.dtype).tiny ** 0.5
    S = S + torch.diag_embed((damping * mean + least).expand(S.shape[:-1]))
    L = torch.linalg.cholesky_ex(S)[0]
    eye = torch.eye(S.shape[-1], dtype=S.dtype, device=S.device).expand_as(L)
    inverse: Tensor = torch.linalg.solve_triangular(L, eye, upper=False)
    return inverse


def _spectral_norms(S: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return the roots of the largest eigenvalues of S [2k, r, r] by power iterations from v
    [2k, r], and the new v, which stays where S v = 0."""
    for _ in range(POWER_ITERATIONS):
        w = (S @ v[..., None])[..., 0]
        size = torch.linalg.vector_norm(w, dim=-1, keepdim=True)
        v = torch.where(size > 0, w / size, v)
    value = (v[..., None, :] @ (S @ v[..., None]))[..., 0, 0]
    return value.clamp(min=0).sqrt(), v
