"""The slow trainer against torch's AdamW, the exact step by hand, and two invariances."""

import math
from collections.abc import Callable
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


class TorchReLoRA:
    """ReLoRA as a user of torch would write it: one AdamW, tensors changed in place, state popped.

    merges, resets: the completed steps after which each happens. The sites are all linear layers of
    the block but k and v."""

    def __init__(self, model: LlamaForCausalLM, trained_scale: bool, fresh: bool) -> None:
        self.model, self.trained_scale, self.fresh = model, trained_scale, fresh
        self.dense = {n: torch.nn.Parameter(x) for n, x in dense_start(model).items()}
        self.adapters: dict[str, dict[str, torch.nn.Parameter]] = {}
        self.adam = torch.optim.AdamW(self.dense.values(), 0.01, (0.9, 0.99), 1e-6, 0.0)

    def switch(self, step: int) -> None:
        if self.fresh:
            self.adam.state.clear()
        for site in SITES:
            W = self.dense[f"{site}.weight"].requires_grad_(False)
            tensors = {"B": torch.zeros(len(W), 3, dtype=W.dtype), "A": fresh_A(site, step)}
            tensors |= {"s": torch.tensor(2.0, dtype=W.dtype)} if self.trained_scale else {}
            self.adapters[site] = {x: torch.nn.Parameter(y) for x, y in tensors.items()}
            self.adam.add_param_group({"params": list(self.adapters[site].values())})

    def weights(self) -> State:
        weights: State = dict(self.dense)
        for site, x in self.adapters.items():
            weights[f"{site}.weight"] = (
                x["B"] @ x["A"] * x.get("s", 2.0) + weights[f"{site}.weight"]
            )
        return weights

    def step(self, window: Tensor, lr: float) -> float:
        self.adam.zero_grad()
        loss = token_loss(self.model, self.weights(), window)
        loss.backward()
        every = [p for group in self.adam.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_([p for p in every if p.grad is not None], 0.5)
        for group in self.adam.param_groups:
            group["lr"] = lr
        self.adam.step()
        return loss.item()

    @torch.no_grad()
    def merge(self, step: int) -> None:
        merged = self.weights()
        for site, x in self.adapters.items():
            self.dense[f"{site}.weight"].copy_(merged[f"{site}.weight"])
            x["A"].copy_(fresh_A(site, step))
            x["B"].zero_()
            if "s" in x:
                x["s"].fill_(2.0)

    def reset(self, how: str, letters: str) -> None:
        chosen = [p for x in self.adapters.values() for letter, p in x.items() if letter in letters]
        for p in chosen:
            if how == "zero":
                del self.adam.state[p]
            elif how == "half":
                m, v, k = (self.adam.state[p][x] for x in ("exp_avg", "exp_avg_sq", "step"))
                size = m.abs().flatten().sort(stable=True).indices[: round(0.5 * m.numel())]
                m.view(-1)[size], v.view(-1)[size] = 0.0, 0.0
                k.zero_()


SITES = [
    f"model.layers.0.{x}_proj"
    for x in ("self_attn.q", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
]
WINDOWS = torch.randint(32, (13, 2, 9), generator=torch.Generator().manual_seed(1))
JAGGED = [0.5, 1.0, 0.9, 0.8, 1.0, 0.7, 0.9, 0.6, 0.8, 0.5, 0.7, 0.4, 0.6]


def fresh_A(site: str, step: int) -> Tensor:
    m = 24 if site.endswith("down_proj") else 16
    return draw(3, m, seed=100 * step + SITES.index(site)) / 4


def half(name: str, done: int, m: Tensor, v: Tensor, k: int) -> tuple[Tensor, Tensor, int]:
    return al.reset_magnitude(m, v, 0.5)


ALL = {"merge_every": 3}
# options; the steps of a run of 13 after which it merges, and resets
RELORA: dict[str, tuple[str, dict[str, Any], list[int], list[int]]] = {
    "lora": ("lora", {}, [], []),
    "lora, warm start": ("lora", {"warm": 4}, [], []),
    "relora": ("relora", ALL, [3, 6, 9, 12], [3, 6, 9, 12]),
    "warm start": ("relora", ALL | {"warm": 4}, [6, 9, 12], [6, 9, 12]),
    "switch at a multiple": ("relora", ALL | {"warm": 6}, [9, 12], [9, 12]),
    "never after the last": ("relora", {"merge_every": 13, "reset_every": 13}, [], []),
    "fresh": ("relora", ALL | {"warm": 4, "fresh": True}, [6, 9, 12], [6, 9, 12]),
    "online": (
        "relora",
        {"merge_every": 2, "reset_every": 6, "warm": 2},
        [4, 6, 8, 10, 12],
        [6, 12],
    ),
    "reset alone": ("relora", {"merge_every": 4, "reset_every": 6}, [4, 8, 12], [6, 12]),
    "merge alone": ("relora", {"merge_every": 4, "reset_every": 0}, [4, 8, 12], []),
    "keep": ("relora", ALL | {"reset": "keep"}, [3, 6, 9, 12], []),
    "A": ("relora", ALL | {"reset_factors": "A"}, [3, 6, 9, 12], [3, 6, 9, 12]),
    "magnitude": ("relora", ALL | {"reset": half}, [3, 6, 9, 12], [3, 6, 9, 12]),
    "trained scale": ("relora", {"merge_every": 5, "trained_scale": True}, [5, 10], [5, 10]),
    "trained scale, online, warm start": (
        "relora",
        {"merge_every": 2, "reset_every": 6, "warm": 5, "trained_scale": True},
        [6, 8, 10, 12],
        [6, 12],
    ),
}


@pytest.mark.parametrize("case", RELORA)
def test_lora_and_relora_are_torch_adamw(model: LlamaForCausalLM, case: str) -> None:
    method, options, merges, resets = RELORA[case]
    warm, trained = options.get("warm", 0), options.get("trained_scale", False)
    start, drawn = dense_start(model), list[tuple[str, int]]()

    def recorded(site: str, step: int) -> Tensor:
        drawn.append((site, step))
        return fresh_A(site, step)

    if not warm:
        for site in SITES:
            start[f"{site}.A"], n = fresh_A(site, 0), len(start[f"{site}.weight"])
            start[f"{site}.B"] = torch.zeros(n, 3, dtype=torch.float64)
            start |= {f"{site}.s": torch.tensor(2.0)} if trained else {}
    losses, final = slow_curve(
        model,
        method,
        start,
        list(WINDOWS),
        multipliers=JAGGED,
        **ADAM,
        **{"scale": 2.0, "fresh_A": recorded, "warm_lr": 0.003, "adapted": SITES} | options,
    )
    torch_run = TorchReLoRA(model, trained, options.get("fresh", False))
    how = "half" if callable(options.get("reset")) else "zero"
    for t, loss in enumerate(losses):
        if t == warm:
            torch_run.switch(t)
        lr = JAGGED[t] * (0.01 if t >= warm else 0.003)
        assert torch_run.step(WINDOWS[t], lr) == pytest.approx(loss, abs=1e-9)
        if t + 1 in merges:
            torch_run.merge(t + 1)
        if t + 1 in resets:
            torch_run.reset(how, options.get("reset_factors", "BAs"))
    assert set(sites(final)) == set(SITES) == set(torch_run.adapters)
    assert drawn == [(site, step) for step in [warm] * (warm > 0) + merges for site in SITES]
    dense = dense_state(final, 2.0)
    for name, x in torch_run.weights().items():
        torch.testing.assert_close(dense[name], x.detach(), rtol=0, atol=1e-9)
        moved = (x - model.get_parameter(name)).abs().max().item()
        assert moved > 1e-3, f"{name} did not train"


def test_relora_merges_keep_the_loss_and_w_moves_only_in_them(model: LlamaForCausalLM) -> None:
    site = SITES[-1]

    def run(steps: int, merge_every: int, warm: int = 2) -> tuple[list[float], State]:
        options: dict[str, Any] = {"scale": 2.0, "warm_lr": 0.003, "adapted": SITES}
        options |= {"merge_every": merge_every, "warm": warm, "fresh_A": fresh_A}
        windows, flat = [WINDOW] * steps, [1.0] * steps
        return slow_curve(
            model, "relora", dense_start(model), windows, multipliers=flat, **ADAM, **options
        )

    never, without = run(6, 0)
    often, final = run(6, 4)
    assert often[:4] == never[:4] and often[4] == pytest.approx(never[4], abs=1e-12)
    assert often[5] != never[5] and often[5] < often[4]
    at_switch, switched = run(2, 0, warm=2)  # as long as the run: the switch never comes
    assert at_switch == never[:2] and not sites(switched)
    assert never[2] == token_loss(model, switched, WINDOW).item()  # B = 0
    assert torch.equal(without[f"{site}.weight"], switched[f"{site}.weight"])
    assert not torch.equal(final[f"{site}.weight"], switched[f"{site}.weight"])
    assert torch.equal(
        run(4, 4)[1][f"{site}.weight"], switched[f"{site}.weight"]
    )  # not at the last


def test_a_wrong_start_is_refused(model: LlamaForCausalLM) -> None:
    adapted = dense_start(model) | {f"{SITES[0]}.A": draw(3, 16), f"{SITES[0]}.B": draw(16, 3)}
    run: Callable[..., Any] = slow_curve
    for options, why in (({"warm": 1, "scale": 2.0}, "no factors"), ({}, "no scale")):
        with pytest.raises(ValueError, match=why):
            run(model, "lora", adapted, [WINDOW], multipliers=[1.0], **ADAM, **options)
