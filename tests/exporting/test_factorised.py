"""The factorised export in transformers alone, saved and loaded again, and its older layout."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import tiny
from test_export import FACTORISED, IDS, NOT_DENSE, Exports, logits, size
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import peptrain.hf
from peptrain.cli.app import main
from peptrain.errors import CheckpointError, ConfigError, Unsupported
from peptrain.exporting.export import export
from peptrain.exporting.factorised import CHECKSUMS, RECIPE, _sums, load_factorised
from peptrain.methods import METHODS
from peptrain.methods.rank import RankMethod
from peptrain.models import modeling_factorised
from peptrain.models.auto import FACTORS
from peptrain.models.sites import ReparamLinear
from peptrain.runs.build import Opened, open_run
from peptrain.training.loop import train

STRANGER = """
import json, sys
sys.modules["peptrain"] = None  # any import of it fails
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
given, ids = json.loads(sys.argv[1]), torch.tensor(json.loads(sys.argv[2]))
for name, path in given["folders"].items():
    try:
        AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise SystemExit("a model was built without its code")
    ours = {"trust_remote_code": True}
    model, report = AutoModelForCausalLM.from_pretrained(path, **ours, output_loading_info=True)
    assert not any(report.values()), report
    out = f"{given['out']}/{name}"
    model.save_pretrained(out)
    again = AutoModelForCausalLM.from_pretrained(out, **ours, device_map="cpu")
    inner = AutoModel.from_pretrained(path, **ours)
    half = AutoModelForCausalLM.from_pretrained(path, **ours, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    linear = {m.weight for m in model.modules() if type(m) is nn.Linear}
    embedding = model.get_input_embeddings().weight
    assert linear | {embedding} == {p for n, p in model.named_parameters() if p.ndim == 2}
    assert AutoTokenizer.from_pretrained(path, **ours)("tea").input_ids
    with torch.no_grad():
        hidden = inner(ids).last_hidden_state
        found = {"logits": model(ids).logits, "again": again(ids).logits,
                 "inner": model.lm_head(hidden)}
    found["generated"] = model.generate(ids[:1, :5], do_sample=False, max_new_tokens=12)
    save_file(found, f"{out}.safetensors")
"""


@pytest.fixture
def strangers(exports: Exports, tmp_path: Path) -> Path:
    """What a process that can't import peptrain makes of every factorised export."""
    folders = {name: str(exports.factorised(name)) for name in (*FACTORISED, *NOT_DENSE)}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    given = json.dumps({"folders": folders, "out": str(tmp_path)})
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, given, json.dumps(IDS.tolist())],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return tmp_path


@pytest.mark.slow
def test_a_process_without_peptrain_loads_computes_and_saves_it(
    strangers: Path,
    exports: Exports,
) -> None:
    for name in (*FACTORISED, *NOT_DENSE):
        found, run = load_file(strangers / f"{name}.safetensors"), open_run(exports.run(name)).model
        for key in ("logits", "again", "inner"):
            assert torch.equal(found[key], logits(run)), (name, key)
        written = exports.factorised(name)
        for file in (strangers / name).iterdir():
            assert file.read_bytes() == (written / file.name).read_bytes(), (name, file.name)
        loaded = load_factorised(strangers / name)  # it has no peptrain.json
        odd = name == "loro-odd"
        torch.testing.assert_close(logits(loaded), logits(run), rtol=0, atol=1e-12 if odd else 0)


@pytest.mark.parametrize("name", ["loro-qwen2", "loro-odd", "lowrank-rank-8"])
def test_what_load_factorised_returns_is_saved_as_it_was_exported(
    name: str,
    exports: Exports,
    tmp_path: Path,
) -> None:
    """To the byte: the zeros of a padded MLP and the fused layers are not part of it."""
    written = exports.factorised(name)
    load_factorised(written).save_pretrained(tmp_path / "again")
    files = {file.name: file.read_bytes() for file in (tmp_path / "again").iterdir()}
    assert {"model.safetensors", "config.json", "modeling_factorised.py"} < files.keys()
    assert files == {name: (written / name).read_bytes() for name in files}
    model = load_factorised(written)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    half = {name: p / 2 for name, p in model.state_dict().items()}
    model.save_pretrained(tmp_path / "other", state_dict=half)
    saved = load_file(tmp_path / "other" / "model.safetensors")
    before = load_file(written / "model.safetensors")
    assert saved.keys() == before.keys()
    key = "model.layers.0.mlp.up_proj.A.weight"
    assert torch.equal(saved[key], before[key] / 2)


@pytest.mark.slow
def test_import_of_peptrain_hf_replaces_the_flag(exports: Exports, tmp_path: Path) -> None:
    assert peptrain.hf.family == "olmo2"  # the last
    for name in ("loro", "loro-qwen2", "lowrank-olmo2"):
        folder = exports.factorised(name)
        for flag in ({}, {"trust_remote_code": True}):  # which is then not needed
            model = AutoModelForCausalLM.from_pretrained(folder, **flag)
            assert type(model).__module__ == modeling_factorised.__name__
            assert torch.equal(logits(model), logits(open_run(exports.run(name)).model))
        assert AutoTokenizer.from_pretrained(folder)("tea").input_ids
        model.save_pretrained(tmp_path / name)
        assert size(tmp_path / name) == size(folder)
        assert (tmp_path / name / "modeling_factorised.py").is_file()


def test_ranks_are_written_once_for_all_layers_or_by_name(
    exports: Exports,
    corpus: Path,
    tmp_path: Path,
) -> None:
    def ranks(folder: Path) -> dict[str, int]:
        found: dict[str, int] = json.loads((folder / "config.json").read_text())["ranks"]
        return found

    every = {f"layers.*.mlp.{name}": 8 for name in ("down_proj", "gate_proj", "up_proj")}
    assert ranks(exports.factorised("lowrank-rank-8")) == every
    method = METHODS["lowrank"](rank=2, exclude="*.1.self_attn.q_proj,mlp")  # type: ignore[call-arg]
    train(tiny(method, corpus, tmp_path / "run", train={"steps": 1}))
    folder = export(tmp_path / "run", tmp_path / "out", "factorised")
    assert ranks(folder)["layers.0.self_attn.q_proj"] == 2
    assert ranks(folder)["layers.*.self_attn.k_proj"] == 2 and len(ranks(folder)) == 4
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.base_model_tp_plan is None  # q_proj would need two
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("k_proj", "qq_proj"))
    with pytest.raises(ValueError, match=r"ranks: LlamaModel has no nn\.Linear 'layers.*qq_proj'"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_each_process_gets_its_part_of_the_factor_that_the_family_shards(
    exports: Exports,
) -> None:
    plan = AutoModelForCausalLM.from_pretrained(exports.factorised("lowrank-rank-8")).tp_plan
    assert plan["model.layers.*.mlp.up_proj.B"] == "colwise"
    assert plan["model.layers.*.mlp.down_proj.A"] == "rowwise"
    assert plan["model.layers.*.self_attn.q_proj"] == "colwise"  # dense
    plan = AutoModelForCausalLM.from_pretrained(exports.factorised("lowrank-olmo2")).tp_plan
    assert plan["model.layers.*.self_attn.o_proj.A"] == "rowwise_split_input"


@pytest.mark.slow
def test_it_compiles_and_takes_adapters(exports: Exports, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(exports.factorised("loro"))
    with torch.no_grad():
        assert torch.allclose(torch.compile(model)(IDS).logits, logits(model), atol=1e-5)
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))
    assert len([n for n, _ in adapted.named_parameters() if "lora_A" in n]) == 28  # not the head
    adapted(IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            p.add_(0.1 if "lora_B" in name else 0)
    wanted = logits(adapted.eval())
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    found = logits(load_factorised(tmp_path / "merged"))
    assert torch.allclose(found, wanted, rtol=0, atol=2e-4)  # the adapters are large


# The layout of older versions: a dense config.json, the method's layers, a recipe to build them.


def write_old(opened: Opened, out: Path) -> Path:
    out.mkdir()
    opened.model.config.save_pretrained(out)
    named = opened.model.named_parameters()
    save_file({n: p.detach().contiguous() for n, p in named}, out / FACTORS, {"format": "pt"})
    method: Any = opened.config.method
    settings = {k: v for k, v in vars(method).items() if v is not None}
    recipe = {"peptrain": "0.1.0", "method": {"name": method.name} | settings}
    recipe |= {"phase": opened.saved.phase, "seed": opened.config.train.seed}
    (out / RECIPE).write_text(json.dumps({**recipe, CHECKSUMS: _sums(out, recipe)}))
    return out


@pytest.mark.parametrize("name", ["loro-odd", "loro-qwen2", "lowrank-rank-8"])
def test_the_older_layout_is_loaded_and_saved_as_the_new_one(
    name: str,
    exports: Exports,
    tmp_path: Path,
) -> None:
    model = load_factorised(write_old(open_run(exports.run(name)), tmp_path / "old"))
    wanted, written = load_factorised(exports.factorised(name)), exports.factorised(name)
    assert torch.equal(logits(model), logits(wanted))
    model.save_pretrained(tmp_path / "new")
    for file in ("model.safetensors", "modeling_factorised.py"):
        assert (tmp_path / "new" / file).read_bytes() == (written / file).read_bytes()
    assert torch.equal(logits(load_factorised(tmp_path / "new")), logits(wanted))


def changed(folder: Path) -> None:
    content = (folder / FACTORS).read_bytes()
    (folder / FACTORS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def unknown_method(folder: Path) -> None:
    (folder / RECIPE).write_text('{"method": {"name": "of tomorrow"}}')


def no_recipe(folder: Path) -> None:
    (folder / RECIPE).unlink()


def both_layouts(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / FACTORS).read_bytes())


@pytest.mark.parametrize(
    "damage, said",
    [
        (changed, r"can't be read: factors\.safetensors: differs from what was exported"),
        (unknown_method, "was written by the method 'of tomorrow', which is not installed"),
        (no_recipe, r"can't be read: .*peptrain\.json"),
        (both_layouts, r"two exports, factors\.safetensors and model\.safetensors"),
    ],
)
def test_damage_in_the_older_layout_is_named(
    damage: Callable[[Path], None],
    said: str,
    exports: Exports,
    tmp_path: Path,
) -> None:
    folder = write_old(open_run(exports.run("loro")), tmp_path / "old")
    damage(folder)
    with pytest.raises(CheckpointError, match=said):
        load_factorised(folder)


def test_a_dense_export_is_not_taken_for_a_factorised_one(exports: Exports) -> None:
    with pytest.raises(CheckpointError, match=r"not a factorised model; create one with `peptrain"):
        load_factorised(exports.dense("loro"))


@pytest.mark.parametrize("layout", ["new", "old"])
def test_a_new_run_does_not_begin_from_it(
    layout: str,
    exports: Exports,
    corpus: Path,
    tmp_path: Path,
) -> None:
    folder = exports.factorised("loro")
    if layout == "old":
        folder = write_old(open_run(exports.run("loro")), tmp_path / "old")
    config = tiny("full", corpus, tmp_path / "run")
    object.__setattr__(config, "init_from", folder)
    file = "config" if layout == "new" else "factors"
    with pytest.raises(ConfigError, match=rf"{file}\.\w+: a factorised export; give the run"):
        train(config)


@pytest.mark.parametrize("layout", ["new", "old"])
def test_both_layouts_are_evaluated(
    layout: str,
    exports: Exports,
    corpus: Path,
    tmp_path: Path,
) -> None:
    folder, run = exports.factorised("lowrank-fp64"), exports.run("lowrank-fp64")
    if layout == "old":
        folder = write_old(open_run(run), tmp_path / "old")
        for file in exports.factorised("lowrank-fp64").glob("token*"):
            (folder / file.name).write_bytes(file.read_bytes())
    shutil.copytree(corpus, tmp_path / "other")
    losses = []
    for path in (folder, exports.dense("lowrank-fp64")):
        out = tmp_path / "out.json"
        given = [f"--data={corpus}", f"--data={tmp_path / 'other'}", f"--out={out}"]
        assert main(["eval", str(path), *given, "--positions=16"]) == 0
        losses.append(json.loads(out.read_text())[0]["macro_loss"])
        out.unlink()
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


# Layers that are not linear.


class Squashed(ReparamLinear):
    """y = B tanh(A x) + bias."""

    def __init__(self, site: Any, rank: int, rng: Any) -> None:
        super().__init__(site)
        (n, m), like = site.shape, site.linear.weight
        shapes = ((rank, m), (n, rank))
        A, B = (torch.randn(s, generator=rng(site.name, purpose=str(s))) for s in shapes)
        self.A, self.B = nn.Parameter(A.to(like)), nn.Parameter(B.to(like) / 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.A).tanh(), self.B, self.bias)


class Scaled(Squashed):
    """With a parameter more."""

    def __init__(self, site: Any, rank: int, rng: Any) -> None:
        super().__init__(site, rank, rng)
        self.c = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self.c


@dataclass(frozen=True, kw_only=True)
class Tanh(RankMethod):
    """Train y = B tanh(A x)."""

    name: ClassVar[str] = "tanh"
    equation: ClassVar[str] = "y = B tanh(A x)"
    has_dense_equivalent: ClassVar[bool] = False
    activation: ClassVar[str | None] = "tanh"
    keeps_function_with: ClassVar[Any] = None
    of: ClassVar[type[Squashed]] = Squashed

    def layer(self, site: Any, rng: Any) -> ReparamLinear:
        return self.of(site, self.r, rng)


def trained(corpus: Path, run: Path, patch: pytest.MonkeyPatch, **changes: Any) -> Path:
    """A run of Tanh, or of a class with these changes, which is listed until the test ends."""
    cls: Any = type("Tanh", (Tanh,), changes)
    patch.setitem(METHODS, "tanh", cls)
    model = {"family": "qwen2", "kv_heads": 1, "intermediate_size": 21}
    train(tiny(cls(rank=2), corpus, run, model=model, train={"steps": 2}))
    return run


def test_a_layer_with_an_activation_between_its_factors_is_exported(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(corpus, tmp_path / "run", monkeypatch)
    folder, wanted = export(run, tmp_path / "out", "factorised"), logits(open_run(run).model)
    monkeypatch.undo()  # no method is needed to load it
    for model in (AutoModelForCausalLM.from_pretrained(folder), load_factorised(folder)):
        assert torch.equal(logits(model), wanted)
        assert model.get_submodule("model.layers.0.self_attn.q_proj.B").bias is not None
        model.save_pretrained(tmp_path / "again")
        assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
            folder / "model.safetensors"
        ).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [{"of": Scaled}, {"activation": None}, {"activation": "tan"}],
    ids=["a parameter more", "no activation", "none of transformers'"],
)
def test_other_layers_are_refused_with_what_they_must_be(
    changes: dict[str, Any], corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(corpus, tmp_path / "run", monkeypatch, **changes)
    got = changes.get("activation", "tanh")
    said = rf"tanh: its layers must be y = B f\(A x\) \+ bias .* Tanh\.activation .*\(got {got!r}\)"
    with pytest.raises(Unsupported, match=said):
        export(run, tmp_path / "out", "factorised")
    assert not (tmp_path / "out").exists()
    old = load_factorised(write_old(open_run(run), tmp_path / "old"))  # which kept any layer
    torch.testing.assert_close(logits(old), logits(open_run(run).model))
    with pytest.raises(Unsupported, match=r"save_pretrained: tanh: .*; copy the directory"):
        old.save_pretrained(tmp_path / "again")


def test_an_activation_that_is_not_that_of_the_layers_is_noticed(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(corpus, tmp_path / "run", monkeypatch, activation="silu")
    with pytest.raises(CheckpointError, match="the exported model's logits differ by"):
        export(run, tmp_path / "out", "factorised")
