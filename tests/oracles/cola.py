"""y = B silu(A x) + bias and its gradients by their formulas, in float64 and without autograd."""

from typing import NamedTuple

import numpy as np

Array = np.ndarray


class Pass(NamedTuple):
    y: Array
    dx: Array
    dA: Array
    dB: Array
    dbias: Array


def forward_backward(x: Array, A: Array, B: Array, bias: Array, dy: Array) -> Pass:
    """x: [tokens, m], A: [r, m], B: [n, r], bias: [n], dy: [tokens, n].

    With h = A x and s the logistic function, silu(h) = h s(h), whose derivative is
    s(h) + h s(h) (1 - s(h)).
    """
    tokens, (r, m), n = len(x), A.shape, len(B)
    y, dx = np.zeros((tokens, n)), np.zeros((tokens, m))
    dA, dB, dbias = np.zeros((r, m)), np.zeros((n, r)), np.zeros(n)
    for t in range(tokens):
        h = np.array([sum(A[k, j] * x[t, j] for j in range(m)) for k in range(r)])
        s = 1 / (1 + np.exp(-h))
        y[t] = [bias[i] + sum(B[i, k] * h[k] * s[k] for k in range(r)) for i in range(n)]
        for i in range(n):
            dbias[i] += dy[t, i]
            dB[i] += dy[t, i] * h * s
        for k in range(r):
            dz = sum(dy[t, i] * B[i, k] for i in range(n))
            dh = dz * (s[k] + h[k] * s[k] * (1 - s[k]))
            dA[k] += dh * x[t]
            dx[t] += dh * A[k]
    return Pass(y, dx, dA, dB, dbias)
