"""Analyses of runs and of Hugging Face directories: what is measured, and what is refused."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import DENSE, tiny, tiny_method
from torch import Tensor

from peptrain.analysis import analyze as module
from peptrain.analysis import source as sources
from peptrain.analysis.analyze import analyze
from peptrain.analysis.measures import EXTRA
from peptrain.analysis.source import open_source, weight_of
from peptrain.analysis.table import Output, read_table
from peptrain.cli.app import main
from peptrain.errors import CheckpointError, ConfigError, DataError
from peptrain.exporting.export import export
from peptrain.files import sha256sums
from peptrain.runs.checkpoint import SUMMED, SUMS
from peptrain.testing import EVENT, QWEN, STEPS
from peptrain.training.loop import train

ALL = {"keep_at": ",".join(map(str, range(STEPS + 1)))}
Line = dict[str, Any]


def trained(folder: Path, corpus: Path, name: str, given: dict[str, Any] | None = None,
            **train_settings: Any) -> Path:  # fmt: skip
    run = folder / name
    settings = {**ALL, "device": "cpu", **train_settings}
    train(tiny(tiny_method(name, **(given or {})), corpus, run, train=settings, model=QWEN))
    return run


def lines(run: Path, step: int, what: str, **columns: Any) -> list[Line]:
    table = read_table(run / "analysis" / f"{step}.csv")
    return [x for x in table if x["what"] == what and all(x[k] == v for k, v in columns.items())]


def measured(run: Path, *steps: int, **given: Any) -> Path:
    analyze([Path(f"{run}@{step}") for step in steps], **{"probe": 2, **given})
    return run


@pytest.fixture(scope="module")
def relora(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run with a warm start of 2 steps and merges at steps 3 and 6, every step kept."""
    return trained(tmp_path_factory.mktemp("runs"), corpus, "relora")


def test_every_matrix_is_measured_and_every_comparison_that_its_steps_allow(relora: Path) -> None:
    measured(relora, 6)
    table = read_table(relora / "analysis" / "6.csv")
    heads = {x["head"] for x in table if x["module"] == "ov"}
    assert heads == {0, 1, "sum"}
    count = {what: sum(x["what"] == what and x["module"] != "ov" for x in table)
             for what in {x["what"] for x in table}}  # fmt: skip
    seven = dict.fromkeys(("weight", "from_start", "from_warm", "update", "gradient"), 14)
    assert {k: v for k, v in count.items() if k in seven} == seven
    assert count["factor.A"] == count["factor.B"] == count["cycle"] > 0
    assert {(x["step"], x["run"]) for x in table} == {(6, str(relora))}
    about = json.loads((relora / "analysis" / "6.json").read_text())
    assert about["dtype"] == "float64" and about["tolerances"] == [1e-2, 1e-3, 1e-6]
    assert about["compared_with"] == {"start": 0, "warm": 2, "before": 5, "cycles": [2, 3]}
    assert about["rows"]["cycle"] == count["cycle"]


def test_measures_are_those_of_the_dense_weights(relora: Path) -> None:
    measured(relora, 5)
    name = "model.layers.1.mlp.down_proj"
    now, start, before = (
        weight_of(open_source(Path(f"{relora}@{step}")).layers[name]) for step in (5, 0, 4)
    )
    for what, M in (("weight", now), ("from_start", now - start), ("update", now - before)):
        (found,) = lines(relora, 5, what, layer=1, module="mlp.down_proj")
        sigma = torch.linalg.svdvals(M)
        p = sigma / sigma.sum()
        wanted = {
            "sigma_max": sigma[0],
            "frobenius": torch.linalg.norm(M),
            "effective_rank": torch.exp(-torch.xlogy(p, p).sum()),
            "rank_1e-3": (sigma > 1e-3 * sigma[0]).sum(),
            "above_0.1": (sigma > 0.1).sum(),
        }
        assert {k: found[k] for k in wanted} == pytest.approx(
            {k: v.item() for k, v in wanted.items()}, rel=1e-6
        )


def test_a_warm_start_and_r_ranks_a_merge_are_all_that_relora_can_have_changed(
    relora: Path,
) -> None:
    """At step 6 two merges, at step 7 also what has not been merged, of rank 2 each."""
    measured(relora, 2, 5, 6, 7)
    adapted = {(x["layer"], x["module"]) for x in lines(relora, 7, "factor.A")}
    for step, ranks in ((5, 4), (6, 4), (7, 6)):
        found = [x for x in lines(relora, step, "from_warm")
                 if (x["layer"], x["module"]) in adapted]  # fmt: skip
        assert {x["structural_rank"] for x in found} == {ranks}
        assert all(x["rank_1e-6"] <= ranks for x in found)
        assert all(x["rank_1e-6"] > 2 for x in found)
    assert lines(relora, 2, "from_warm") == []
    assert len(lines(relora, 2, "from_start")) == 14


def test_pico_compat_changes_nothing_in_its_first_cycle_and_a_corrected_run_r_ranks(
    tmp_path: Path, corpus: Path
) -> None:
    """The released code starts A and B at zero, where neither gets a gradient."""
    released = {"start": "zero", "pico_compat": True, "merge_scaled": False}
    for name, given in (("pico", released), ("corrected", {})):
        folder = tmp_path / name
        folder.mkdir()
        given = {"warm_start_steps": 0, "merge_every": 5, "reset_every": 5, **given}
        run = trained(folder, corpus, "relora", given)
        measured(run, 4, 5, STEPS, probe=0)
        adapted = {(x["layer"], x["module"]) for x in lines(run, 4, "factor.A")}
        assert adapted
        for step, merges in ((4, 0), (5, 1), (STEPS, 1)):
            found = [x for x in lines(run, step, "from_start")
                     if (x["layer"], x["module"]) in adapted]  # fmt: skip
            assert len(found) == len(adapted)
            if name == "pico" and step <= 5:
                assert all(x["above_0.1"] == x["rank_1e-6"] == x["frobenius"] == 0 for x in found)
                assert all(math.isnan(x["condition"]) for x in found)
            elif name == "corrected":
                assert all(0 < x["rank_1e-6"] <= 2 * (merges + 1) for x in found)
                assert all(x["above_0.1"] <= 2 * (merges + 1) for x in found)


@pytest.mark.parametrize("name", ["lowrank", "loro"])
def test_of_a_product_the_condition_is_over_its_rank_and_errors_of_gradients_are_ordered(
    tmp_path: Path, corpus: Path, name: str
) -> None:
    run = measured(trained(tmp_path, corpus, name), 4)
    adapted = {(x["layer"], x["module"]) for x in lines(run, 4, "factor.A")}
    weights = [x for x in lines(run, 4, "weight") if (x["layer"], x["module"]) in adapted]
    assert {x["structural_rank"] for x in weights} == {2}
    assert all(1 < x["condition"] < 100 and x["sigma_min"] > 0 for x in weights)
    assert {x["structural_rank"] for x in lines(run, 4, "weight", module="ov")} == {2}
    changes = [x for x in lines(run, 4, "from_start") if (x["layer"], x["module"]) in adapted]
    assert {x["structural_rank"] for x in changes} == {4}
    for x in lines(run, 4, "gradient"):
        if (x["layer"], x["module"]) not in adapted:
            assert x["error_tangent"] is None
            continue
        assert 0 < x["error_tangent"] <= x["error_factors_scaled"] <= 1
        assert x["error_factors_scaled"] <= min(x["error_factors"], x["error_loro"])


@pytest.mark.parametrize("name", DENSE)
def test_every_method_can_be_analyzed(tmp_path: Path, corpus: Path, name: str) -> None:
    run = measured(trained(tmp_path, corpus, name), 1, STEPS)
    assert len(lines(run, STEPS, "weight")) == 14 + 2 * 3
    assert len(lines(run, STEPS, "update")) == len(lines(run, 1, "from_start")) == 14
    found = lines(run, STEPS, "weight")
    assert all(math.isfinite(x["effective_rank"]) and x["condition"] >= 1 for x in found)


def test_gradients_are_those_of_the_dense_weights_whatever_the_method(
    tmp_path: Path, corpus: Path, relora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ReLoRA's are those of full training from the same weights, not of its factors."""
    monkeypatch.setattr(module, "SEQ_LEN", 16)
    export(Path(f"{relora}@5"), tmp_path / "hf", "dense")
    measured(relora, 5)
    analyze([tmp_path / "hf"], out=tmp_path / "out", data=corpus, probe=2)
    of_run = {(x["layer"], x["module"]): x for x in lines(relora, 5, "gradient")}
    table = read_table(tmp_path / "out" / "hf" / "model.csv")
    found = [x for x in table if x["what"] == "gradient"]
    assert len(found) == len(of_run) == 14
    for x in found:
        same = of_run[x["layer"], x["module"]]
        for key in ("rows", "columns", "frobenius", "effective_rank", "sigma_max"):
            assert x[key] == pytest.approx(same[key], rel=1e-4)
        assert x["step"] is None


def test_successive_merges_overlap_by_as_much_as_their_increments_do(relora: Path) -> None:
    measured(relora, 6, 7)
    assert lines(relora, 7, "cycle") == []
    name = "model.layers.0.self_attn.o_proj"

    def base(step: int) -> Tensor:
        layer = open_source(Path(f"{relora}@{step}")).layers[name]
        return layer.weight.detach().double()  # type: ignore[union-attr, operator]

    first, second = base(3) - base(2), base(6) - base(3)
    frames = [torch.linalg.svd(D).U[:, :2] for D in (first, second)]
    wanted = torch.linalg.norm(frames[0].T @ frames[1]) ** 2 / 2
    (found,) = lines(relora, 6, "cycle", layer=0, module="self_attn.o_proj")
    assert found["overlap"] == pytest.approx(wanted.item(), rel=1e-6)
    assert found["structural_rank"] == 2


def test_the_command_measures_what_is_kept_and_skips_what_was_measured(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    run = trained(tmp_path, corpus, "full", keep_at="0,1", keep=1, checkpoint_every=0)
    assert main(["analyze", str(run), "--probe=2", "--device=cpu"]) == 0
    assert capsys.readouterr().out.split() == [f"{run}/analysis/{s}.csv" for s in (0, 1, STEPS)]
    assert sorted(p.name for p in (run / "analysis").glob("1.*")) == [
        "1.csv", "1.json", "1.parquet", "1.spectra.csv"
    ]  # fmt: skip
    before = (run / "analysis" / "1.json").stat().st_mtime_ns
    monkeypatch.setattr(module, "measure", lambda *given: pytest.fail("measured again"))
    assert main(["analyze", str(run), "--probe=2", "--device=cpu"]) == 0
    assert (run / "analysis" / "1.json").stat().st_mtime_ns == before
    spectra = read_table(run / "analysis" / "1.spectra.csv")
    assert {len(x["sigma"].split()) for x in spectra if x["module"] == "mlp.down_proj"} == {16}


def test_progress_counts_matrices_over_all_models(relora: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    paths = [Path(f"{relora}@{step}") for step in (1, 4)]
    analyze(paths, out=tmp_path, probe=0, watch=lambda *given: seen.append(given))
    assert seen[0] == (f"{relora}@1", 1, 28) and seen[-1] == (f"{relora}@4", 28, 28)


def test_a_step_that_is_not_kept_is_refused_with_those_that_are(
    tmp_path: Path, corpus: Path
) -> None:
    run = trained(tmp_path, corpus, "full", keep_at="0,1", keep=1, checkpoint_every=0)
    with pytest.raises(CheckpointError, match=r"full@4: no checkpoint .* choose one of 0, 1, 8"):
        analyze([Path(f"{run}@4")], probe=0)
    assert not (run / "analysis").exists()


def test_gradients_stay_where_none_are_asked_for(relora: Path) -> None:
    analyze([Path(f"{relora}@4")], probe=2)
    before = (relora / "analysis" / "4.csv").read_bytes()
    analyze([Path(f"{relora}@4")], probe=0)
    assert (relora / "analysis" / "4.csv").read_bytes() == before and b"gradient" in before


def test_a_probe_batch_larger_than_the_held_out_part_is_refused(relora: Path) -> None:
    with pytest.raises(DataError, match=r"--probe: must be <= \d+, as .* \(got 100000\)"):
        analyze([Path(f"{relora}@5")], probe=100_000)


def test_what_is_no_run_is_refused_and_hugging_face_needs_a_place(
    tmp_path: Path, relora: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"nothing: neither a run directory"):
        analyze([tmp_path / "nothing"])
    export(relora, tmp_path / "hf", "dense")
    with pytest.raises(ConfigError, match=r"--out: must be given for .*hf"):
        analyze([tmp_path / "hf"])
    twin = tmp_path / "more"
    shutil.copytree(tmp_path / "hf", twin / "hf")
    with pytest.raises(ConfigError, match="two models are named 'hf'"):
        analyze([tmp_path / "hf", twin / "hf"], out=tmp_path / "out")


def changed(run: Path, step: int, edit: Any) -> None:
    """Edit the weights of a checkpoint, with the checksums of what results."""
    path = run / "checkpoints" / f"step-{step:08d}"
    tensors = load_file(path / SUMMED[0])
    edit(tensors)
    save_file(tensors, path / SUMMED[0])
    (path / SUMS).write_text(sha256sums(path, SUMMED))


def test_matrices_with_nan_have_rows_of_nan_and_are_named_once(
    tmp_path: Path, corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trained(tmp_path, corpus, "full", keep_at="0,1", keep=1, checkpoint_every=0)

    def spoil(tensors: dict[str, Tensor]) -> None:
        for layer in (0, 1):
            tensors[f"model.layers.{layer}.mlp.up_proj.weight"][0, 0] = math.nan

    changed(run, 1, spoil)
    measured(run, 1, probe=0)
    said = [r.getMessage() for r in caplog.records if "NaN" in r.getMessage()]
    assert len(said) == 1 and "mlp.up_proj in layer 0" in said[0]
    found = lines(run, 1, "weight", module="mlp.up_proj")
    assert all(math.isnan(x["per"]) and math.isnan(x["condition"]) for x in found)
    assert all(math.isfinite(x["per"]) for x in lines(run, 1, "weight", module="mlp.down_proj"))


def test_a_checkpoint_of_another_shape_than_the_first_is_refused(
    relora: Path, tmp_path: Path, corpus: Path
) -> None:
    run, other = tmp_path / "relora", tmp_path / "other"
    shutil.copytree(relora, run, ignore=shutil.ignore_patterns("analysis"))
    settings = {**ALL, "device": "cpu"}
    model = QWEN | {"intermediate_size": 20}
    train(tiny("relora", corpus, other, train=settings, model=model))
    shutil.rmtree(run / "checkpoints" / "step-00000000")
    shutil.copytree(other / "checkpoints" / "step-00000000", run / "checkpoints/step-00000000")
    with pytest.raises(CheckpointError, match=r"intermediate_size: .* written with 20"):
        analyze([Path(f"{run}@5")], probe=0)


def test_a_checkpoint_that_training_deletes_meanwhile_is_skipped(
    tmp_path: Path, corpus: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = trained(tmp_path, corpus, "full", keep_at="0,1,2", keep=1, checkpoint_every=0)
    real = module.kept_steps

    def deleting(found: Any) -> list[int]:
        steps = real(found)
        shutil.rmtree(run / "checkpoints" / "step-00000001", ignore_errors=True)
        return steps

    monkeypatch.setattr(module, "kept_steps", deleting)
    analyze([run], probe=0)
    assert "full@1: deleted by the training meanwhile, skipped" in caplog.text
    assert {p.stem for p in (run / "analysis").glob("*.json")} == {"0", "2", str(STEPS)}


def test_a_comparison_with_a_step_that_training_deletes_meanwhile_is_left_out(
    tmp_path: Path, corpus: Path, monkeypatch: Any
) -> None:
    run = trained(tmp_path, corpus, "full", keep_at="0,1,2", keep=1, checkpoint_every=0)
    real = sources.kept_steps

    def deleting(found: Any) -> list[int]:
        steps = real(found)
        shutil.rmtree(run / "checkpoints" / "step-00000001", ignore_errors=True)
        return steps

    monkeypatch.setattr(sources, "kept_steps", deleting)
    assert analyze([Path(f"{run}@2")], probe=0) == [run / "analysis" / "2.csv"]
    said = json.loads((run / "analysis" / "2.json").read_text())
    assert said["compared_with"]["before"] is None
    assert said["not_measured"]["update"] == "the checkpoint of step 1 was deleted meanwhile"


def test_all_but_a_damaged_checkpoint_are_analyzed_and_it_is_named(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path, corpus, "full", keep_at="0,1,2", keep=1, checkpoint_every=0)
    damaged = run / "checkpoints" / "step-00000001"
    (damaged / "model.safetensors").write_bytes(b"x")
    assert main(["analyze", str(run), "--probe=0", "--device=cpu"]) == 1
    err = " ".join(capsys.readouterr().err.split())
    assert err == (
        f"error: {damaged} is damaged (model.safetensors does not match its checksum); choose"
        " another step; the other 3 are done"
    )
    assert {p.stem for p in (run / "analysis").glob("*.json")} == {"0", "2", str(STEPS)}
    said = json.loads((run / "analysis" / "2.json").read_text())
    assert said["not_measured"]["update"] == "the checkpoint of step 1 is damaged"
    assert {line["what"] for line in read_table(run / "analysis" / "2.csv")} >= {"from_start"}


def test_analyze_says_when_training_deletes_every_checkpoint(
    tmp_path: Path, corpus: Path, monkeypatch: Any
) -> None:
    run = trained(tmp_path, corpus, "full", keep=1, checkpoint_every=0)

    def deleting(found: Any) -> list[int]:
        shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}", ignore_errors=True)
        return [STEPS]

    monkeypatch.setattr(module, "kept_steps", deleting)
    with pytest.raises(CheckpointError, match=r"deleted every checkpoint .*--train\.keep"):
        analyze([run], probe=0)


def test_extra_columns_are_there_in_every_table(relora: Path) -> None:
    measured(relora, 1)
    (line, *_) = read_table(relora / "analysis" / "1.csv")
    assert set(EXTRA) <= line.keys()
    assert EVENT == 3  # the merges of this page


@pytest.mark.parametrize("name", ["40.csv", "40.spectra.csv"])
def test_a_table_that_is_missing_or_changed_is_measured_again(name: str, tmp_path: Path) -> None:
    output, asked = Output(tmp_path, "40"), {"step": 40}
    output.write([], "run", 40, {**asked, "seconds": 1.0})
    assert output.finished(asked) and not output.finished({"step": 41})
    file = tmp_path / name
    for content in ("", "run,step\n", None):
        output.write([], "run", 40, asked)
        file.write_text(content) if content is not None else file.unlink()
        assert not output.finished(asked), content


def test_without_a_run_there_is_nothing_to_analyze() -> None:
    with pytest.raises(CheckpointError, match="no run is given"):
        analyze([])
