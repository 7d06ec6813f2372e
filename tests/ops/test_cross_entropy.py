"""The chunked cross-entropy of an output head, against the plain form in float64."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from byhand import seeded
from support import tiny
from torch import Tensor, nn

from peptrain.config import resolved
from peptrain.estimation.dry_run import fake_tensors
from peptrain.execution.loss import NextTokenLoss, has_plain_head, token_loss
from peptrain.ops.cross_entropy import Scale, linear_cross_entropy, scale_
from peptrain.runs.build import plain_model
from peptrain.testing import MODEL

SHAPES = [(7, 5, 3), (64, 31, 8), (33, 16, 4), (1, 2, 1), (50, 257, 16)]
"""Tokens, vocabulary, width."""
CHUNKS = [None, 100, 1]
"""Logits at once: all of them, several chunks whose last is short, one token."""


def tensors(T: int, V: int, d: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """x, W, bias, which ask for gradients, and targets."""
    draw = seeded(T + V + d)
    shapes = ((T, d), (V, d), (V,))
    made = (torch.randn(s, generator=draw, dtype=torch.float64) for s in shapes)
    leaves = tuple(t.to(dtype).requires_grad_() for t in made)
    return (*leaves, torch.randint(V, (T,), generator=draw))


def plain(x: Tensor, W: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    wide = [None if t is None else t.double() for t in (x, W, bias)]
    return F.cross_entropy(F.linear(*wide), targets)  # type: ignore[arg-type]


def chunked(
    x: Tensor, W: Tensor, bias: Tensor | None, targets: Tensor, limit: int | None
) -> Tensor:
    return linear_cross_entropy(x, W, targets, bias, **({"limit": limit} if limit else {}))


def gradients(loss: Tensor, leaves: list[Tensor], upstream: float = 1.0) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves, torch.full_like(loss, upstream)))


def assert_near(found: Tensor, wanted: Tensor, relative: float) -> None:
    size = wanted.double().abs().max().item()
    torch.testing.assert_close(found.double(), wanted.double(), rtol=0, atol=relative * size)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("limit", CHUNKS)
@pytest.mark.parametrize("T, V, d", SHAPES)
def test_loss_and_gradients_are_those_of_the_plain_form(
    T: int, V: int, d: int, limit: int | None, biased: bool
) -> None:
    x, W, bias, targets = tensors(T, V, d)
    leaves = [x, W, bias] if biased else [x, W]
    given = (x, W, bias if biased else None, targets)
    loss, wanted = chunked(*given, limit), plain(*given)
    assert_near(loss, wanted, 1e-13)
    for one, other in zip(
        gradients(loss, leaves, 2.5), gradients(wanted, leaves, 2.5), strict=True
    ):
        assert_near(one, other, 1e-12)
    with torch.no_grad():
        assert_near(chunked(*given, limit), wanted, 1e-13)


@pytest.mark.parametrize("limit", CHUNKS)
@pytest.mark.parametrize("T, V, d", SHAPES)
def test_gradients_agree_with_finite_differences(T: int, V: int, d: int, limit: int | None) -> None:
    """Along a random direction; autograd's own check would go back twice."""
    x, W, bias, targets = tensors(T, V, d)
    leaves = [x, W, bias]
    directions = [torch.randn(t.shape, generator=seeded(i)).double() for i, t in enumerate(leaves)]

    def at(h: float) -> Tensor:
        moved = (t.detach() + h * u for t, u in zip(leaves, directions, strict=True))
        return chunked(*moved, targets, limit)  # type: ignore[call-arg]

    h = 1e-5
    slope = (at(h) - at(-h)) / (2 * h)
    found = gradients(chunked(x, W, bias, targets, limit), leaves)
    along = sum((g * u).sum() for g, u in zip(found, directions, strict=True))
    torch.testing.assert_close(along, slope, rtol=1e-7, atol=1e-8)


PRECISIONS = {"fp32": (torch.float32, False), "bf16": (torch.bfloat16, False)}
PRECISIONS |= {"autocast": (torch.float32, True)}


@pytest.mark.parametrize("limit", [None, 4096])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_it_is_as_exact_as_the_plain_form(precision: str, limit: int | None) -> None:
    """Its error against float64 is that of the plain form in the same precision, or smaller; over
    chunks a bf16 weight's gradient is rounded more often."""
    dtype, autocast = PRECISIONS[precision]
    x, W, bias, targets = tensors(300, 257, 32, dtype)
    leaves = [x, W, bias]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        usual = token_loss(F.linear(x, W, bias)[None], targets[None])
        loss = chunked(x, W, bias, targets, limit)
    exact = plain(x, W, bias, targets)
    assert loss.dtype == usual.dtype == torch.float32
    found = [loss, *gradients(loss, leaves)]
    usually = [usual, *gradients(usual, leaves)]
    wanted = [exact, *gradients(exact, leaves)]
    eps = torch.finfo(torch.float32 if precision == "fp32" else torch.bfloat16).eps
    for one, other, right in zip(found, usually, wanted, strict=True):
        assert one.dtype == other.dtype
        ours, theirs = ((t.double() - right.double()).norm().item() for t in (one, other))
        assert ours <= 3 * theirs + eps / 8 * right.double().norm().item()


def test_a_target_whose_probability_is_none_has_its_loss_and_gradient() -> None:
    """exp(-120) is 0 in fp32."""
    W = torch.tensor([[1.0], [-1.0]])
    x = torch.tensor([[-60.0]], requires_grad=True)
    loss = linear_cross_entropy(x, W, torch.tensor([0]))
    assert (loss.item(), gradients(loss, [x])[0].item()) == (120, -2)


def test_what_is_frozen_gets_no_gradient() -> None:
    x, W, bias, targets = tensors(9, 5, 3)
    wanted = plain(x, W, bias, targets)
    for frozen in (x, W):
        (free,) = (t for t in (x, W) if t is not frozen)
        given = [t.detach() if t is frozen else t for t in (x, W)]
        loss = linear_cross_entropy(*given, targets, bias.detach(), limit=20)
        (found,) = torch.autograd.grad(loss, free)
        (right,) = torch.autograd.grad(wanted, free, retain_graph=True)
        assert_near(found, right, 1e-12)
    assert not linear_cross_entropy(x.detach(), W.detach(), targets).requires_grad


@pytest.mark.parametrize("scale", [scale_, torch.compile(scale_, backend="aot_eager")])
def test_going_back_twice_is_an_error(scale: Scale) -> None:
    x, W, _, targets = tensors(9, 5, 3)
    loss = linear_cross_entropy(x, W, targets, scale=scale)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements that any result had."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = [t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
        self.size = max(self.size, *found, 0)
        return out


@pytest.mark.parametrize("grad", [True, False])
def test_no_more_than_the_limit_is_ever_in_memory(grad: bool) -> None:
    x, W, _, targets = tensors(1000, 64, 4)
    with Largest() as seen, torch.set_grad_enabled(grad):
        loss = linear_cross_entropy(x, W, targets, limit=5000)
        if grad:
            loss.backward()
    assert seen.size == 64 * 64  # tokens of a chunk are a power of two


# In a model.


def config_json(folder: Path, **given: Any) -> dict[str, Any]:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 320}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    (folder / "config.json").write_text(json.dumps({**sizes, **heads, **given}))
    return {**dict.fromkeys(MODEL), "config": folder}


def model_of(model: dict[str, Any], precision: str = "fp64") -> Any:
    config = tiny("full", Path("unused"), model=model, train={"precision": precision})
    return plain_model(resolved(config, world_size=1, on_gpu=False))


def windows() -> Tensor:
    return torch.randint(320, (3, 17), generator=seeded(5))


@pytest.mark.parametrize("model", [{}, {"tied": True}, {"family": "qwen2"}, {"family": "olmo2"}])
def test_a_model_has_the_loss_and_gradients_of_its_logits(model: dict[str, Any]) -> None:
    built = model_of(model)
    assert has_plain_head(built)
    loss = NextTokenLoss(built)(windows())
    wanted = token_loss(built(input_ids=windows()[:, :-1]).logits, windows()[:, 1:])
    assert_near(loss, wanted, 1e-12)
    parameters = list(built.parameters())
    for one, other in zip(gradients(loss, parameters), gradients(wanted, parameters), strict=True):
        assert_near(one, other, 1e-10)


CHANGED = [
    {"model_type": "gemma2"},
    {"model_type": "gemma2", "final_logit_softcapping": 1e3},
    {"model_type": "granite", "logits_scaling": 1.01},
    {"model_type": "cohere", "logit_scale": 0.0625},
]
UNCHANGED = [
    {"model_type": "gemma2", "final_logit_softcapping": None},
    {"model_type": "granite", "embedding_multiplier": 3.0},
    {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2},
    {"model_type": "gpt_neox"},
    {"model_type": "phi"},
]


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
@pytest.mark.parametrize("given", CHANGED)
def test_a_model_that_changes_its_logits_keeps_the_plain_form(
    given: dict[str, Any], precision: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    built = model_of(config_json(tmp_path, **given), precision)
    with caplog.at_level("INFO", "peptrain"):
        loss = NextTokenLoss(built.eval())
    (said,) = [r.message for r in caplog.records if r.name == "peptrain"]
    assert "changes its head's logits" in said
    wanted = token_loss(built(input_ids=windows()[:, :-1]).logits, windows()[:, 1:])
    assert torch.equal(loss(windows()), wanted)


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
@pytest.mark.parametrize("given", UNCHANGED)
def test_other_architectures_with_a_plain_head_are_found(
    given: dict[str, Any], precision: str, tmp_path: Path
) -> None:
    built = model_of(config_json(tmp_path, **given), precision).train()
    state = torch.get_rng_state()
    assert has_plain_head(built)
    assert torch.equal(state, torch.get_rng_state()) and built.training
    assert not built.get_output_embeddings()._forward_hooks
    loss = NextTokenLoss(built.eval())(windows())
    wanted = token_loss(built(input_ids=windows()[:, :-1]).logits, windows()[:, 1:])
    torch.testing.assert_close(loss, wanted, rtol=1e-3 if precision == "bf16" else 1e-12, atol=0)


@pytest.mark.parametrize("given", CHANGED + UNCHANGED)
def test_without_numbers_a_head_is_known_by_what_is_computed(
    given: dict[str, Any], tmp_path: Path
) -> None:
    """Granite divides by a scale of 1 too, which takes numbers to see."""
    with fake_tensors():
        found = has_plain_head(model_of(config_json(tmp_path, **given)).train())
    assert found == (given in UNCHANGED and given["model_type"] != "granite")


class Halved(nn.Module):
    """A decoder that gives its head half of what it returns itself."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.base_model, self.head, self.device = model.base_model, model.lm_head, model.device

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, **given: Any) -> Any:
        out = self.base_model(**given)
        out.logits = self.head(out.last_hidden_state / 2)
        return out


def test_a_scale_before_the_head_is_seen() -> None:
    assert has_plain_head(model_of({}))
    assert not has_plain_head(Halved(model_of({}, "bf16")))  # type: ignore[arg-type]
    with fake_tensors():
        assert not has_plain_head(Halved(model_of({})))  # type: ignore[arg-type]
