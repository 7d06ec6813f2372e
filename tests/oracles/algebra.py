"""The methods' equations, dense and slow, as an oracle that shares no code with the library.

Papers: BPT ("Bi-Phase Training", Gurung and Campbell), ReLoRA (Lialin et al., ICLR 2024), LORO
(Mo et al., ICLR 2025). Letters are theirs: W is n x m (out x in), B n x r, A r x m, U n x r,
V r x m. Everything is float64; projections go through the pseudo-inverse, so no QR appears.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor
from torch.linalg import norm, pinv, svd

Number = TypeVar("Number", float, Tensor)
Multiplier = Callable[[int], float]  # of the learning rate, from the 0-based step
Moments = tuple[Tensor, Tensor, int]  # Adam's m and v of one tensor, and its number of steps


def riemannian_gradient(B: Tensor, A: Tensor, G: Tensor) -> Tensor:
    """P(G) = B(BᵀB)⁻¹BᵀG + GAᵀ(AAᵀ)⁻¹A - B(BᵀB)⁻¹BᵀGAᵀ(AAᵀ)⁻¹A: G on the tangent space of the
    rank-r matrices at W = BA (LORO; the last term of the sum is 'both')."""
    columns = B @ pinv(B)
    rows = pinv(A) @ A
    return columns @ G + G @ rows - columns @ G @ rows


def truncated(W: Tensor, r: int) -> Tensor:
    """SVD_r(W), the rank-r matrix nearest to W; ambiguous when sigma_r = sigma_{r+1}."""
    B, A = factorised(W, r)
    return B @ A


def factorised(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """B = U_r Σ^½, A = Σ^½ V_rᵀ with W ≈ U Σ Vᵀ; unique only up to a sign per column of B."""
    U, S, Vt = svd(W, full_matrices=False)
    root = torch.diag(S[:r].sqrt())
    return U[:, :r] @ root, root @ Vt[:r]


def loro_exact_raw(B: Tensor, A: Tensor, G: Tensor, lr: float) -> Tensor:
    """W' = SVD_r(BA - lr P(G)) from the DENSE gradient G: LORO's exact step on raw gradients."""
    return truncated(B @ A - lr * riemannian_gradient(B, A, G), B.shape[1])


def loro_exact_directions(B: Tensor, A: Tensor, D_B: Tensor, D_A: Tensor, lr: float) -> Tensor:
    """W' = SVD_r(BA - lr [B(BᵀB)⁻¹ D_A + (I - Π_B) D_B (AAᵀ)⁻¹A]), Π_B = B(BᵀB)⁻¹Bᵀ.

    LORO's exact step for any factor directions, the core's A-side form. Why no QR is needed: with
    B = Q_B R_B and Aᵀ = Q_A R_A the product [Q_B P_B] core [Q_A P_A]ᵀ is a sum of four blocks, and
      Q_B R_B R_Aᵀ Q_Aᵀ          = BA,
      Q_B Yᵀ Q_A Q_Aᵀ + Q_B (P_A T_A)ᵀ = Q_B Yᵀ = Q_B R_B⁻ᵀ D_A = B(BᵀB)⁻¹ D_A,
      P_B T_B Q_Aᵀ = (I - Π_B) D_B R_A⁻¹ Q_Aᵀ = (I - Π_B) D_B (AAᵀ)⁻¹A;
    [Q P] having orthonormal columns, truncating the core truncates the product. (If 2r > min(n, m)
    P cannot be orthogonal to Q in all its columns; the spare ones meet zero rows of T.)
    D_B = GAᵀ, D_A = BᵀG give back loro_exact_raw.
    """
    return truncated(B @ A - lr * loro_tangent(B, A, D_B, D_A), B.shape[1])


def loro_tangent(B: Tensor, A: Tensor, D_B: Tensor, D_A: Tensor) -> Tensor:
    """The bracket of loro_exact_directions."""
    outside = torch.eye(B.shape[0], dtype=B.dtype) - B @ pinv(B)
    return pinv(B).T @ D_A + outside @ D_B @ pinv(A).T


def loro_orthographic(B: Tensor, A: Tensor, D_B: Tensor, D_A: Tensor, lr: float) -> Tensor:
    """W' = Z V (UᵀZV)⁻¹ UᵀZ, Z = BA - lr T, T the bracket; U and V from an SVD of BA (Absil and
    Malick, 2012)."""
    U, _, Vt = svd(B @ A, full_matrices=False)
    U, V = U[:, : B.shape[1]], Vt[: B.shape[1]].T
    Z = B @ A - lr * loro_tangent(B, A, D_B, D_A)
    return Z @ V @ torch.linalg.inv(U.T @ Z @ V) @ U.T @ Z


def loro_capped_rate(
    B: Tensor, A: Tensor, D_B: Tensor, D_A: Tensor, lr: float, cap: float
) -> float:
    """lr min(1, cap / q), q = ‖lr T‖ / ‖BA‖ (Frobenius), T the bracket."""
    q = float(norm(lr * loro_tangent(B, A, D_B, D_A)) / norm(B @ A))
    return lr * min(1.0, cap / q) if q else lr


def precond_step(
    B: Tensor, A: Tensor, G_B: Tensor, G_A: Tensor, lr: float, eps: float
) -> tuple[Tensor, Tensor]:
    """B - lr G_B (AAᵀ + e_A I)⁻¹ and A - lr (BᵀB + e_B I)⁻¹ G_A, both from the OLD factors.

    PrecondLoRA, with e = eps * trace of the Gram matrix it damps (the trace, not trace / r)."""
    eye = torch.eye(B.shape[1], dtype=B.dtype)
    gram_a, gram_b = A @ A.T, B.T @ B
    damped_a = gram_a + eps * torch.trace(gram_a) * eye
    damped_b = gram_b + eps * torch.trace(gram_b) * eye
    return B - lr * G_B @ torch.linalg.inv(damped_a), A - lr * torch.linalg.inv(damped_b) @ G_A


def bpt_effective(W: Tensor, U: Tensor, V: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """W_eff = diag(a) (W + U V) diag(b) (BPT)."""
    return torch.diag(a) @ (W + U @ V) @ torch.diag(b)


def bpt_forward(
    x: Tensor, W: Tensor, U: Tensor, V: Tensor, a: Tensor, b: Tensor, bias: Tensor | None
) -> Tensor:
    """y = x W_effᵀ + bias: the bias stands outside the diagonals (BPT)."""
    y = x @ bpt_effective(W, U, V, a, b).T
    return y if bias is None else y + bias


def dora_effective(
    W: Tensor, B: Tensor, A: Tensor, s: float | Tensor, m: Tensor
) -> tuple[Tensor, Tensor]:
    """W_eff and N: row i of W_eff is m_i v_i / N_i with v_i row i of W + s B A, N_i = |v_i|."""
    rows, norms = [], []
    for w, b, length in zip(W, B, m, strict=True):
        v = w + s * sum(b[k] * A[k] for k in range(len(A)))
        norms.append(math.sqrt(sum(entry**2 for entry in v.tolist())))
        rows.append(length * v / norms[-1])
    return torch.stack(rows), torch.tensor(norms, dtype=W.dtype)


def dora_gradients(
    G: Tensor, W: Tensor, B: Tensor, A: Tensor, s: float, m: Tensor
) -> dict[str, Tensor]:
    """Of B, A, s and m from the dense G = dL/dW_eff, N taken for a constant (DoRA, section 4.3).

    With C = diag(m / N): dL/d(W + s B A) = C G, so dB = s C G Aᵀ, dA = s Bᵀ C G, ds = <C G, B A>;
    dm_i = <G_i, v_i> / N_i.
    """
    N = dora_effective(W, B, A, s, m)[1]
    CG = torch.diag(m / N) @ G
    v = W + s * B @ A  # not W_eff N / m: an m may be 0
    dm = (G * v).sum(1) / N
    return {"B": s * CG @ A.T, "A": s * B.T @ CG, "s": (CG * (B @ A)).sum().reshape(1), "m": dm}


def vera_effective(W: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor) -> Tensor:
    """W + diag(b) B' diag(d) A' with B' the first n rows of B, A' the first m columns of A."""
    n, m = W.shape
    return W + torch.diag(b) @ B[:n] @ torch.diag(d) @ A[:, :m]


def vera_gradients(G: Tensor, A: Tensor, B: Tensor, d: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Of lambda_d and lambda_b from the dense G, term by term: W_ij has b_i B_ik d_k A_kj in it."""
    n, m = G.shape
    return {
        "lambda_d": torch.einsum("ij,i,ik,kj->k", G, b, B[:n], A[:, :m]),
        "lambda_b": torch.einsum("ij,ik,k,kj->i", G, B[:n], d, A[:, :m]),
    }


def hyperadapt_effective(W: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """diag(a) W diag(b)."""
    return torch.diag(a) @ W @ torch.diag(b)


def hyperadapt_gradients(G: Tensor, W: Tensor, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Of a and b from the dense G, term by term: entry ij is a_i W_ij b_j."""
    return {
        "a": torch.einsum("ij,ij,j->i", G, W, b),
        "b": torch.einsum("ij,i,ij->j", G, a, W),
    }


def relora_effective(W: Tensor, B: Tensor, A: Tensor, s: float | Tensor) -> Tensor:
    """W_eff = W + s B A (LoRA, ReLoRA)."""
    return W + s * (B @ A)


def relora_merge(W: Tensor, B: Tensor, A: Tensor, s: float | Tensor) -> tuple[Tensor, Tensor]:
    """(W', B') = (W + s B A, 0): W_eff stays whatever A is drawn next (ReLoRA, Algorithm 1)."""
    return W + s * (B @ A), torch.zeros_like(B)


def reset_zero(m: Tensor, v: Tensor) -> Moments:
    """m = v = 0 and no steps: Adam begins anew."""
    return torch.zeros_like(m), torch.zeros_like(v), 0


def smallest(x: Tensor, p: float) -> Tensor:
    """A mask, true at the round(p size) elements of smallest |x|; of equal ones the first in
    row-major order go first. round is Python's: halves to even."""
    flat = x.flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: (abs(flat[i]), i))
    chosen = set(order[: round(p * len(flat))])
    return torch.tensor([i in chosen for i in range(len(flat))]).reshape(x.shape)


def up_to_quantile(x: Tensor, p: float) -> Tensor:
    """A mask, true where |x| is not above its quantile p, interpolated linearly."""
    return x.abs() <= torch.quantile(x.abs().double().flatten(), p)


def reset_masked(m: Tensor, v: Tensor, pruned: Tensor) -> Moments:
    """Zero m and v where pruned is true, the same elements of both; no steps (random pruning)."""
    return m.masked_fill(pruned, 0.0), v.masked_fill(pruned, 0.0), 0


def reset_magnitude(m: Tensor, v: Tensor, p: float) -> Moments:
    """Zero m and v where |m| is among the round(p size) smallest; no steps."""
    return reset_masked(m, v, smallest(m, p))


def reset_pico(m: Tensor, v: Tensor, k: int, pruned_m: Tensor, pruned_v: Tensor) -> Moments:
    """Zero m and v each by a mask of its own and keep the step, as the released codes do: where
    m stays and v goes, the next updates are far larger than lr."""
    return m.masked_fill(pruned_m, 0.0), v.masked_fill(pruned_v, 0.0), k


def adam_update(
    p: Number,
    g: Number,
    m: Number,
    v: Number,
    k: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    form: str = "torch",
) -> tuple[Number, Number, Number]:
    """(p, m, v) after the k-th step (k = 1 the first since the moments were zero), elementwise.

    m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g², without weight decay, and
      form "torch" (AdamW): p -= lr m̂ / (sqrt v̂ + eps), m̂ = m / (1 - b1^k), v̂ = v / (1 - b2^k);
      form "loro":          p -= lr_p D, see loro_direction and loro_rate (c goes into lr).
    They differ in what eps is added to. Works on floats and, entry by entry, on tensors.
    """
    b1, b2 = betas
    m = b1 * m + (1 - b1) * g
    v = b2 * v + (1 - b2) * g**2
    if form == "loro":
        return p - loro_rate(lr, k, betas) * loro_direction(m, v, eps), m, v
    return p - lr * (m / (1 - b1**k)) / ((v / (1 - b2**k)) ** 0.5 + eps), m, v


def loro_direction(m: Number, v: Number, eps: float) -> Number:
    """D = m / (sqrt v + eps), moments without bias correction (LORO)."""
    return m / (v**0.5 + eps)


def loro_rate(lr: float, k: int, betas: tuple[float, float]) -> float:
    """lr_p = lr sqrt(1 - b2^k) / (1 - b1^k), k = 1 on the first step after a refresh."""
    return lr * math.sqrt(1 - betas[1] ** k) / (1 - betas[0] ** k)


def half_cosine(p: float, mn: float) -> float:
    """M(p) = mn + (1 - mn)(1 + cos πp) / 2."""
    return mn + (1 - mn) * (1 + math.cos(math.pi * p)) / 2


def warmup_cosine(N: int, w: int, mn: float) -> Multiplier:
    """t / w below w, then M((t - w) / (N - w))."""
    return lambda t: t / w if t < w else half_cosine((t - w) / (N - w), mn)


def with_restarts(base: Multiplier, starts: Sequence[int], rw: int) -> Multiplier:
    """(t - t0) / rw * base(t0 + rw) while t - t0 < rw, t0 the last restart not after t (so that the
    next restart cuts it short); else base(t)."""

    def multiplier(t: int) -> float:
        t0 = max((start for start in starts if start <= t), default=None)
        if t0 is not None and t - t0 < rw:
            return (t - t0) / rw * base(t0 + rw)
        return base(t)

    return multiplier


def relora_jagged(N: int, w: int, R: int, rw: int, mn: float) -> Multiplier:
    """t / w below w; (t % R) / rw * M((⌊t/R⌋ R + rw - w) / (N - w)) on the rw steps from each
    multiple of R, R included; else M((t - w) / (N - w)) (ReLoRA)."""

    def multiplier(t: int) -> float:
        if t < w:
            return t / w
        if t >= R and t % R < rw:
            return (t % R) / rw * half_cosine((t // R * R + rw - w) / (N - w), mn)
        return half_cosine((t - w) / (N - w), mn)

    return multiplier


def relora_schedule(
    N: int, w: int, R: int, rw: int, mn: float, warm: int = 0, fresh: bool = False
) -> Multiplier:
    """warmup_cosine restarted at the end of the warm start and at the multiples of R after it.

    R = 0 never restarts but at the switch; warm = 0 means no warm start and so no switch. With
    fresh the base from the switch on is warmup_cosine(N - warm, w, mn) at t - warm, the restarts
    staying at absolute steps. For warm = 0 this is relora_jagged, except where a restart falls
    inside the first w steps: relora_jagged then keeps t / w, this one restarts. As there, a restart
    less than rw before the end aims at base beyond N, where the cosine rises again.
    """
    whole, rest = warmup_cosine(N, w, mn), warmup_cosine(N - warm, w, mn)
    periods = range(R, N, R) if R else ()
    starts = [warm] * (warm > 0) + [t for t in periods if t > warm]
    return with_restarts(lambda t: rest(t - warm) if fresh and t >= warm else whole(t), starts, rw)


def loro_reference(N: int, w: int, R: int, mn: float = 0.1) -> Multiplier:
    """The released LORO code's schedule: cosine shifted by a = -0.1 N, 5-step re-warm-up from
    e = 1e-6 at each multiple of R (of t in the warm-up, of t + a after it)."""
    a, e = -0.1 * N, 1e-6
    peak = 0.5 * (1 + math.cos(math.pi * -a / (N - w)))

    def multiplier(t: int) -> float:
        if t < w:
            if t >= R and t % R < 5:
                target = t // R * R / w * (peak - mn) + mn
                return (t % R) / 5 * (target - e) + e
            return t / w * (peak - mn) + mn
        c = t + a
        if c % R < 5 and c // R > 0:
            return (c % R) / 5 * (half_cosine((c // R * R - w) / (N - w), mn) - e) + e
        return half_cosine((c - w) / (N - w), mn)

    return multiplier


class Arch(TypedDict):
    """A llama or qwen2 decoder: vocabulary V, hidden d, mlp f, layers L, query and key heads."""

    family: str
    V: int
    d: int
    f: int
    L: int
    heads: int
    kv: int
    tied: bool


class Count(NamedTuple):
    total: int
    trainable: int
    embedding: int  # input embedding and output head, once when tied


COUNTED = ("full", "bpt", "lora", "relora", "lowrank", "loro", "dora", "vera", "hyperadapt",
           "galore", "sltrain", "spectron", "cola")  # fmt: skip
"""The methods that `parameter_count` knows: those of the papers' tables."""


def parameter_count(arch: Arch, method: str, r: int = 0, trained_scale: bool = False) -> Count:
    """Counts by arithmetic for full, galore, bpt, lora, relora (after its warm start), lowrank,
    loro, spectron, dora, vera, hyperadapt, sltrain (density 0.03) and cola.

    Adapt a matrix n x m iff that lowers its trainable count: BPT r(n+m) + n + m < nm, DoRA
    r(n+m) + n < nm, sltrain r(n+m) + nnz < nm, the others r(n+m) < nm; VeRA (r + n) and HyperAdapt
    (n + m) always. galore trains all that full does. lowrank, loro, spectron, sltrain and cola have
    no dense W, the others keep the frozen nm in the total; VeRA's pair, r x max m and max n x r, is
    there once. A trained scale is one more parameter per adapted matrix and outside the rule.
    """
    V, d, f, L = arch["V"], arch["d"], arch["f"], arch["L"]
    kv = d // arch["heads"] * arch["kv"]
    shapes = [(d, d), (kv, d), (kv, d), (d, d), (f, d), (f, d), (d, f)]  # q k v o gate up down
    block = 2 * d + (d + 2 * kv if arch["family"] == "qwen2" else 0)  # norms, q k v biases
    embedding = V * d if arch["tied"] else 2 * V * d
    total = trainable = embedding + d + L * block
    if method == "vera":
        total += r * (max(m for _, m in shapes) + max(n for n, _ in shapes))
    for n, m in shapes:
        adapter = {
            "bpt": r * (n + m) + n + m,
            "dora": r * (n + m) + n,
            "sltrain": r * (n + m) + 3 * n * m // 100,
            "vera": r + n,
            "hyperadapt": n + m,
        }.get(method, r * (n + m))
        always = method in ("vera", "hyperadapt")
        adapted = method not in ("full", "galore") and (always or adapter < n * m)
        frozen = 0 if method in ("lowrank", "loro", "spectron", "sltrain", "cola") else n * m
        adapter += trained_scale
        trainable += L * (adapter if adapted else n * m)
        total += L * (frozen + adapter if adapted else n * m)
    return Count(total, trainable, embedding)
