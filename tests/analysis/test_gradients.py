"""Gradients by dense weights, and LORO's errors of them against dense float64 forms."""

import pytest
import torch
from oracles import algebra
from torch import Tensor
from torch.linalg import norm

from peptrain.analysis.gradients import dense_gradients
from peptrain.methods.full import Full
from peptrain.ops.riemannian import approximation_errors
from peptrain.runs.build import plain_model
from peptrain.testing import bench, ids, small


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n, r, m", [(9, 3, 7), (7, 3, 9), (6, 6, 6)])
def test_errors_are_those_of_dense_directions(n: int, r: int, m: int) -> None:
    B, A, G = draw(n, r), draw(r, m, seed=1), draw(n, m, seed=2)
    Z = B @ B.T @ G + G @ A.T @ A
    scales = torch.linspace(0, 0.5, 20001, dtype=torch.float64)
    found = approximation_errors(B, A, G, 0.25)
    wanted = {
        "error_factors": norm(Z - G),
        "error_factors_scaled": min(norm(c * Z - G) for c in scales),
        "error_loro": norm(0.25 * Z - G),
        "error_tangent": norm(algebra.riemannian_gradient(B, A, G) - G),
    }
    for name, value in wanted.items():
        assert found[name] == pytest.approx((value / norm(G)).item(), rel=1e-6, abs=1e-12), name


def test_the_gradient_is_that_of_the_mean_loss_whatever_the_sequences() -> None:
    """Against a difference quotient of the loss over the batch as a whole."""
    model = plain_model(bench(small(Full)).config)
    batch = ids(0)
    found = dense_gradients(model, batch)
    name = "model.layers.0.mlp.down_proj.weight"
    weight = dict(model.named_parameters())[name]
    direction = draw(*weight.shape)

    def loss() -> float:
        with torch.no_grad():
            logits = model(input_ids=batch[:, :-1]).logits.double()
            flat = logits.flatten(0, 1), batch[:, 1:].flatten()
            return torch.nn.functional.cross_entropy(*flat).item()

    slope, size = 0.0, 1e-3
    for sign in (1, -1):
        with torch.no_grad():
            weight.add_(direction, alpha=sign * size)
            slope += sign * loss() / (2 * size)
            weight.sub_(direction, alpha=sign * size)
    assert slope == pytest.approx((found[name] * direction).sum().item(), rel=1e-3)
    assert all(p.grad is None for p in model.parameters())
