"""The oracles against each other, against torch and against the papers' numbers."""

import pytest
import torch
from torch import Tensor

from . import algebra as al


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loro_by_qr(B: Tensor, A: Tensor, G_B: Tensor, G_A: Tensor, lr: float) -> Tensor:
    """LORO's exact step as written: two QRs, two complements, the 2r x 2r core and its SVD."""
    r = B.shape[1]
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.T)
    X, Y = G_B @ torch.linalg.inv(R_A), G_A.T @ torch.linalg.inv(R_B)
    P_B, T_B = torch.linalg.qr(X - Q_B @ Q_B.T @ X)
    P_A, T_A = torch.linalg.qr(Y - Q_A @ Q_A.T @ Y)
    S = R_B @ R_A.T - lr * Y.T @ Q_A
    lower = torch.cat([-lr * T_B, torch.zeros(T_B.shape[0], T_A.shape[0], dtype=B.dtype)], 1)
    core = torch.cat([torch.cat([S, -lr * T_A.T], 1), lower], 0)
    U, sigma, Vt = torch.linalg.svd(core)
    left = torch.cat([Q_B, P_B], 1) @ U[:, :r]
    return left @ torch.diag(sigma[:r]) @ Vt[:r] @ torch.cat([Q_A, P_A], 1).T


@pytest.mark.parametrize("n, m, r", [(12, 9, 3), (9, 12, 3), (20, 7, 5), (7, 20, 5), (8, 8, 8)])
def test_the_exact_step_needs_no_qr(n: int, m: int, r: int) -> None:
    B, A, G = draw(n, r), draw(r, m, seed=1), draw(n, m, seed=2)
    D_B, D_A = draw(n, r, seed=3), draw(r, m, seed=4)
    dense = al.loro_exact_directions(B, A, D_B, D_A, 0.1)
    torch.testing.assert_close(dense, loro_by_qr(B, A, D_B, D_A, 0.1), rtol=0, atol=1e-11)
    raw = al.loro_exact_raw(B, A, G, 0.1)
    torch.testing.assert_close(raw, loro_by_qr(B, A, G @ A.T, B.T @ G, 0.1), rtol=0, atol=1e-11)
    new_b, new_a = al.factorised(dense, r)
    torch.testing.assert_close(new_b @ new_a, dense, rtol=0, atol=1e-12)


def test_the_riemannian_gradient_is_an_orthogonal_projection() -> None:
    B, A, G = draw(6, 2), draw(2, 5, seed=1), draw(6, 5, seed=2)
    P = al.riemannian_gradient(B, A, G)
    torch.testing.assert_close(al.riemannian_gradient(B, A, P), P)
    tangent = draw(6, 2, seed=3) @ A + B @ draw(2, 5, seed=4)
    assert abs(((G - P) * tangent).sum().item()) < 1e-12


def test_precond_step_moves_the_product_by_the_gradient_plus_both_projections() -> None:
    B, A, G, lr = draw(6, 2), draw(2, 5, seed=1), draw(6, 5, seed=2), 1e-6
    new_b, new_a = al.precond_step(B, A, G @ A.T, B.T @ G, lr, 0.0)
    both = B @ torch.linalg.pinv(B) @ G @ torch.linalg.pinv(A) @ A
    moved = (B @ A - new_b @ new_a) / lr
    torch.testing.assert_close(moved, al.riemannian_gradient(B, A, G) + both, rtol=0, atol=1e-4)


def test_adam_is_torch_adamw_and_the_loro_form_starts_at_one() -> None:
    weight = torch.nn.Parameter(torch.tensor([0.3], dtype=torch.float64))
    adam = torch.optim.AdamW([weight], lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.0)
    p, m, v = 0.3, 0.0, 0.0
    for k, g in enumerate((1.0, -2.0, 0.5, 0.0), start=1):
        weight.grad = torch.full_like(weight, g)
        adam.step()
        p, m, v = al.adam_update(p, g, m, v, k, 0.1, (0.8, 0.95), 1e-3)
        assert p == pytest.approx(weight.item(), abs=1e-14)
    q, m, v = 0.0, 0.0, 0.0
    for k in range(1, 6):
        q, m, v = al.adam_update(q, 1.0, m, v, k, 0.05, (0.9, 0.999), 0.0, "loro")
        assert q == pytest.approx(-0.05 * k)


def test_the_papers_schedules() -> None:
    jagged = al.relora_jagged(15000, 500, 5000, 100, 0.1)
    wrapped = al.with_restarts(al.warmup_cosine(15000, 500, 0.1), [10000, 5000], 100)
    printed = {250: 0.5, 500: 1.0, 2500: 0.958409, 5000: 0.0, 5050: 0.397203, 5100: 0.794406}
    for t, value in (printed | {7500: 0.574363, 14999: 0.1}).items():
        assert jagged(t) == pytest.approx(value, abs=1e-6)
    assert all(jagged(t) == pytest.approx(wrapped(t)) for t in range(15000))
    loro = al.loro_reference(20000, 2000, 500)
    first = {1: 0.001, 500: 0.0031702665, 501: 1e-8, 1000: 0.0053448823}
    for i, rate in (first | {2500: 0.0098464629, 4000: 0.0099999999, 20000: 0.0012716519}).items():
        assert 0.01 * loro(i - 1) == pytest.approx(rate, abs=1.01e-10)


# vocabulary, hidden, mlp, layers, heads, kv heads; full count; then (method, r, total, trainable)
COUNTS: dict[str, tuple[list[int], int, list[tuple[str, int, int, int]]]] = {
    "llama-60m": ([32000, 512, 1376, 8, 8, 8], 58_073_600,
                  [("lowrank", 128, 42_770_944, 42_770_944)]),
    "llama-130m": ([32000, 768, 2048, 12, 12, 12], 134_105_856,
                   [("loro", 256, 93_997_824, 93_997_824)]),
    "llama-1b": ([32000, 2048, 5461, 24, 32, 32], 1_339_082_752,
                 [("loro", 512, 609_310_720, 609_310_720)]),
    "pico-tiny": ([50304, 96, 384, 12, 12, 4], 11_282_784,
                  [("lora", 16, 11_682_144, 10_060_128), ("relora", 16, 11_682_144, 10_060_128)]),
    "qwen-100m": ([151936, 512, 2048, 8, 8, 2], 108_214_784, []),
    "qwen-1.5b": ([151936, 1536, 8960, 28, 12, 2], 1_543_714_304, []),
}  # fmt: skip


def arch(name: str) -> al.Arch:
    V, d, f, L, heads, kv = COUNTS[name][0]
    family, tied = ("qwen2", True) if name.startswith("qwen") else ("llama", False)
    return al.Arch(family=family, V=V, d=d, f=f, L=L, heads=heads, kv=kv, tied=tied)


def test_the_papers_parameter_counts() -> None:
    for name, (_, full, others) in COUNTS.items():
        assert al.parameter_count(arch(name), "full")[:2] == (full, full)
        for method, r, total, trainable in others:
            assert al.parameter_count(arch(name), method, r)[:2] == (total, trainable)
    bpt = {"qwen-100m": (128, 88.894, 17.85, 63.51), "qwen-1.5b": (256, 526.339, 65.90, 77.64)}
    for name, (r, millions, saved, saved_inside) in bpt.items():
        full, (_, trainable, embedding) = COUNTS[name][1], al.parameter_count(arch(name), "bpt", r)
        assert trainable / 1e6 == pytest.approx(millions, abs=5e-4)
        assert 100 * (1 - trainable / full) == pytest.approx(saved, abs=5e-3)
        inside = (trainable - embedding) / (full - embedding)
        assert 100 * (1 - inside) == pytest.approx(saved_inside, abs=5e-3)
