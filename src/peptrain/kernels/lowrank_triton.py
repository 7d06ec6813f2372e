"""Triton kernels for lowrank.py: products z Bᵀ, z = x Aᵀ, fused with the operation that follows.

They have no backward pass. A product that sums over r is short, and half of its time is spent
writing its result. The operation after it (a rotation, a sum, SwiGLU) is therefore applied before
the result is written, and needs no pass of its own. Each kernel is one custom operator. As in
linear_triton.py they also run in Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from peptrain.kernels.linear_triton import dot_type, operator

COLUMNS = 128
"""Columns of a tile. The sizes were the fastest of some dozens tried on one H200 (docs/log.md)."""
BAND = 8
"""Number of row blocks whose tiles are computed one after another, because they share B in the
cache."""


@triton.jit
def _place(tile, blocks, columns, BAND: tl.constexpr):
    """Return (block of rows, block of columns) of a tile."""
    band = tile // (BAND * columns) * BAND
    rows = tl.minimum(blocks - band, BAND)
    within = tile % (BAND * columns)
    return band + within % rows, within // rows


@triton.jit
def _gated_products(
    z, B_g, B_u, scale, h, T, f, programs,
    R: tl.constexpr, SCALED: tl.constexpr, DOT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    columns, blocks = tl.cdiv(f, N), tl.cdiv(T, M)
    for tile in range(tl.program_id(0), blocks * columns, programs):
        block, column = _place(tile, blocks, columns, BAND)
        i, j = block * M, column * N
        gate = tl.zeros((M, N), tl.float32)
        up = tl.zeros((M, N), tl.float32)
        for k in range(0, R, K):
            gate = tl.dot(z.load([i, k]).to(DOT), B_g.load([j, k]).to(DOT).T, gate)
            up = tl.dot(z.load([i, R + k]).to(DOT), B_u.load([j, k]).to(DOT).T, up)
        if SCALED:
            t = i + tl.arange(0, M)
            s = tl.load(scale + t, mask=t < T, other=0.0)[:, None]
            gate, up = gate * s, up * s
        h.store([i, j], (gate / (1 + tl.exp(-gate)) * up).to(h.dtype))


@operator
def gated_products(z: Tensor, B_g: Tensor, B_u: Tensor, scale: Tensor | None) -> Tensor:
    """Compute h = silu(s z_g B_gᵀ) * (s z_u B_uᵀ), [T, f], without writing the products to memory.

    z = [z_g z_u]: [T, 2r] and B_g, B_u: [f, r] are in fp16 or bf16, and r is a multiple of 8.
    s = diag(scale), where scale has T values in fp32; None stands for ones.
    """
    z, B_g, B_u = z.contiguous(), B_g.contiguous(), B_u.contiguous()
    (T, _), (f, r) = z.shape, B_g.shape
    h = _aligned_rows(z, f)
    M, N = 128, COLUMNS
    K, stages = (64, 3) if _large_shared_memory(z.device) else (32, 2)
    programs = _processors(z.device)
    _gated_products[(programs,)](
        _tiled(z, M, K), _tiled(B_g, N, K), _tiled(B_u, N, K),
        z if scale is None else scale, _tiled(h, M, N), T, f, programs,
        R=r, SCALED=scale is not None, DOT=dot_type(z.dtype), M=M, N=N, K=K, BAND=BAND,
        num_warps=8, num_stages=stages,
    )  # fmt: skip
    return h


@gated_products.register_fake
def _(z: Tensor, B_g: Tensor, B_u: Tensor, scale: Tensor | None) -> Tensor:
    return _aligned_rows(z, B_g.shape[0])


@triton.jit
def _rotated_products(
    z, B, scale, cos, sin, y, T, n, n_q, n_k, length, programs,
    R: tl.constexpr, D: tl.constexpr, DOT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    columns, blocks = tl.cdiv(n, N), tl.cdiv(T, M)
    for tile in tl.range(tl.program_id(0), blocks * columns, programs, flatten=True):
        block, column = _place(tile, blocks, columns, BAND)
        i, j = block * M, column * N
        first_k = (j >= n_q).to(tl.int32) * R + (j >= n_q + n_k).to(tl.int32) * R
        acc = tl.zeros((M, N), tl.float32)
        for k in range(0, R, K):
            acc = tl.dot(z.load([i, first_k + k]).to(DOT), B.load([j, k]).to(DOT).T, acc)
        t = i + tl.arange(0, M)
        acc *= tl.load(scale + t, mask=t < T, other=0.0)[:, None]
        if j < n_q + n_k:
            pair = (j // 2 + tl.arange(0, N // 2)) % (D // 2)
            at = (t % length)[:, None] * D + pair[None, :]
            c = tl.load(cos + at).to(tl.float32)
            s = tl.load(sin + at).to(tl.float32)
            first, second = tl.split(tl.reshape(acc, (M, N // 2, 2)))
            turned = tl.join(first * c - second * s, second * c + first * s)
            acc = tl.reshape(turned, (M, N))
        y.store([i, j], acc.to(y.dtype))


@operator
def rotated_products(
    z: Tensor, B: Tensor, scale: Tensor, cos: Tensor, sin: Tensor, n_q: int, n_k: int
) -> Tensor:
    """Compute [q k v], [T, n], from z = [z_q z_k z_v]: [T, 3r] and B = [B_q; B_k; B_v]: [n, r].

    Row t is multiplied by scale_t. q and k are then rotated: each pair (2i, 2i + 1) of a head's D
    columns by the angle whose cosine and sine are in column i of row t mod L of cos, sin: [L, D].
    n_q and n_k are multiples of COLUMNS, and r is a multiple of 8. All tensors are in bf16, except
    scale, which is in fp32.
    """
    z, B, cos, sin = z.contiguous(), B.contiguous(), cos.contiguous(), sin.contiguous()
    (T, _), (n, r) = z.shape, B.shape
    y = z.new_empty(T, n)
    M, N, K = 128, COLUMNS, 32
    programs = 2 * _processors(z.device)  # one multiplies while another one writes
    _rotated_products[(programs,)](
        _tiled(z, M, K), _tiled(B, N, K), scale, cos, sin, _tiled(y, M, N),
        T, n, n_q, n_k, cos.shape[0], programs,
        R=r, D=cos.shape[1], DOT=dot_type(z.dtype), M=M, N=N, K=K, BAND=BAND,
        num_warps=4, num_stages=4,
    )  # fmt: skip
    return y


@rotated_products.register_fake
def _(z: Tensor, B: Tensor, scale: Tensor, cos: Tensor, sin: Tensor, n_q: int, n_k: int) -> Tensor:
    return z.new_empty(z.shape[0], B.shape[0])


@triton.jit
def _added_products(
    z, B, x, y, squares, T, n,
    R: tl.constexpr, DOT: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(n, N)
    block, column = _place(tl.program_id(0), tl.cdiv(T, M), columns, BAND)
    i, j = block * M, column * N
    acc = tl.zeros((M, N), tl.float32)
    for k in range(0, R, K):
        acc = tl.dot(z.load([i, k]).to(DOT), B.load([j, k]).to(DOT).T, acc)
    acc += x.load([i, j]).to(tl.float32)
    y.store([i, j], acc.to(y.dtype))
    t = i + tl.arange(0, M)
    tl.store(squares + t * columns + column, tl.sum(acc * acc, 1), mask=t < T)


@operator
def added_products(z: Tensor, B: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return y = x + z Bᵀ, [T, n], for z: [T, r] and B: [n, r] in fp16 or bf16, and sums of y².

    The sums are over blocks of 128 columns, [T, n / 128], in fp32. n and r are multiples of 8.
    """
    z, B, x = z.contiguous(), B.contiguous(), x.contiguous()
    (T, r), n = z.shape, B.shape[0]
    y, squares = _added(x)
    M, N, K = 128, COLUMNS, 32
    _added_products[(triton.cdiv(T, M) * triton.cdiv(n, N),)](
        _tiled(z, M, K), _tiled(B, N, K), _tiled(x, M, N), _tiled(y, M, N), squares, T, n,
        R=r, DOT=dot_type(z.dtype), M=M, N=N, K=K, BAND=BAND, num_warps=4, num_stages=4,
    )  # fmt: skip
    return y, squares


@added_products.register_fake
def _(z: Tensor, B: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return _added(x)


def _added(x: Tensor) -> tuple[Tensor, Tensor]:
    T, n = x.shape
    return torch.empty_like(x), x.new_empty(T, triton.cdiv(n, COLUMNS), dtype=torch.float32)


def _tiled(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(t, [rows, columns])


def _aligned_rows(z: Tensor, f: int) -> Tensor:
    """Return an empty [T, f] whose rows begin at multiples of 16 bytes, as a descriptor requires.

    The gaps between rows are set to 0, because a CPU's product of odd f was seen to read a NaN from
    there.
    """
    rows = z.new_empty(z.shape[0], -(-f // 8) * 8)
    rows[:, f:] = 0
    return rows[:, :f]


def _processors(device: torch.device) -> int:
    """Return the number of multiprocessors, for kernels whose programs loop over tiles.

    On a CPU, in the interpreter, it is 2.
    """
    if device.type != "cuda":
        return 2
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _large_shared_memory(device: torch.device) -> bool:
    """Return whether the GPU has 227 KiB of shared memory, as H100, H200 and B200 have."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)
