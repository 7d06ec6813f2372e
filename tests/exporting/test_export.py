"""Exports: a directory that needs no peptrain, the small factorised model, and the gate."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import DENSE, tiny, tiny_method
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

import peptrain.exporting.export
from peptrain.data import Corpus
from peptrain.data.tokenizer import load_tokenizer
from peptrain.errors import CheckpointError, ConfigError, Unsupported
from peptrain.exporting.export import TOLERANCE, export
from peptrain.exporting.factorised import RECIPE, load_factorised
from peptrain.methods.bpt import BPTLinear
from peptrain.methods.lowrank import LowRankLinear
from peptrain.models import modeling_factorised
from peptrain.models.sites import ReparamLinear, reparametrized
from peptrain.ops.linear import bpt_weight
from peptrain.runs.build import open_run
from peptrain.testing import MODEL
from peptrain.training.loop import train

IDS = torch.arange(64).view(2, 32) * 7 % 300
PROMPT, NEW = IDS[:1, :5], 12
QWEN = {"family": "qwen2", "kv_heads": 1, "tied": True}
"""Biases, grouped keys, and an embedding that is the head too."""


FOLDED_BY_ROUNDING = 1e-4
"""What folding in fp32 may change of the logits, relative to the largest: over 60 seeds of
lowrank-olmo2 the median was 4e-7 and the largest 6e-5."""


@dataclass(frozen=True)
class Case:
    """One trained run."""

    method: str
    model: dict[str, Any]
    precision: str = "fp32"
    rank: int | None = None
    lr: float | None = 3e-2
    """High, so that after 8 steps no factor or diagonal is near its start."""


CASES = {name: Case(name, {}) for name in DENSE} | {
    "bpt-gently": Case("bpt", {}, lr=None),  # its own rate
    "bpt-qwen2": Case("bpt", QWEN),
    "loro-qwen2": Case("loro", QWEN),
    "lowrank-olmo2": Case("lowrank", {"family": "olmo2"}),
    "bpt-config.json": Case("bpt", {"config": "a file"}),
    "loro-config.json": Case("loro", {"config": "a file"}),
    "lowrank-rank-8": Case("lowrank", {}, rank=8),  # attention stays dense
    "bpt-bf16": Case("bpt", {}, "bf16"),
    "loro-bf16-olmo2": Case("loro", {"family": "olmo2"}, "bf16"),
    "loro-odd": Case("loro", {"intermediate_size": 21}, "fp64"),
    "lowrank-fp64": Case("lowrank", {}, "fp64"),
}
NOT_DENSE = {"cola": Case("cola", {})}
"""Exported as factors alone: there is no matrix that computes what its layers do."""
FACTORISED = [
    name for name, case in CASES.items() if case.method in ("lowrank", "loro", "spectron")
]


class Exports:
    """The cases, each trained and exported when it is first asked for."""

    def __init__(self, corpus: Path, folder: Path) -> None:
        self.corpus, self.folder = corpus, folder

    def run(self, name: str) -> Path:
        path = self.folder / "runs" / name
        return path if path.exists() else trained((CASES | NOT_DENSE)[name], self.corpus, path)

    def dense(self, name: str) -> Path:
        path = self.folder / "dense" / name
        return path if path.exists() else export(self.run(name), path)

    def factorised(self, name: str) -> Path:
        path = self.folder / "factorised" / name
        return path if path.exists() else export(self.run(name), path, "factorised")


def trained(case: Case, corpus: Path, run: Path) -> Path:
    model, file = dict(case.model), run.with_name(f"{run.name}.json")
    if "config" in model:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(custom_config()))
        model = dict.fromkeys(MODEL) | {"config": file}
    method = tiny_method(case.method, **({"rank": case.rank} if case.rank else {}))
    train(tiny(method, corpus, run, model=model, train={"precision": case.precision},
               optim={"lr": case.lr}))  # fmt: skip
    file.unlink(missing_ok=True)  # the run keeps its own
    return run


def custom_config() -> dict[str, Any]:
    """Nothing that a preset would give: a head size of its own, biases, another base of RoPE."""
    return LlamaConfig(
        vocab_size=310, hidden_size=20, intermediate_size=28, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rms_norm_eps=1e-5,
        bos_token_id=None, eos_token_id=None, tie_word_embeddings=True,
    ).to_dict()  # fmt: skip


STRANGER = """
import json, sys
sys.modules["peptrain"] = None  # any import of it fails
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
try:
    import peptrain.exporting.export
except ImportError:
    pass
else:
    raise SystemExit("peptrain is there")
torch.set_num_threads(1)
where, ids = json.loads(sys.argv[1]), torch.tensor(json.loads(sys.argv[2]))
for name, path in where["dense"].items():
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        found = {"logits": model(ids).logits}
    prompt = ids[:1, :5]
    found["generated"] = model.generate(prompt, do_sample=False, max_new_tokens=12)
    ends = [tokenizer.eos_token_id, model.config.eos_token_id, model.generation_config.eos_token_id]
    found["ends"] = torch.tensor(ends)
    save_file(found, f"{where['out']}/{name}.safetensors")
"""


def without_peptrain(dense: dict[str, Path], out: Path) -> dict[str, dict[str, Tensor]]:
    """What a process that can't import peptrain finds in these directories."""
    where = {"dense": {name: str(path) for name, path in dense.items()}, "out": str(out)}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    arguments = ["-c", STRANGER, json.dumps(where), json.dumps(IDS.tolist())]
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {name: load_file(out / f"{name}.safetensors") for name in dense}


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS).logits


def generated(model: PreTrainedModel) -> Tensor:
    return model.generate(PROMPT, do_sample=False, max_new_tokens=NEW)


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def wide(model: PreTrainedModel) -> PreTrainedModel:
    """The same numbers, computed in at least fp32."""
    dtype = torch.promote_types(model.dtype, torch.float32)
    return model.to(dtype)  # type: ignore[arg-type]


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


# The dense form.


def test_a_process_without_peptrain_computes_the_runs_logits(
    exports: Exports, corpus: Path, tmp_path: Path
) -> None:
    end = Corpus.open(corpus).eos_id
    seen = without_peptrain({name: exports.dense(name) for name in CASES}, tmp_path)
    for name, case in CASES.items():
        opened, found = open_run(exports.run(name)), seen[name]
        assert found["ends"].tolist() == [end] * 3, name
        twin = logits(opened.dense_twin())
        assert found["logits"].dtype == twin.dtype == opened.model.dtype
        assert relative(found["logits"], twin) < 1e-6, name
        if case.precision != "bf16":
            assert relative(found["logits"], logits(opened.model)) < FOLDED_BY_ROUNDING, name
        assert torch.equal(found["generated"], generated(load(exports.dense(name)))), name


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.precision == "bf16"])
def test_in_bf16_each_folded_weight_is_rounded_once(name: str, exports: Exports) -> None:
    written = AutoModelForCausalLM.from_pretrained(exports.dense(name)).state_dict()
    for layer in reparametrized(open_run(exports.run(name)).model):
        exact = layer.effective_weight()
        assert exact.dtype == torch.float32
        assert torch.equal(written[f"{layer.site}.weight"], exact.bfloat16())


@pytest.mark.parametrize("form", ["dense", "factorised"])
def test_the_end_token_stops_generate(form: str, exports: Exports, corpus: Path) -> None:
    end = Corpus.open(corpus).eos_id
    folder = exports.dense("loro") if form == "dense" else exports.factorised("loro")
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == end
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == end
    model = load(folder) if form == "dense" else load_factorised(folder)
    assert model.generation_config.eos_token_id == end
    with torch.no_grad():  # a head that says nothing else
        model.lm_head.weight.zero_()
        model.lm_head.weight[end] = 1
    model.model.norm.register_forward_hook(lambda module, args, out: torch.ones_like(out))
    assert generated(model).tolist() == [[*PROMPT[0].tolist(), end]]


def test_the_tokenizer_is_that_of_the_corpus(exports: Exports, corpus: Path) -> None:
    text = "tea in a tin, rain on a rose"
    wanted = load_tokenizer(corpus / "tokenizer.json").encode(text, add_special_tokens=False).ids
    for folder in (exports.dense("bpt"), exports.factorised("loro")):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(text)["input_ids"]
        assert ids == wanted and tokenizer.decode(ids) == text


def test_a_directory_holds_no_code_and_no_pickle(exports: Exports) -> None:
    """But for the file of the package that builds a factorised model."""
    kinds = {".json", ".safetensors", ".md"}
    assert {file.suffix for file in exports.dense("bpt-qwen2").iterdir()} == kinds
    small = exports.factorised("loro-qwen2")
    assert {file.suffix for file in small.iterdir()} == kinds | {".py"}
    ours = Path(modeling_factorised.__file__)
    assert [p.read_bytes() for p in small.glob("*.py")] == [ours.read_bytes()]


def test_the_parents_of_a_directory_are_made(exports: Exports, tmp_path: Path) -> None:
    made = export(exports.run("full"), tmp_path / "deep" / "down" / "out")
    assert sorted(p.name for p in made.parent.iterdir()) == ["out"]


# The factorised form.


@pytest.mark.parametrize("name", FACTORISED)
def test_the_factorised_model_computes_and_generates_the_same(name: str, exports: Exports) -> None:
    model, run = load_factorised(exports.factorised(name)), open_run(exports.run(name))
    assert not model.training and model.dtype == run.model.dtype
    odd = name == "loro-odd"
    assert odd == (model.model.layers[0].mlp.up_proj.out_features == 64)  # widened, for a GPU
    torch.testing.assert_close(logits(model), logits(run.model), rtol=0, atol=1e-12 if odd else 0)
    found = generated(model)
    assert found.shape[1] > PROMPT.shape[1]
    if CASES[name].precision != "bf16":  # where rounding may decide between two tokens
        assert torch.equal(found, generated(load(exports.dense(name))))


@pytest.mark.parametrize("name", FACTORISED)
def test_the_factorised_file_is_smaller(name: str, exports: Exports) -> None:
    small, large = size(exports.factorised(name)), size(exports.dense(name))
    saved = sum(
        layer.in_features * layer.out_features - sum(p.numel() for p in (layer.B, layer.A))
        for layer in reparametrized(open_run(exports.run(name)).model)
        if isinstance(layer, LowRankLinear)
    )
    each = {"fp32": 4, "bf16": 2, "fp64": 8}[CASES[name].precision]
    assert saved > 0 and large - small == pytest.approx(saved * each, abs=4000)  # headers


@pytest.mark.parametrize("name", [n for n in DENSE if n not in FACTORISED])
def test_methods_with_other_matrices_have_no_factorised_form(
    name: str, exports: Exports, tmp_path: Path
) -> None:
    with pytest.raises(
        Unsupported, match=rf"--form factorised: {name} is not of the form W = B A; .*--form dense"
    ):
        export(exports.run(name), tmp_path / "out", "factorised")
    assert not list(tmp_path.iterdir())


WEIGHTS = "model.safetensors"


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def cut_weights(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def changed_weights(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def changed_code(folder: Path) -> None:
    with next(folder.glob("*.py")).open("a") as file:
        file.write("import os\n")


def changed_config(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    assert '"rms_norm_eps": 1e-06' in text
    (folder / "config.json").write_text(text.replace("1e-06", "1e-05"))


def changed_recipe(folder: Path) -> None:
    text = (folder / RECIPE).read_text()
    (folder / RECIPE).write_text(text.replace('"rank": 2', '"rank": 3'))


def nested_recipe(folder: Path) -> None:
    (folder / RECIPE).write_text("[" * 10**5)


def broken_recipe(folder: Path) -> None:
    (folder / RECIPE).write_text('{"method": {"na')


def no_checksums(folder: Path) -> None:
    (folder / RECIPE).write_text('{"method": {"name": "loro"}}')


def other_ranks(folder: Path) -> None:
    (folder / RECIPE).unlink()  # which would tell
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('mlp.up_proj": 2', 'mlp.up_proj": 3'))


def lacking_weights(folder: Path) -> None:
    (folder / RECIPE).unlink()
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.B.weight"]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize(
    "damage",
    [no_weights, cut_weights, changed_weights, changed_code, changed_config, changed_recipe,
     nested_recipe, broken_recipe, no_checksums, other_ranks, lacking_weights],
)  # fmt: skip
def test_a_damaged_factorised_model_is_named(
    damage: Callable[[Path], None], exports: Exports, tmp_path: Path
) -> None:
    folder = tmp_path / "small"
    shutil.copytree(exports.factorised("loro"), folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=r"can't be read"):
        load_factorised(folder)


# What is refused, and the gate.


def test_a_run_without_its_tokenizer_is_named(exports: Exports, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(exports.run("full"), run)
    shutil.rmtree(run / "tokenizer")
    with pytest.raises(CheckpointError, match=r"run/tokenizer: missing"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_exists_is_never_overwritten(exports: Exports, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    for out in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(ConfigError, match=r"--out .*: exists and is never overwritten"):
            export(exports.run("full"), out)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("mine.txt", "precious")]


def test_a_place_that_cannot_be_written_is_named(exports: Exports, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"--out .*file/out: can't be written"):
        export(exports.run("full"), tmp_path / "file" / "out")


def test_a_file_of_the_run_that_may_not_be_read_is_not_blamed_on_the_place(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = str(exports.run("full") / "metrics.jsonl")

    def barred(*args: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", metrics)

    monkeypatch.setattr(peptrain.exporting.export, "write_card", barred)
    with pytest.raises(PermissionError, match=re.escape(metrics)):
        export(exports.run("full"), tmp_path / "out")
    assert not [*tmp_path.iterdir()]


def test_what_a_killed_export_left_is_not_taken_over(exports: Exports, tmp_path: Path) -> None:
    (tmp_path / ".out.0123456789abcdef.peptrain-tmp").mkdir()
    (tmp_path / ".out.0123456789abcdef.peptrain-tmp" / "junk").touch()
    out = export(exports.run("full"), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and not (out / "junk").exists()


def test_only_the_tokenizer_s_own_files_are_exported(exports: Exports, tmp_path: Path) -> None:
    """Not code, weights or an adapter's settings that a stranger put beside them."""
    run = tmp_path / "run"
    shutil.copytree(exports.run("full"), run)
    for name in ("own.py", "adapter_config.json", "pytorch_model.bin", "model.safetensors.bak"):
        (run / "tokenizer" / name).write_text("{}")
    (run / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    names = {p.name for p in export(run, tmp_path / "out").iterdir()}
    assert names == {p.name for p in exports.dense("full").iterdir()} | {"chat_template.jinja"}


def test_an_exported_file_is_readable_as_the_umask_says(exports: Exports) -> None:
    for folder in (exports.dense("full"), exports.factorised("loro")):
        (folder.parent / "new").touch()
        modes = {file.stat().st_mode for file in folder.iterdir()}
        assert modes == {(folder.parent / "new").stat().st_mode}


def test_of_two_exports_to_one_place_one_is_complete(exports: Exports, tmp_path: Path) -> None:
    """A second export is made whole while the first one is checked."""
    run, out = exports.run("full"), tmp_path / "out"
    compared = peptrain.exporting.export._compare

    def second(*models: Any) -> float:
        found = compared(*models)
        with pytest.MonkeyPatch.context() as undo:
            undo.setattr(peptrain.exporting.export, "_compare", compared)
            export(run, out)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peptrain.exporting.export, "_compare", second)
        with pytest.raises(ConfigError, match="exists and is never overwritten"):
            export(run, out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert {p.name for p in out.iterdir()} == {p.name for p in exports.dense("full").iterdir()}
    load(out)


def bpt_fold(layer: Any, without: str) -> Tensor:
    parts = {name: getattr(layer, name) for name in ("weight", "U", "V", "a", "b")}
    forgotten = parts[without]
    parts[without] = torch.ones_like(forgotten) if without in "ab" else torch.zeros_like(forgotten)
    return bpt_weight(**{"W" if k == "weight" else k: v for k, v in parts.items()})


def forget_a_rank(layer: Any) -> Tensor:
    dtype = torch.promote_types(layer.B.dtype, torch.float32)
    return layer.B[:, 1:].to(dtype) @ layer.A[1:].to(dtype)


WRONG: dict[str, tuple[type[ReparamLinear], Callable[[Any], Tensor]]] = {
    "bpt without a": (BPTLinear, lambda layer: bpt_fold(layer, "a")),
    "bpt without b": (BPTLinear, lambda layer: bpt_fold(layer, "b")),
    "bpt without UV": (BPTLinear, lambda layer: bpt_fold(layer, "V")),
    "low rank without a rank": (LowRankLinear, forget_a_rank),
}
FOLDED: dict[type[ReparamLinear], list[str]] = {
    BPTLinear: [name for name, case in CASES.items() if case.method == "bpt"],
    LowRankLinear: FACTORISED,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_fold_is_caught_and_leaves_nothing(
    wrong: str, exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls, fold = WRONG[wrong]
    monkeypatch.setattr(cls, "effective_weight", fold)
    for name in FOLDED[cls]:
        with pytest.raises(CheckpointError, match=r"logits differ by .* nothing was exported"):
            export(exports.run(name), tmp_path / "deep" / name)
        assert not list((tmp_path / "deep").iterdir())


def test_weights_that_change_on_the_way_to_the_disk_are_caught(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = PreTrainedModel.save_pretrained

    def spoil(model: PreTrainedModel, out: Path) -> None:
        model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 2] += 0.01
        save(model, out)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", spoil)
    with pytest.raises(
        CheckpointError, match=r"model.layers.1.mlp.up_proj.weight: changed when read back"
    ):
        export(exports.run("bpt"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def with_weights(model: PreTrainedModel, weight: Callable[[Any], Tensor]) -> Tensor:
    """Logits of the model whose layers multiply by `weight` of themselves."""
    for layer in reparametrized(model):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
        with torch.no_grad():
            linear.weight = nn.Parameter(weight(layer))
        linear.bias = layer.bias
        model.set_submodule(layer.site, linear)
    return logits(model)


@pytest.mark.parametrize("name", [name for names in FOLDED.values() for name in names])
def test_the_tolerance_lies_between_right_and_wrong_folds(name: str, exports: Exports) -> None:
    def model() -> PreTrainedModel:
        return wide(open_run(exports.run(name)).model)

    exact = logits(model())
    right = with_weights(model(), lambda layer: layer.effective_weight())
    assert relative(right, exact) < FOLDED_BY_ROUNDING
    for cls, fold in WRONG.values():
        if name in FOLDED[cls]:
            assert relative(with_weights(model(), fold), exact) > 10 * max(TOLERANCE.values())
