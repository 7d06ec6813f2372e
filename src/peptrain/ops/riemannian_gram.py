"""LORO's exact step from Gram matrices in float64, for many pairs of factors at once.

The reference, ops/riemannian.py, uses SVDs and QRs, which are slow on a GPU. Here each pair needs
one eigendecomposition, and otherwise only Cholesky factors and products. A Gram matrix squares the
condition number, and float64 is precise enough for that with these factors. The notation is that of
the reference. Tensors have one more leading dimension, the pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from peptrain.ops.riemannian import TOLERANCE, relative, share_below

BATCH_BYTES = 2**30
"""Approximate limit for the float64 temporaries of one batch of pairs."""
Step = Callable[
    [Tensor, Tensor, Tensor, Tensor, float, float | None], tuple[Tensor, Tensor, Tensor, Tensor]
]
"""A step of pairs of one shape: B, A, D_B, D_A, lr and cap to B', A', sound and ratio."""
STREAMS = 4
"""Concurrent eigendecompositions. On an H200 4 take 8.4 ms per matrix of 1024 columns instead of
10.4, and more are no faster."""


def gram_steps_(
    pairs: Sequence[tuple[Tensor, Tensor]],
    direction: Callable[[Tensor], Tensor],
    lr: float,
    cap: float | None = None,
    step: Step | None = None,
) -> tuple[list[int], Tensor]:
    """Replace every pair (B, A) in place by its exact step along (direction(B), direction(A)).

    step: by default `gram_step`. Returns the indices of pairs where it is not sound, as with a
    singular or nearly singular factor, and |W' - W| / |W| of all pairs, with a 0 for each of these.
    They are unchanged and left to the reference. There is one device-to-host copy for all pairs, at
    the end.
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, (B, A) in enumerate(pairs):
        alike.setdefault((B.shape, A.shape, B.dtype, A.dtype), []).append(i)
    order: list[int] = []
    results: list[tuple[Tensor, Tensor]] = []
    for indices in alike.values():
        size = _batch_size(*pairs[indices[0]])
        for start in range(0, len(indices), size):
            batch = indices[start : start + size]
            order += batch
            results.append(
                _replace([pairs[i] for i in batch], direction, lr, cap, step or gram_step)
            )
    place = torch.tensor(order, device=pairs[0][0].device).argsort()
    sound, ratios = (torch.cat(parts)[place] for parts in zip(*results, strict=True))
    return [i for i, fine in enumerate(sound.tolist()) if not fine], ratios


def _replace(
    pairs: list[tuple[Tensor, Tensor]],
    direction: Callable[[Tensor], Tensor],
    lr: float,
    cap: float | None,
    step: Step,
) -> tuple[Tensor, Tensor]:
    """Do gram_steps_ for pairs of one shape; return which were replaced, and their ratios."""
    B, A = [B for B, _ in pairs], [A for _, A in pairs]
    D_B, D_A = [direction(p) for p in B], [direction(p) for p in A]
    b, a, d_b, d_a = (torch.stack(x).double() for x in (B, A, D_B, D_A))
    new_B, new_A, sound, ratio = step(b, a, d_b, d_a, lr, cap)
    for old, new, ok in zip([*B, *A], [*new_B, *new_A], [*sound, *sound], strict=True):
        old.copy_(torch.where(ok, new, old))
    return sound, torch.where(sound, ratio, 0.0)


def _batch_size(B: Tensor, A: Tensor) -> int:
    """Return the number of pairs whose temporaries fit into BATCH_BYTES.

    A pair has about 4 of [n + m, 2r] and 10 of [2r, 2r].
    """
    (n, r), m = B.shape, A.shape[1]
    return max(1, BATCH_BYTES // (8 * (8 * r * (n + m) + 40 * r * r)))


def gram_step(
    B: Tensor, A: Tensor, D_B: Tensor, D_A: Tensor, lr: float, cap: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (B', A', sound, ratio): riemannian_step of each pair in float64, valid where `sound`.

    With Q_B R_B = B, Q_A R_A = Aᵀ, Z_A = Q_AᵀD_Aᵀ, C_B = D_B - Q_B Q_BᵀD_B and C_A the same for
    D_Aᵀ, the right basis is [Q_A P_A], P_A T_A = C_A. In this basis W' before truncation is

        Q_B [R_B R_Aᵀ - lr R_B⁻ᵀ Z_Aᵀ, -lr R_B⁻ᵀ T_Aᵀ] + C_B [-lr R_A⁻¹, 0],

    where the first bracket is `top` = W - row. The left side needs no basis, only a Gram matrix:
    V Σ² Vᵀ = H = topᵀ top + [rest, 0; 0, 0], rest = lr² R_A⁻ᵀ C_BᵀC_B R_A⁻¹. The columns of V with
    the r largest sigma give A', and W' times these columns gives B'. So B'A' is the projection of
    W' on the rows of A', and the columns of B' and rows of A' have equal norms even if the root of
    a small sigma² is inexact. The ratio comes from the same r x 2r and r x r matrices.
    """
    r = B.shape[-1]
    Q_B, R_B, inverse_B, sound_B = cholesky_qr(B)
    Q_A, R_A, inverse_A, sound_A = cholesky_qr(A.mT)
    Z_B, Z_A = Q_B.mT @ D_B, Q_A.mT @ D_A.mT
    C_B, C_A = D_B - Q_B @ Z_B, D_A.mT - Q_A @ Z_A
    T_A, inverse_T, positive = cholesky(shifted(C_A.mT @ C_A, D_A))

    W = torch.cat([R_B @ R_A.mT, torch.zeros_like(R_B)], dim=-1)
    row = lr * inverse_B.mT @ torch.cat([Z_A.mT, T_A.mT], dim=-1)
    rest = lr**2 * inverse_A.mT @ (C_B.mT @ C_B) @ inverse_A
    size = torch.linalg.matrix_norm(W)
    rate: float | Tensor = lr
    if cap is not None:
        step = (torch.linalg.matrix_norm(row).square() + trace(rest)).sqrt()
        share = share_below(cap, step, size)[:, None, None]
        row, rest, rate = share * row, share**2 * rest, share * lr
    top = W - row
    H = top.mT @ top
    H[..., :r, :r] += rest
    sound = sound_B & sound_A & positive & H.isfinite().flatten(1).all(1)
    eye = torch.eye(2 * r, dtype=H.dtype, device=H.device)
    V = eigenvectors(torch.where(sound[:, None, None], H, eye))[..., -r:].flip(-1)

    V_Q, V_P = V[..., :r, :], V[..., r:, :]
    top_V = top @ V
    new_B = Q_B @ top_V - rate * C_B @ (inverse_A @ V_Q)
    new_A = Q_A @ V_Q + C_A @ (inverse_T @ V_P)
    root = torch.linalg.vector_norm(new_B, dim=-2, keepdim=True).sqrt()
    moved = torch.linalg.matrix_norm(top_V @ V.mT - W).square() + trace(V_Q.mT @ rest @ V_Q)
    balanced_B, balanced_A = new_B / torch.where(root > 0, root, 1.0), (new_A * root).mT
    return balanced_B, balanced_A, sound, relative(moved.sqrt(), size)


def trace(M: Tensor) -> Tensor:
    """Return the trace of every M[i] = XᵀX, which rounding may not make negative."""
    return M.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(0.0)


def eigenvectors(H: Tensor, streams: int = STREAMS) -> Tensor:
    """Return the eigenvectors of every symmetric H[i], by ascending eigenvalue.

    On a GPU `streams` of them are computed at a time, because one leaves most of the GPU idle. Each
    stream has its own thread, since the library blocks until its result is there.
    """
    V, sigma = torch.empty_like(H), H.new_empty(H.shape[:2])
    if not H.is_cuda:
        torch.linalg.eigh(H, out=(sigma, V))
        return V
    current = torch.cuda.current_stream(H.device)
    side = [torch.cuda.Stream(H.device) for _ in range(streams)]  # type: ignore[no-untyped-call]

    def work(k: int) -> None:
        side[k].wait_stream(current)
        with torch.cuda.stream(side[k]):
            for i in range(k, len(H), streams):
                torch.linalg.eigh(H[i], out=(sigma[i], V[i]))

    with ThreadPoolExecutor(streams) as pool:
        list(pool.map(work, range(streams)))
    for stream in side:
        current.wait_stream(stream)
    return V


def cholesky_qr(B: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (Q, R, R⁻¹, sound) with QR = B, from the Cholesky factor of BᵀB.

    QᵀQ = I up to cond(B)² eps. sound is true if B is `well_conditioned`.
    """
    M = B.mT @ B
    R, inverse, positive = cholesky(M)
    return B @ inverse, R, inverse, positive & well_conditioned(M, inverse @ inverse.mT)


def well_conditioned(M: Tensor, inverse: Tensor) -> Tensor:
    """Return whether the condition number of B, BᵀB = M, is guaranteed to be below the limit from
    which on the reference, in fp32, treats B as singular."""
    limit = 1 / (TOLERANCE * M.shape[-1] ** 0.5 * torch.finfo(torch.float32).eps)
    fine: Tensor = condition(M, inverse) < limit
    return fine


def condition(M: Tensor, inverse: Tensor) -> Tensor:
    """Return an upper bound on sqrt(|M| |M⁻¹|), the condition number of B with BᵀB = M.

    It is at most r^¼ times the condition number.
    |M|² = |M²| <= |M²|_F, and the Frobenius norm of a square is at most r^½ times |M|².
    """
    bound: Tensor = torch.linalg.matrix_norm(M @ M) * torch.linalg.matrix_norm(inverse @ inverse)
    return bound**0.25


def cholesky(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (R, R⁻¹, whether M is positive definite) with RᵀR = M."""
    L, info = torch.linalg.cholesky_ex(M)
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    return L.mT, torch.linalg.solve_triangular(L, eye, upper=False).mT, info == 0


def shifted(N: Tensor, D: Tensor) -> Tensor:
    """Return N + 8 eps |D|_F² I, which is positive definite even for N = 0.

    N = CᵀC, where C is a part of D. Where D adds no direction, the columns of the resulting basis
    are shorter than 1, and the step loses at most lr |D| sqrt(8 eps) = 4e-8 lr |D|.
    """
    limits = torch.finfo(N.dtype)
    shift: Tensor = 8 * limits.eps * D.square().sum((-2, -1), keepdim=True) + limits.tiny**0.5
    return N + shift * torch.eye(N.shape[-1], dtype=N.dtype, device=N.device)
