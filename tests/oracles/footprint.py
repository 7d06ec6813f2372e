"""Bytes and operations by arithmetic, for full, bpt, lora, relora, lowrank and loro."""

from collections.abc import Iterator

from .algebra import Arch, parameter_count

Split = dict[str, float]
"""FLOPs per token: dense, low_rank, attention, head."""


def matrices(arch: Arch, method: str, r: int) -> Iterator[tuple[int, int, bool]]:
    """n, m and whether it is adapted, of the seven in a layer."""
    d, f = arch["d"], arch["f"]
    kv = d // arch["heads"] * arch["kv"]
    for n, m in ((d, d), (kv, d), (kv, d), (d, d), (f, d), (f, d), (d, f)):
        cost = r * (n + m) + (n + m if method == "bpt" else 0)
        yield n, m, method != "full" and cost < n * m


def static_bytes(arch: Arch, method: str, r: int, size: int) -> tuple[int, int, int]:
    """Weights, gradients and moments at `size` bytes a number; a, b of bpt have at least four."""
    counts = parameter_count(arch, method, r)
    diagonals = sum(n + m for n, m, adapted in matrices(arch, method, r) if adapted)
    wider = arch["L"] * diagonals * (max(size, 4) - size) if method == "bpt" else 0
    gradients = counts.trainable * size + wider
    return counts.total * size + wider, gradients, 2 * gradients


def paper_bytes(arch: Arch, method: str, r: int) -> int:
    """bf16 weights and two bf16 moments of what is trained."""
    counts = parameter_count(arch, method, r)
    return 2 * counts.total + 4 * counts.trainable


def flops(arch: Arch, method: str, r: int, length: int, tokens: int) -> tuple[Split, Split]:
    """Of a forward pass, and of forward and backward, for sequences of `length`, `tokens` at once.

    A product of [T, n] with [n, m] is 2nm a token. y = xWᵀ has two more of its size in the backward
    pass, for dx and dW. Around a frozen W there is no dW; W + BA is formed twice, 2nmr each time
    for all tokens; dB = dyᵀ(xAᵀ) and dA = (dyB)ᵀx take 2r(n + m) each. Attention is two products
    with L x L scores a head, then, with the scores once more, five.
    """
    forward = {"dense": 0.0, "low_rank": 0.0}
    training = dict(forward)
    for n, m, adapted in matrices(arch, method, r):
        if not adapted:
            forward["dense"] += 2 * n * m
            training["dense"] += 6 * n * m
        elif method in ("lowrank", "loro"):
            forward["low_rank"] += 2 * r * (n + m)
            training["low_rank"] += 6 * r * (n + m)
        else:
            forward["dense"] += 2 * n * m
            forward["low_rank"] += 2 * n * m * r / tokens
            training["dense"] += 4 * n * m
            training["low_rank"] += 4 * n * m * r / tokens + 4 * r * (n + m)
    V, d, L = arch["V"], arch["d"], arch["L"]
    forward, training = ({k: L * v for k, v in each.items()} for each in (forward, training))
    beside = {"attention": 4.0 * L * length * d, "head": 2.0 * V * d}
    return forward | beside, training | {
        "attention": 3.5 * beside["attention"],
        "head": 3 * beside["head"],
    }
