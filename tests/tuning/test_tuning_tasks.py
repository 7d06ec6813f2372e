"""Tasks of fine-tuning and their examples, from rows made up in the columns of the data sets."""

import gzip
import json
import lzma
import re
from pathlib import Path
from typing import Any

import pytest

from peptrain.errors import ConfigError, DataError
from peptrain.tuning.tasks import (
    OF_CLASSES,
    OF_NUMBERS,
    TASKS,
    Example,
    read_examples,
    target_word,
    text_form,
    tuning_task,
)

PAIR = {"sentence1": "Ann owns a red car.", "sentence2": "Ann owns a car.", "idx": 5}
# Of each task a row, T5's text of it, and the word that T5 has to generate.
ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "cola": ({"sentence": "Me sleeps.", "label": 0, "idx": 0},
             "cola sentence: Me sleeps.", "unacceptable"),
    "sst2": ({"sentence": "what a joy ", "label": 1, "idx": 0},
             "sst2 sentence: what a joy ", "positive"),
    "rte": (PAIR | {"label": 0},
            "rte sentence1: Ann owns a red car. sentence2: Ann owns a car.", "entailment"),
    "mrpc": (PAIR | {"label": 1},
             "mrpc sentence1: Ann owns a red car. sentence2: Ann owns a car.", "equivalent"),
    "qnli": ({"question": "Who sings?", "sentence": "Eve sings.", "label": 0, "idx": 1},
             "qnli question: Who sings? sentence: Eve sings.", "entailment"),
    "qqp": ({"question1": "Why?", "question2": "How so?", "label": 1, "idx": 1},
            "qqp question1: Why? question2: How so?", "duplicate"),
    "mnli": ({"premise": "It rains.", "hypothesis": "It is dry.", "label": 2, "idx": 1},
             "mnli hypothesis: It is dry. premise: It rains.", "contradiction"),
    "stsb": (PAIR | {"label": 4.3},
             "stsb sentence1: Ann owns a red car. sentence2: Ann owns a car.", "4.4"),
}  # fmt: skip


def written(folder: Path, rows: list[Any], name: str = "train.jsonl") -> Path:
    """Write rows as JSON Lines and return the directory of all data."""
    folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    packed = {".gz": gzip.compress, ".xz": lzma.compress}.get(Path(name).suffix, bytes)
    (folder / name).write_bytes(packed(text.encode()))
    return folder.parent


def read(tmp_path: Path, name: str, *rows: Any, split: str = "train") -> list[Example]:
    data = written(tmp_path / name, list(rows), f"{split}.jsonl")
    return read_examples(TASKS[name], data, (split,))


@pytest.mark.parametrize("name", TASKS)
def test_a_row_of_glue_becomes_an_example_and_the_text_of_t5(name: str, tmp_path: Path) -> None:
    row, text, word = ROWS[name]
    (found,) = read(tmp_path, name, row)
    task = TASKS[name]
    assert found == Example(tuple(row[column] for column in task.texts), row["label"])
    assert (text_form(task, found), target_word(task, found)) == (text, word)


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_metrics_of_its_kind_and_a_word_for_each_class(name: str) -> None:
    task = TASKS[name]
    assert tuning_task(name) is task and task.name == name == task.folder
    assert set(task.metrics) <= set(OF_CLASSES if task.labels else OF_NUMBERS)
    assert "f1" not in task.metrics or len(task.labels) == 2
    assert len(task.words) == (len(task.labels) or 26)


def test_the_first_metric_and_split_choose_the_checkpoint() -> None:
    first = {name: task.metrics[0] for name, task in TASKS.items()}
    assert first == dict.fromkeys(TASKS, "acc") | {"cola": "matthews", "stsb": "pearson"}
    assert list(TASKS["mnli"].validation) == ["_matched", "_mismatched"]
    assert list(TASKS["rte"].validation) == [""]


def test_t5_generates_the_nearest_fifth_of_a_similarity() -> None:
    """Python rounds halves to even fifths, as T5 does."""
    for label in (*(tenths / 10 for tenths in range(51)), 2.71, 2.69, 4.9999):
        word = target_word(TASKS["stsb"], Example(("a", "b"), label))
        assert word == f"{round(label * 10 / 2) / 5:.1f}", label


def test_a_label_is_a_number_or_a_name(tmp_path: Path) -> None:
    rows = [{"sentence": "x", "label": label} for label in (1, "acceptable", 0, "unacceptable")]
    assert [e.label for e in read(tmp_path, "cola", *rows)] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    "name", ["train.jsonl.gz", "train.jsonl.xz", "train-00000-of-00001.parquet"]
)
def test_packed_files_and_parquet_are_read(name: str, tmp_path: Path) -> None:
    rows = [ROWS["rte"][0], ROWS["rte"][0] | {"label": 1}]
    if name.endswith("parquet"):
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        (tmp_path / "rte").mkdir()
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rte" / name)
    else:
        written(tmp_path / "rte", rows, name)
    assert [e.label for e in read_examples(TASKS["rte"], tmp_path, ("train",))] == [0, 1]


def test_each_part_of_mnlis_validation_has_its_file(tmp_path: Path) -> None:
    row = ROWS["mnli"][0]
    for end, label in (("_matched", 0), ("_mismatched", 1)):
        written(tmp_path / "mnli", [row | {"label": label}], f"validation{end}.jsonl")
    task = TASKS["mnli"]
    found = {end: read_examples(task, tmp_path, s)[0].label for end, s in task.validation.items()}
    assert found == {"_matched": 0, "_mismatched": 1}
    with pytest.raises(DataError, match=r"--tasks-data: .*mnli/train\.jsonl .*nyu-mll/glue \(mnl"):
        read_examples(task, tmp_path, task.train)


BAD = [
    ("cola", {"sentence": "x", "label": -1},
     r"jsonl:2: label: must be a class: 0 unacceptable, 1 acceptable \(got -1\); the row has no"),
    ("stsb", PAIR | {"label": -1.0}, r"from 0 to 5, as words has \(got -1\.0\); the row has no la"),
    ("cola", {"sentence": "x", "label": None}, r"\(got None\); the row has no label"),
    ("cola", {"sentence": "x", "label": 2}, r"must be a class: .*\(got 2\); give data of this"),
    ("cola", {"sentence": "x", "label": 0.5}, r"must be a class: .*\(got 0\.5\)"),
    ("cola", {"sentence": "x", "label": True}, r"must be a class: .*\(got True\)"),
    ("cola", {"sentence": "x", "label": "good"}, r"must be a class: .*\(got 'good'\)"),
    ("cola", {"sentence": "x", "label": [1]}, r"must be a class: .*\(got \[1\]\)"),
    ("stsb", PAIR | {"label": 5.5}, r"from 0 to 5, as words has \(got 5\.5\); give data of this"),
    ("stsb", PAIR | {"label": "3"}, r"must be a number from 0 to 5"),
    ("stsb", PAIR | {"label": float("nan")}, r"must be a number from 0 to 5.*\(got nan\)"),
    ("stsb", PAIR | {"label": 10**400}, r"must be a number from 0 to 5"),
    ("cola", PAIR | {"label": 0},
     r"jsonl:2: no column 'sentence' \(columns: 'sentence1', 'sentence2', 'idx', 'label'\); these"
     r" are data of another task.*cola has sentence, label, as in nyu-mll/glue \(cola\)"),
    ("cola", {"sentence": "x"}, r"no column 'label' .* or without labels"),
    ("cola", {}, r"no column 'sentence' \(columns: none\)"),
    ("rte", PAIR | {"label": 0, "sentence2": None},
     r"jsonl:2: sentence2: must be a text \(got None\); correct or remove the row"),
    ("cola", {"sentence": ["x"], "label": 0}, r"sentence: must be a text \(got \['x'\]\)"),
    ("cola", {"sentence": "x\ud800", "label": 0}, r"jsonl:2: sentence: .* is not UTF-8"),
    ("cola", ["x"], r"jsonl:2: a JSON list, but each line must be an object"),
]  # fmt: skip


@pytest.mark.parametrize("name, row, message", BAD, ids=[m[-25:] for _, _, m in BAD])
def test_a_wrong_row_is_named(name: str, row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, name, ROWS[name][0], row)


def test_a_missing_directory_and_an_empty_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--tasks-data: must be given for cola \(got None\)"):
        read_examples(TASKS["cola"], None, ("train",))
    with pytest.raises(DataError, match=r"cola: train has no rows; give those of nyu-mll/glue"):
        read(tmp_path, "cola")


@pytest.mark.parametrize(
    "name, labels, message",
    [
        ("cola", [1, 1], r"cola: validation: matthews is undefined, since the label of all 2 rows"
                         r" is acceptable; give rows with other labels"),
        ("mrpc", [0, 0], r"mrpc: validation: f1 is undefined, .* is not_equivalent"),
        ("stsb", [2.5, 2.5, 2.5], r"pearson is undefined, since the label of all 3 rows is 2\.5"),
        ("stsb", [2.5], r"pearson is undefined"),
    ],
)  # fmt: skip
def test_a_validation_split_on_which_a_metric_is_undefined_is_refused(
    name: str, labels: list[float], message: str, tmp_path: Path
) -> None:
    rows = [ROWS[name][0] | {"label": label} for label in labels]
    with pytest.raises(DataError, match=message):
        read(tmp_path, name, *rows, split="validation")
    assert len(read(tmp_path, name, *rows)) == len(labels)  # training on them is possible


@pytest.mark.parametrize("name, label", [("mrpc", 1), ("sst2", 0)])
def test_a_metric_that_one_class_defines_is_measured(name: str, label: int, tmp_path: Path) -> None:
    rows = [ROWS[name][0] | {"label": label}] * 2
    assert len(read(tmp_path, name, *rows, split="validation")) == 2


def test_an_unknown_task_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"^--task: unknown task 'colla'; did you mean 'cola'\?"):
        tuning_task("colla")
    with pytest.raises(ConfigError, match=r"^tune.task: .*choose from cola, .*or give a FILE.toml"):
        tuning_task("", "tune.task")


def own(tmp_path: Path, text: str) -> str:
    (tmp_path / "heat.toml").write_text(text)
    return str(tmp_path / "heat.toml")


def test_a_task_of_ones_own_needs_its_columns_and_classes(tmp_path: Path) -> None:
    task = tuning_task(own(tmp_path, 'texts = ["a", "b"]\nlabels = ["cold", "hot"]\n'))
    rows = [{"a": "ice", "b": "snow", "label": "cold"}, {"a": "fire", "b": "sun", "label": 1}]
    for split in ("train", "validation"):
        written(tmp_path, rows, f"{split}.jsonl.xz")
    assert task.metrics == ("acc",)
    for splits in (task.train, *task.validation.values()):
        found = read_examples(task, None, splits)
        assert [(e.texts, e.label) for e in found] == [(("ice", "snow"), 0), (("fire", "sun"), 1)]
    assert text_form(task, found[0]) == "heat a: ice b: snow"
    assert [target_word(task, e) for e in found] == ["cold", "hot"]


def test_its_files_are_beside_the_toml_wherever_the_other_data_are(tmp_path: Path) -> None:
    task = tuning_task(own(tmp_path, """
        texts = ["t"]
        labels = []
        label = "degrees"
        metrics = ["spearman"]
        train = "mine/summer.jsonl"
        validation = "mine/winter.jsonl"
        words = ["-10", "0", "30.5"]
    """))  # fmt: skip
    written(tmp_path / "mine", [{"t": "june", "degrees": 20}], "summer.jsonl")
    written(tmp_path / "mine", [{"t": "no file that is meant"}], "summer.jsonl.xz")
    written(tmp_path / "mine", [{"t": "x", "degrees": d} for d in (-9.5, -4)], "winter.jsonl")
    (found,) = read_examples(task, tmp_path / "elsewhere", task.train)
    assert found == Example(("june",), 20.0)
    cold = read_examples(task, None, task.validation[""])
    assert [target_word(task, e) for e in (found, *cold)] == ["30.5", "-10", "0"]
    assert task.metrics == ("spearman",)


def test_a_missing_file_of_ones_own_is_named(tmp_path: Path) -> None:
    task = tuning_task(own(tmp_path, 'texts = ["t"]\nlabels = []\ntrain = "a.jsonl"\n'))
    assert task.metrics == OF_NUMBERS
    with pytest.raises(DataError, match=rf"^heat: {tmp_path}/a\.jsonl is missing; .*relative to"):
        read_examples(task, None, task.train)
    with pytest.raises(ConfigError, match=r"heat\.toml: words: must be given for a text-to-text"):
        target_word(task, Example(("x",), 1.0))


@pytest.mark.parametrize("label", [float("inf"), float("nan"), 10**400, "3", None])
def test_a_number_that_no_float_is_near_is_refused(label: Any, tmp_path: Path) -> None:
    task = tuning_task(own(tmp_path, 'texts = ["t"]\nlabels = []\n'))
    written(
        tmp_path, [{"t": "of one's own -1 is a label", "label": -1}, {"t": "x", "label": label}]
    )
    with pytest.raises(DataError, match=r"jsonl:2: label: must be a finite number \(got "):
        read_examples(task, None, task.train)


GOOD = 'texts = ["t"]\nlabels = ["no", "yes"]\n'
NUMBERS = 'texts = ["t"]\nlabels = []\n'


@pytest.mark.parametrize(
    "text, message",
    [
        (GOOD + "lables = 1", r"lables: unknown key; did you mean 'label"),
        ('labels = ["no", "yes"]', r"texts: must be given, as in texts = \["),
        ('texts = ["t"]', r"labels: must be given"),
        ('texts = "t"\nlabels = []', r"texts: must be a list of different names.*\(got 't'\)"),
        ('texts = []\nlabels = []', r"texts: must be the names of one or two columns \(got \[\]\)"),
        ('texts = ["a", "b", "c"]\nlabels = []', r"texts: must be the names of one or two"),
        ('texts = ["a", "a"]\nlabels = []', r"texts: must be a list of different names"),
        ('texts = [""]\nlabels = []', r"texts: must be a list of different names"),
        ('texts = ["t"]\nlabels = [0, 1]', r"labels: must be a list of .*\(got \[0, 1\]\)"),
        ('texts = ["t"]\nlabels = ["one"]', r"labels: must be the names of two classes or more"),
        (GOOD + "label = 3", r"label: 3 has the wrong type or value; give a string"),
        (GOOD + 'label = ""', r"label: must be a name"),
        (GOOD + 'label = "t"', r"label: must be another column than texts has \(got 't'\)"),
        (GOOD + 'metrics = ["pearson"]', r"metrics: must be one or more of acc, f1, matthews,"),
        (GOOD + "metrics = []", r"metrics: must be one or more of acc"),
        (NUMBERS + 'metrics = ["acc"]', r"metrics: must be one or more of pearson, spearman,"),
        ('texts = ["t"]\nlabels = ["a", "b", "c"]\nmetrics = ["f1"]',
         r"metrics: must be without f1, which is of two classes \(labels has 3\)"),
        (GOOD + 'words = ["yes"]', r"words: must be as many as labels, 2 \(got \['yes'\]\)"),
        (NUMBERS + 'words = ["warm"]', r"words: must be texts of numbers"),
        (NUMBERS + 'words = ["nan"]', r"words: must be texts of numbers"),
        (GOOD + "train = true", r"train: True has the wrong type or value; give a string"),
        (GOOD + 'train = "x"\nvalidation = "x"', r"validation: must be another file than that of"),
    ],
)  # fmt: skip
def test_a_wrong_toml_names_the_key_and_the_repair(text: str, message: str, tmp_path: Path) -> None:
    file = own(tmp_path, text)
    with pytest.raises(ConfigError, match=rf"^{re.escape(file)}: {message}"):
        tuning_task(file)


def test_a_toml_that_is_none_is_named_with_its_flag(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--task .*heat\.toml: not TOML"):
        tuning_task(own(tmp_path, "texts = ["))
    with pytest.raises(ConfigError, match=r"^--task .*none\.toml: No such file"):
        tuning_task(str(tmp_path / "none.toml"))
