"""The slow trainer against torch's AdamW, the exact step by hand, and two invariances."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from . import algebra as al
from .curves import State, dense_state, sites, slow_curve, token_loss

ADAM: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "clip": 0.5}
LORO: dict[str, Any] = ADAM | {"clip": None, "exact_every": 3, "rank": 3, "width": 16}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config).double()


WINDOW = torch.randint(32, (4, 9), generator=torch.Generator().manual_seed(0))


def dense_start(model: LlamaForCausalLM) -> State:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def adapted_start(model: LlamaForCausalLM, method: str, r: int = 3) -> State:
    """Factors at every linear layer of the block, diagonals off 1 so that they are tested."""
    state = dense_start(model)
    for name in [x for x in state if x.endswith("proj.weight")]:
        (n, m), site = state[name].shape, name.removesuffix(".weight")
        if method == "bpt":
            state |= {f"{site}.U": torch.linalg.qr(draw(n, r))[0], f"{site}.V": draw(r, m) * 0}
            state |= {f"{site}.a": 1 + draw(n) / 10, f"{site}.b": 1 + draw(m, seed=1) / 10}
        else:
            state |= {f"{site}.B": draw(n, r) / 4, f"{site}.A": draw(r, m, seed=1) / 4}
            del state[name]
    return state


def test_the_full_curve_is_torch_adamw(model: LlamaForCausalLM) -> None:
    multipliers = [0.0, 0.5, *[1.0] * 8]
    start = dense_start(model)
    losses, final = slow_curve(model, "full", start, [WINDOW] * 10, multipliers=multipliers, **ADAM)
    assert losses[0] == losses[1] and losses[-1] < losses[2] < losses[1]
    adam = torch.optim.AdamW(model.parameters(), 0.01, (0.9, 0.99), 1e-6, 0.0)
    for expected, multiplier in zip(losses, multipliers, strict=True):
        adam.param_groups[0]["lr"] = 0.01 * multiplier
        loss = model(WINDOW, labels=WINDOW).loss
        assert loss.item() == pytest.approx(expected, abs=1e-6)  # HF's loss is float32
        adam.zero_grad()
        token_loss(model, dict(model.named_parameters()), WINDOW).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        adam.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), final[name], rtol=0, atol=1e-9)


def test_a_bpt_merge_keeps_the_loss_and_the_weight_frozen(model: LlamaForCausalLM) -> None:
    start, merges = adapted_start(model, "bpt"), list[tuple[str, int]]()

    def fresh(site: str, step: int) -> Tensor:
        merges.append((site, step))
        return torch.linalg.qr(draw(start[f"{site}.U"].shape[0], 3, seed=step))[0]

    def run(steps: int, merge_every: int) -> tuple[list[float], State]:
        options: dict[str, Any] = {"merge_every": merge_every, "fresh_U": fresh}
        windows, multipliers = [WINDOW] * steps, [1.0] * steps
        return slow_curve(model, "bpt", start, windows, multipliers=multipliers, **ADAM, **options)

    never, _ = run(6, 0)
    often, final = run(6, 3)
    assert {step for _, step in merges} == {3} and len(merges) == len(sites(start)) == 7
    assert often[:3] == never[:3] and often[3] == pytest.approx(never[3], abs=1e-12)
    assert often[4] != never[4] and often[-1] < often[0]
    last = token_loss(model, dense_state(run(3, 0)[1]), WINDOW).item()
    assert last == pytest.approx(often[3], abs=1e-12)
    site = sites(start)[0]
    assert not torch.equal(final[f"{site}.weight"], start[f"{site}.weight"])
    assert torch.equal(run(3, 3)[1][f"{site}.weight"], start[f"{site}.weight"])  # not at the last


@pytest.mark.parametrize("method", ["lowrank", "loro"])
def test_low_rank_curves_go_down_whatever_the_signs(model: LlamaForCausalLM, method: str) -> None:
    start, signs = adapted_start(model, method), torch.tensor([1.0, -1.0, -1.0])
    flipped = dict(start)
    for site in sites(start):
        flipped[f"{site}.B"] = start[f"{site}.B"] * signs
        flipped[f"{site}.A"] = start[f"{site}.A"] * signs[:, None]
    options = LORO if method == "loro" else ADAM
    runs = [
        slow_curve(model, method, state, [WINDOW] * 8, multipliers=[1.0] * 8, **options)[0]
        for state in (start, flipped)
    ]
    assert runs[0] == pytest.approx(runs[1], abs=1e-9) and runs[0][-1] < runs[0][0]


@pytest.mark.parametrize("direction", ["adam", "raw"])
def test_one_exact_step_is_the_dense_formula(model: LlamaForCausalLM, direction: str) -> None:
    start = adapted_start(model, "loro")
    once = LORO | {"exact_every": 1, "direction": direction}
    _, final = slow_curve(model, "loro", start, [WINDOW], multipliers=[1.0], **once)
    leaves = {name: x.clone().requires_grad_() for name, x in start.items()}
    token_loss(model, dense_state(leaves), WINDOW).backward()
    for site in sites(start):
        B, A = (start[f"{site}.{x}"] for x in "BA")
        G_B, G_A = (leaves[f"{site}.{x}"].grad for x in "BA")
        assert G_B is not None and G_A is not None
        lr_p = 0.01 * math.sqrt(0.01) / 0.1
        if direction == "adam":
            G_B, G_A = (0.1 * g / (0.1 * g.abs() + 1e-6) for g in (G_B, G_A))
        expected = al.loro_exact_directions(B, A, G_B, G_A, lr_p)
        result = final[f"{site}.B"] @ final[f"{site}.A"]
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
