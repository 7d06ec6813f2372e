"""`peptrain eval --tasks` on runs and directories, and tasks during training."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import rows, tiny, untimed
from task_rows import write_data

from peptrain.cli.app import main
from peptrain.config import dump, essence, resolved
from peptrain.errors import ConfigError, DataError
from peptrain.exporting.export import export
from peptrain.sections import EvalConfig
from peptrain.testing import newest, same
from peptrain.training.loop import train

ASKED = {"tasks": "blimp,piqa,wikitext", "items": 5}


@pytest.fixture(scope="module")
def originals(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, two runs, a dense and a factorised export."""
    folder = tmp_path_factory.mktemp("made")
    write_data(folder / "data")
    for name in ("full", "lowrank"):
        train(tiny(name, corpus, folder / name, train={"seq_len": 64, "steps": 2}))
    export(folder / "full", folder / "dense")
    export(folder / "lowrank", folder / "small", "factorised")
    return folder


@pytest.fixture
def made(originals: Path, tmp_path: Path) -> Path:
    """The same for one test, which may keep results in it."""
    return shutil.copytree(originals, tmp_path / "made")


def judged(folder: Path, run: str, *given: str) -> int:
    return main(["eval", str(folder / run), "--tasks-data", str(folder / "data"), *given])


def entries(run: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((run / "eval.json").read_text())
    return found


def test_a_run_keeps_its_results_and_its_items_and_measures_nothing_twice(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "full", tmp_path / "full")
    shutil.copytree(made / "data", tmp_path / "data")
    assert judged(tmp_path, "full", "--tasks", "blimp,boolq") == 0
    assert "argument_structure" in capsys.readouterr().out
    blimp, boolq = entries(tmp_path / "full")
    assert (blimp["task"], blimp["step"], blimp["items"]) == ("blimp", 2, 9)
    lines = (tmp_path / "full" / "eval" / "boolq.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines]
    assert [(row["step"], row["id"]) for row in kept] == [(2, 0), (2, 1)]
    assert boolq["acc"] == sum(row["correct"] for row in kept) / 2
    assert judged(tmp_path, "full", "--tasks", "blimp,boolq,piqa") == 0
    assert capsys.readouterr().out.count("was measured before") == 2
    assert [entry["task"] for entry in entries(tmp_path / "full")] == ["blimp", "boolq", "piqa"]
    assert judged(tmp_path, "full", "--tasks", "boolq", "--limit", "1") == 0
    assert entries(tmp_path / "full")[-1]["items"] == 1


def test_an_export_is_the_run_and_a_factorised_one_is_judged(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    given = ("--tasks", "bpt", "--positions", "64", "--out", str(out))
    assert judged(made, "dense", *given, "--against", str(made / "full")) == 0
    assert "mean accuracy" in capsys.readouterr().out
    *found, tests = json.loads(out.read_text())
    assert len(found) == 9
    for name, test in tests["tests"].items():
        assert test["only_a"] == test["only_b"] == 0 and test["mcnemar_p"] == 1, name
    assert judged(made, "small", "--tasks", "piqa", "--positions", "64") == 0


def test_several_corpora_have_a_macro_mean(
    made: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(corpus, tmp_path / "other")
    both = ["--data", str(corpus), "--data", str(tmp_path / "other")]
    assert main(["eval", str(made / "dense"), *both, "--positions", "64"]) == 0
    assert "macro mean" in capsys.readouterr().out
    assert main(["eval", str(made / "full"), *both]) == 0
    one, other = entries(made / "full")[-1]["domains"].values()
    assert one == other
    assert entries(made / "full")[-1]["macro_loss"] == pytest.approx(one["loss"])


@pytest.mark.parametrize(
    "given, said",
    [
        (["full", "--tasks", "blimpp"], "--tasks: unknown task 'blimpp'; did you mean 'blimp'"),
        (["full", "--tasks", "piqa", "--limit", "0"], "--limit: must be >= 1 (got 0)"),
        (["full", "--tasks", "piqa", "--positions", "3"], "piqa: item 0: the continuation"),
        (["data", "--tasks", "piqa"], "neither a run directory (no config.toml) nor a Hugging"),
        (["dense"], "--tasks: must be given for"),
        (["full", "--limit", "3"], "--limit: must be given with --tasks"),
        (["full", "--tasks", "swde"], "--tasks: swde generates text"),
        (["full", "--tasks", "piqa", "--harness"], "--harness: needs the lm-evaluation-harness"),
    ],
)
def test_what_can_not_be_judged_is_told_in_one_line(
    made: Path, given: list[str], said: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    data = [] if "--tasks" not in given else ["--tasks-data", str(made / "data")]
    assert main(["eval", str(made / given[0]), *given[1:], *data]) == 1
    [line] = " ".join(capsys.readouterr().err.split()).split(" error: ")[-1:]
    assert said in line


def test_another_tokenizer_is_told(
    made: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "dense", tmp_path / "dense")
    shutil.copytree(made / "data", tmp_path / "data")
    file = tmp_path / "dense" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["zzz"] = 300
    file.write_text(json.dumps(content))
    assert main(["eval", str(tmp_path / "dense"), "--data", str(corpus)]) == 1
    assert "prepared with another tokenizer" in " ".join(capsys.readouterr().err.split())
    given = ("--tasks", "piqa", "--positions", "64", "--against", str(made / "full"))
    assert judged(tmp_path, "dense", *given) == 0
    assert "its tokenizer differs" in " ".join(capsys.readouterr().out.split())


def test_tasks_during_training_change_no_bit_and_are_in_the_rows(
    made: Path, corpus: Path, tmp_path: Path
) -> None:
    every = {"train": {"seq_len": 64, "steps": 4, "eval_every": 2}}
    plain, asked = tmp_path / "plain", tmp_path / "asked"
    train(tiny("full", corpus, plain, **every))
    config = tiny("full", corpus, asked, **every)
    train(with_tasks(config, made / "data"))
    a, b = newest(plain).model, newest(asked).model
    assert all(same(a[name], b[name]) for name in a)
    row, end = rows(asked, "eval")[0], rows(asked, "end")[0]
    assert {"blimp_acc", "piqa_acc_norm", "wikitext_byte_perplexity", "tasks_seconds"} <= row.keys()
    kept = {key: value for key, value in end.items() if key.startswith(("blimp", "piqa", "wiki"))}
    assert kept and all(isinstance(value, float) for value in kept.values())
    names = {key for key in row if key.startswith(("blimp_", "piqa_", "wikitext_", "tasks_"))}
    assert [{k: v for k, v in r.items() if k not in names} for r in untimed(asked)] == untimed(
        plain
    )


def with_tasks(config: Any, data: Path, **given: Any) -> Any:
    return replace(config, eval=EvalConfig(tasks_data=data, **{**ASKED, **given}))


def test_bad_tasks_are_refused_before_anything_is_written(
    made: Path, corpus: Path, tmp_path: Path
) -> None:
    config = tiny("full", corpus, tmp_path / "run", train={"seq_len": 64})
    with pytest.raises(ConfigError, match=r"eval\.tasks: unknown task 'blimb'"):
        train(with_tasks(config, made / "data", tasks="blimb"))
    with pytest.raises(DataError, match="is missing, for piqa"):
        train(with_tasks(config, tmp_path, tasks="piqa"))
    short = tiny("full", corpus, tmp_path / "run", train={"seq_len": 4})
    with pytest.raises(DataError, match="only 4 positions"):
        train(with_tasks(short, made / "data", tasks="piqa"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"eval\.tasks_data: must be the directory"):
        EvalConfig(tasks="blimp")
    with pytest.raises(ConfigError, match=r"eval\.items"):
        EvalConfig(items=0)


def test_a_run_without_tasks_has_the_name_it_always_had(corpus: Path) -> None:
    config = resolved(tiny("full", corpus), world_size=1, on_gpu=False)
    assert "eval]" not in essence(config) and "[eval]" in dump(config)
    assert 'tasks = "blimp"' in essence(with_tasks(config, corpus, tasks="blimp"))


def test_results_are_columns_of_a_comparison(made: Path, corpus: Path, tmp_path: Path) -> None:
    from peptrain.comparison.summary import outcome, summarize
    from peptrain.comparison.table import Comparison, as_csv, markdown
    from peptrain.runs.directory import RunDir

    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    end = {"event": "end", "step": 8, "held_out_loss": 2.0, "trainable": 1, "state_bytes": 8,
           "tokens_per_second": 9.0, "blimp_acc": 0.75, "blimp_acc_stderr": 0.1}  # fmt: skip
    run.record(end)
    planned: Any = type("Planned", (), {
        "configuration": "full", "label": "full", "method": "full", "lr": 0.1, "steps": 8,
        "tokens": 64, "cost": None, "config": tiny("full", corpus)})()  # fmt: skip
    made_table = Comparison(summarize([outcome(planned, run)]), "tokens", 100)
    assert "| blimp_acc |" in markdown(made_table) and "0.7500" in markdown(made_table)
    assert as_csv(made_table).splitlines()[0].endswith(",errors,blimp_acc")
    assert as_csv(made_table).splitlines()[1].endswith(",0.75")
