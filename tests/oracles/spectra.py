"""Singular values by one-sided Jacobi rotations, and their measures as loops over floats.

No factorisation of a library takes part. Small singular values are as exact as large ones.
"""

import math

import torch
from torch import Tensor


def singular_values(W: Tensor) -> list[float]:
    """Rotate pairs of columns until all are orthogonal; their norms are the singular values."""
    columns = [list(map(float, c)) for c in (W if W.shape[0] < W.shape[1] else W.T)]
    for _ in range(60):
        largest = 0.0
        for i in range(len(columns)):
            for j in range(i):
                a, b = columns[i], columns[j]
                aa, bb, ab = (math.fsum(x * y for x, y in zip(*pair, strict=True))
                              for pair in ((a, a), (b, b), (a, b)))  # fmt: skip
                if ab == 0 or aa == 0 or bb == 0:
                    continue
                largest = max(largest, abs(ab) / math.sqrt(aa * bb))
                angle = 0.5 * math.atan2(2 * ab, aa - bb)
                c, s = math.cos(angle), math.sin(angle)
                columns[i] = [c * x + s * y for x, y in zip(a, b, strict=True)]
                columns[j] = [c * y - s * x for x, y in zip(a, b, strict=True)]
        if largest < 1e-15:
            break
    return sorted((math.sqrt(math.fsum(x * x for x in c)) for c in columns), reverse=True)


def product(B: Tensor, A: Tensor) -> Tensor:
    """B A by loops, each entry a correctly rounded sum."""
    rows = [[math.fsum(float(b) * float(a) for b, a in zip(row, column, strict=True))
             for column in A.T] for row in B]  # fmt: skip
    return torch.tensor(rows, dtype=torch.float64)


def head_products(W_O: Tensor, W_V: Tensor, heads: int, kv_heads: int) -> list[Tensor]:
    """W_O[:, h] W_V[g(h), :] for each query head h, [d, d], with g(h) found by counting."""
    width, found, group = W_O.shape[1] // heads, [], 0
    for h in range(heads):
        if h and h % (heads // kv_heads) == 0:
            group += 1
        out = W_O[:, h * width : (h + 1) * width]
        value = W_V[group * width : (group + 1) * width, :]
        found.append(product(out, value))
    return found


def effective_rank(sigma: list[float]) -> float:
    total = math.fsum(sigma)
    return math.exp(-math.fsum(s / total * math.log(s / total) for s in sigma if s > 0))


def stable_rank(sigma: list[float]) -> float:
    return math.fsum(s * s for s in sigma) / sigma[0] ** 2
