"""Low-rank maps without gradients, in Triton's interpreter, against plain PyTorch in float64."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
)

pytest.importorskip("triton")

from peptrain.adaptation import adapt
from peptrain.execution.attention import WHOLE_WINDOWS, attend_without_masks
from peptrain.kernels import llama_layer as fused_layer
from peptrain.kernels import lowrank as fused_lowrank
from peptrain.kernels import swiglu_mlp as fused_mlp
from peptrain.kernels.attention import LONGEST, fits_short, short_attention
from peptrain.kernels.llama_layer import LowRankLayer
from peptrain.kernels.lowrank import Factors, Norm
from peptrain.methods import LowRank
from peptrain.models.dense import densify

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUICK = settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])
"""No shrinking: the interpreter is slow."""
Rank = st.sampled_from([8, 24, 64, 72])
Tokens, Seed = st.integers(1, 300), st.integers(0, 99)
Width = st.sampled_from([8, 64, 136, 200])
Narrow = st.sampled_from([torch.bfloat16, torch.float16])


class Draw:
    """Numbers that `dtype` has, as fp64 for the oracle and as themselves."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.generator, self.dtype = torch.Generator().manual_seed(seed), dtype

    def __call__(self, *shape: int, scale: float = 1.0, around: float = 0.0) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return (around + scale * drawn).to(self.dtype).double()

    def factors(self, n: int, m: int, r: int) -> Factors:
        return self(n, r, scale=r**-0.5), self(r, m, scale=m**-0.5)

    def narrow(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.to(DEVICE, self.dtype) for t in tensors)


def assert_near(found: Tensor, wanted: Tensor, error: float = 0.02) -> None:
    found, wanted = (t.double().cpu() for t in (found, wanted))
    assert (found - wanted).norm() <= error * wanted.norm()


def mapped(x: Tensor, factors: Factors) -> Tensor:
    return x @ factors[1].mT @ factors[0].mT


def swiglu(x: Tensor, gate: Factors, up: Factors, down: Factors) -> Tensor:
    return mapped(F.silu(mapped(x, gate)) * mapped(x, up), down)


def normed(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w


@QUICK
@given(T=Tokens, d=st.integers(8, 150), f=st.integers(8, 150), r=Rank, dtype=Narrow, seed=Seed)
def test_an_mlp(T: int, d: int, f: int, r: int, dtype: torch.dtype, seed: int) -> None:
    draw = Draw(seed, dtype)
    x, maps = draw(T, d), [draw.factors(n, m, r) for n, m in ((f, d), (f, d), (d, f))]
    found = fused_lowrank.lowrank_mlp(*draw.narrow(x), *(draw.narrow(*pair) for pair in maps))
    assert_near(found, swiglu(x, *maps))


@QUICK
@given(T=Tokens, d=Width, f=st.integers(8, 150), r=Rank, seed=Seed)
def test_a_normed_mlp_with_its_residual(T: int, d: int, f: int, r: int, seed: int) -> None:
    draw = Draw(seed)
    x, w = draw(T, d), draw(d, scale=0.2, around=1.0)
    maps = [draw.factors(n, m, r) for n, m in ((f, d), (f, d), (d, f))]
    narrow_x, narrow_w = draw.narrow(x, w)
    found = fused_lowrank.added_normed_mlp(
        narrow_x, x.square().mean(-1).to(DEVICE, torch.float32), Norm(narrow_w, 1e-2),
        *(draw.narrow(*pair) for pair in maps),
    )  # fmt: skip
    assert_near(found, x + swiglu(normed(x, w, 1e-2), *maps))


@QUICK
@given(T=Tokens, n=Width, m=st.integers(8, 150), r=Rank, seed=Seed)
def test_a_map_with_its_residual(T: int, n: int, m: int, r: int, seed: int) -> None:
    draw = Draw(seed)
    x, h, factors = draw(T, n), draw(T, m), draw.factors(n, m, r)
    found, mean = fused_lowrank.added_linear(*draw.narrow(x, h), draw.narrow(*factors))
    wanted = x + mapped(h, factors)
    assert_near(found, wanted)
    assert_near(mean, wanted.square().mean(-1))


@QUICK
@given(
    rows=st.integers(1, 3), L=st.integers(1, 150), d=Width, D=st.sampled_from([16, 64, 128]),
    kv=st.integers(1, 2), r=Rank, angles_of_rows=st.booleans(), seed=Seed,
)  # fmt: skip
def test_rotated_q_k_v(
    rows: int, L: int, d: int, D: int, kv: int, r: int, angles_of_rows: bool, seed: int
) -> None:
    """Against Hugging Face's rotation; the order of columns may differ, the same in q and k."""
    draw = Draw(seed)
    sizes = (256, 128 * kv, 128 * kv)
    x, w = draw(rows * L, d), draw(d, scale=0.2, around=1.0)
    maps = [draw.factors(n, d, r) for n in sizes]
    angle = torch.rand(rows if angles_of_rows else 1, L, D // 2, generator=draw.generator) * 6
    cos, sin = ((f(angle).repeat(1, 1, 2)).bfloat16().double() for f in (torch.cos, torch.sin))
    flat = (t.reshape(-1, D) for t in draw.narrow(cos, sin))
    narrow_x, narrow_w = draw.narrow(x, w)
    found = fused_lowrank.rotated_qkv(
        narrow_x, Norm(narrow_w, 1e-2), *(draw.narrow(*pair) for pair in maps), *flat
    )
    q, k, v = (
        mapped(normed(x, w, 1e-2), pair).view(rows, L, -1, D).transpose(1, 2) for pair in maps
    )
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    order = torch.arange(D).view(2, -1).T.reshape(-1)
    for one, other in zip(found, (q[..., order], k[..., order], v), strict=True):
        assert_near(one, other.transpose(1, 2).reshape(one.shape))


@QUICK
@given(
    rows=st.integers(1, 3), L=st.integers(1, LONGEST), kv=st.integers(1, 2), g=st.integers(1, 3),
    D=st.sampled_from([8, 24, 64, 128]), dtype=Narrow, strided=st.booleans(), seed=Seed,
)  # fmt: skip
def test_short_attention(
    rows: int, L: int, kv: int, g: int, D: int, dtype: torch.dtype, strided: bool, seed: int
) -> None:
    draw = Draw(seed, dtype)
    q, k, v = (draw(rows, h, L, D) for h in (kv * g, kv, kv))
    given_ = draw.narrow(q, k, v)
    if strided:
        given_ = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in given_)
    with torch.no_grad():
        assert fits_short(*given_)
        found = short_attention(*given_, 0.3)
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
    assert_near(found, wanted.transpose(1, 2))


def test_short_attention_is_for_short_windows_without_gradients() -> None:
    def fits(L: int, keys: int | None = None, dtype: torch.dtype = torch.bfloat16) -> bool:
        q, k = (torch.zeros(1, 2, n, 16, device=DEVICE, dtype=dtype) for n in (L, keys or L))
        return fits_short(q, k, k)

    with torch.no_grad():
        assert fits(LONGEST)
        assert not fits(LONGEST + 1)
        assert not fits(1, keys=9)  # a cache
        assert not fits(8, dtype=torch.float32)
    assert not fits(LONGEST)


@pytest.mark.parametrize(
    "own, short",
    [
        ({}, True),
        ({"dropout": 0.5}, False),
        ({"is_causal": False}, False),
        ({"attention_mask": torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16)}, False),
    ],
)
@torch.no_grad()
def test_what_asks_for_more_is_not_short_attention(
    own: dict[str, Any], short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Tensor] = []

    def counting(q: Tensor, *rest: Any) -> Tensor:
        calls.append(q)
        return short_attention(q, *rest)

    model = llama().bfloat16()
    assert attend_without_masks(model, 4)
    monkeypatch.setattr("peptrain.kernels.attention.short_attention", counting)
    q = Draw(0)(1, 2, 4, 16).bfloat16().to(DEVICE)
    on_device = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in own.items()}
    settings_ = {"attention_mask": None, **on_device}
    attend = ALL_ATTENTION_FUNCTIONS[WHOLE_WINDOWS]
    attend(model.model.layers[0].self_attn, q, q, q, **settings_)
    assert len(calls) == short


def llama(**own: Any) -> LlamaForCausalLM:
    """In fp32, its norms' weights not all one."""
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 72, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, **own))
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The inputs of every rotated_qkv."""
    seen: list[Tensor] = []

    def counting(x: Tensor, *rest: Any) -> Any:
        seen.append(x)
        return fused_lowrank.rotated_qkv(x, *rest)

    monkeypatch.setattr(fused_layer, "rotated_qkv", counting)
    return seen


@pytest.mark.parametrize("own", [{}, {"head_dim": 64, "num_key_value_heads": 2}])
@pytest.mark.parametrize("masks", [True, False])
@torch.no_grad()
def test_a_llama_of_low_rank_maps(own: dict[str, Any], masks: bool, calls: list[Tensor]) -> None:
    model, method = llama(**own).to(DEVICE), LowRank(rank=8)
    adapt(model, method, steps=10)
    model.bfloat16()
    ids = torch.randint(64, (3, 20), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    exact = llama(**own)
    adapt(exact, method, steps=10)
    exact.double().load_state_dict(model.state_dict())
    wanted = exact(ids.cpu(), use_cache=False).logits
    written = {name: p.clone() for name, p in model.named_parameters()}
    method.fuse(model)
    if not masks:
        assert attend_without_masks(model, 20)
    calls.clear()
    found = model(ids, use_cache=False).logits
    assert len(calls) == 2
    assert_near(found, wanted)
    padded = torch.ones_like(ids)
    padded[0, :7] = 0
    if masks:
        found = model(ids, padded, use_cache=False).logits
        assert len(calls) == 4
        assert_near(found[0, 7:], exact(ids.cpu(), padded.cpu()).logits[0, 7:])
    for name, p in model.named_parameters():
        assert torch.equal(p, written[name])


@pytest.mark.parametrize(
    "gradients, length",
    [
        pytest.param(True, 8, marks=pytest.mark.slow),
        (True, LONGEST + 1),
        (False, 8),
        pytest.param(False, LONGEST + 1, marks=pytest.mark.slow),
    ],
)
def test_a_layer_is_one_graph(length: int, gradients: bool) -> None:
    """Whatever the compiler can't follow, in the layer or in attention, would be an error."""
    model, method = llama().to(DEVICE), LowRank(rank=8)
    adapt(model, method, steps=10)
    model.bfloat16()
    method.fuse(model)
    assert attend_without_masks(model, length)
    ids = torch.arange(length, device=DEVICE)[None] % 64
    with torch.set_grad_enabled(gradients):
        wanted = model(ids, use_cache=False).logits
        torch._dynamo.reset()
        for layer in model.model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
        assert_near(model(ids, use_cache=False).logits.detach(), wanted.detach())


def test_a_layer_is_plain_where_it_must_be(calls: list[Tensor]) -> None:
    """With gradients, with a cache, in another dtype, with attention that isn't fused."""
    model, method = llama().to(DEVICE), LowRank(rank=8)
    adapt(model, method, steps=10)
    plain = model.state_dict()
    method.fuse(model)
    assert all(isinstance(layer, LowRankLayer) for layer in model.model.layers)
    assert model.state_dict().keys() == plain.keys()
    ids = torch.arange(12, device=DEVICE)[None]
    with torch.no_grad():
        model(ids, use_cache=False)
        model.bfloat16()
        model(ids, use_cache=True)
        assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 15)
        model.set_attn_implementation("eager")
        model(ids, use_cache=False)
        model.set_attn_implementation("sdpa")
    model(ids, use_cache=False).logits.sum().backward()
    assert calls == []
    with torch.no_grad():
        model(ids, use_cache=False)
    assert len(calls) == 2


def accelerated(**own: Any) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A plain model of low-rank maps in bf16, and one of the same weights with fused layers."""
    model, method = llama(**own), LowRank(rank=8)
    adapt(model, method, steps=10)
    fused = copy.deepcopy(model.bfloat16())
    method.fuse(fused)
    return model.to(DEVICE), fused.to(DEVICE)


@torch.no_grad()
def test_attention_is_told_what_the_plain_layer_tells_it(calls: list[Tensor]) -> None:
    """By position_ids flash attention sees where texts begin that share a window."""
    seen = []

    def spy(module: nn.Module, *tensors: Any, **own: Any) -> Any:
        seen.append(own)
        return sdpa_attention_forward(module, *tensors, **own)

    AttentionInterface.register("spy", spy)
    ids = torch.arange(12, device=DEVICE)[None]
    positions = torch.arange(12, device=DEVICE)[None] % 7
    for model in accelerated(attention_dropout=0.5):
        model.set_attn_implementation("spy")
        for mode in (True, False):
            model.train(mode)
            model(ids, position_ids=positions, use_cache=False)
    assert len(calls) == 4
    wanted, found = seen[:4], seen[4:]
    assert [own["dropout"] for own in wanted] == [0.5, 0.5, 0.0, 0.0]
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one.pop("position_ids"), other.pop("position_ids"))
        assert one == other


@torch.no_grad()
def test_a_densified_layer_is_plain(calls: list[Tensor]) -> None:
    model, fused = accelerated()
    ids = torch.arange(12, device=DEVICE)[None]
    densify(fused.model.layers[0])
    assert_near(fused(ids, use_cache=False).logits, model(ids, use_cache=False).logits.cpu())
    assert len(calls) == 1


@torch.no_grad()
def test_a_layer_is_plain_where_autocast_is_not_in_its_dtype(calls: list[Tensor]) -> None:
    model, fused = accelerated()
    ids = torch.arange(12, device=DEVICE)[None]
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast(DEVICE, dtype):
            found, wanted = (m(ids, use_cache=False).logits for m in (fused, model))
        assert found.dtype == dtype
        assert_near(found, wanted.cpu())
    assert len(calls) == 2


def test_other_layers_keep_their_forward_pass() -> None:
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 72, "num_hidden_layers": 1}
    qwen = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4))
    changed, attending = llama(), llama()
    for layer in changed.model.layers:
        layer.mlp.act_fn = nn.GELU()
    for layer in attending.model.layers:
        layer.self_attn.__class__ = type("Attention", (LlamaAttention,), {})
    biased, gelu = llama(attention_bias=True), llama(hidden_act="gelu")
    for model in (qwen, biased, gelu, changed, attending):
        method = LowRank(rank=8)
        adapt(model, method, steps=10)
        method.fuse(model)
        assert not any(isinstance(module, LowRankLayer) for module in model.modules())


class MLP(nn.Module):
    def __init__(self, around: Callable[..., Tensor]) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(32, 40, bias=False) for _ in range(2))
        self.down = nn.Linear(40, 32, bias=False)
        self.around = around

    def forward(self, x: Tensor) -> Tensor:
        return self.around(x, self.gate, self.up, self.down)


def test_an_mlp_is_fused_where_no_gradient_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []

    def counting(x: Tensor, *parts: Any) -> Tensor:
        calls.append(x)
        return fused_lowrank.lowrank_mlp(x, *parts)

    monkeypatch.setattr(fused_mlp, "lowrank_mlp", counting)
    model = nn.Sequential(MLP(lambda x, g, u, d: d(F.silu(g(x)) * u(x)))).to(DEVICE)
    method = LowRank(rank=8)
    adapt(model, method, steps=10)
    x = torch.randn(5, 32, device=DEVICE)
    plain = model(x).detach()
    method.fuse(model)
    model.bfloat16()
    with torch.no_grad():
        near = model(x.bfloat16())
        assert model(x.bfloat16()[:0]).shape == (0, 32)
        assert len(calls) == 1
        model.double()(x.double())
    model.float()(x).sum().backward()
    assert len(calls) == 1
    torch.testing.assert_close(near.float(), plain, rtol=0.1, atol=0.1 * float(plain.abs().max()))
