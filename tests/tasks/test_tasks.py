"""Texts, tokens and scores of tasks: against counts by hand, and models whose answer is known."""

import gzip
import json
import lzma
import math
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from task_rows import CHOICES, ROWS
from torch import Tensor, nn

from peptrain.errors import ConfigError, DataError
from peptrain.tasks.files import first, items_of, pages, read_rows, subsample
from peptrain.tasks.measure import Judge, measure
from peptrain.tasks.paired import mcnemar, paired, two_sided, z_of_proportions
from peptrain.tasks.score import scores
from peptrain.tasks.spans import Encode, Encoder, Span, page_spans, spans
from peptrain.tasks.table import GROUPS, SCORED, TASKS, chosen_tasks, detokenized

V, END = 260, 256


def encoder() -> Encoder:
    """A token per byte; END stands before a text without context."""
    return encoder_by(lambda texts, add: [list(t.encode()) for t in texts])


def encoder_by(encode: Encode) -> Encoder:
    return Encoder(encode, END, "", {}, lambda ids: bytes(ids).decode(), (END,))


class Model(nn.Module):
    """A causal model of random logits, from all tokens before. `told` sequences are likely."""

    device = torch.device("cpu")

    def __init__(self, told: Sequence[Span] = (), uniform: bool = False) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.table = torch.randn(V, V, generator=draw, dtype=torch.float64) * (not uniform)
        self.told = {
            span.tokens[:n]: span.tokens[n]
            for span in told
            for n in range(len(span.tokens) - span.scored, len(span.tokens))
        }

    def get_input_embeddings(self) -> nn.Embedding:
        return nn.Embedding(V, 1)

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        logits = self.table[input_ids].cumsum(1)
        for row, ids in enumerate(input_ids.tolist() if self.told else ()):
            for n in range(len(ids)):
                if (token := self.told.get(tuple(ids[: n + 1]))) is not None:
                    logits[row, n, token] += 1000
        return SimpleNamespace(logits=logits)


def judge(model: Any, positions: int = 300) -> Judge:
    return Judge(model, encoder(), positions)


def items(name: str) -> list[Any]:
    return first(items_of(TASKS[name], ROWS[name]), None)


def by_hand(model: Model, span: Span) -> float:
    """log p of the end of one sequence, token by token, in Python's floats."""
    total = 0.0
    for n in range(len(span.tokens) - span.scored, len(span.tokens)):
        ids = torch.tensor([span.tokens[:n]])
        logits = [float(x) for x in model(input_ids=ids, use_cache=False).logits[0, -1]]
        top = max(logits)
        total += logits[span.tokens[n]] - top - math.log(sum(math.exp(x - top) for x in logits))
    return total


def test_every_task_has_rows_here() -> None:
    assert ROWS.keys() == TASKS.keys()
    assert len(GROUPS["bpt"]) == 9


@pytest.mark.parametrize("name", SCORED)
def test_a_model_that_knows_the_answers_scores_1(name: str) -> None:
    task, chosen = TASKS[name], items(name)
    if task.kind == "page":
        return
    gold = [item.requests[item.gold] for _, item in chosen]
    told = spans(gold, encoder(), 300, ["" for _ in gold])
    found = measure(judge(Model(told)), task, chosen).values
    assert found["acc"] == 1
    assert found.get("acc_norm", 1) == 1
    assert found.get("perplexity", 1) == pytest.approx(1, abs=1e-9)


def test_a_uniform_model_guesses() -> None:
    """Choices of equal length are equally likely, and the first is taken."""
    rows = [
        {"question": f"{n}?", "choices": CHOICES | {"text": ["ab", "cd", "ef", "gh"]},
         "answerKey": "ABCD"[n % 4]} for n in range(40)
    ]  # fmt: skip
    task = TASKS["arc_easy"]
    found = measure(judge(Model(uniform=True)), task, first(items_of(task, rows), None)).values
    assert found["acc"] == found["acc_norm"] == 0.25
    assert found["acc_stderr"] == pytest.approx(math.sqrt(0.25 * 0.75 / 39))
    word = measure(judge(Model(uniform=True)), TASKS["lambada_openai"], items("lambada_openai"))
    assert word.values["perplexity"] == pytest.approx(V ** ((6 + 5) / 2))  # " house", " sang"


def test_byte_perplexity_is_counted_by_hand_on_three_documents() -> None:
    model = Model()
    found = measure(judge(model, positions=11), TASKS["wikitext"], items("wikitext"))
    loss, words, size = 0.0, 0, 0
    for row in ROWS["wikitext"]:
        tokens = [END, *detokenized(row["page"]).encode()]
        for n in range(1, len(tokens)):
            start = (n - 1) // 11 * 11
            if start + 11 >= len(tokens) - 1:  # the last window is as long as the others
                start = max(0, len(tokens) - 1 - 11)
            loss -= by_hand(model, Span(tuple(tokens[start : n + 1]), 1))
        words += len(row["page"].split()) + 2  # the harness counts the empty ends
        size += len(row["page"].encode())
    assert found.values["byte_perplexity"] == pytest.approx(math.exp(loss / size), rel=1e-12)
    assert found.values["word_perplexity"] == pytest.approx(math.exp(loss / words), rel=1e-12)
    assert found.values["bits_per_byte"] == pytest.approx(loss / size / math.log(2), rel=1e-12)


def test_a_score_is_counted_by_hand_whatever_the_batch() -> None:
    model, draw = Model(), torch.Generator().manual_seed(1)
    given = []
    for n in range(2, 30):
        ids = torch.randint(V, (n,), generator=draw).tolist()
        given.append(Span(tuple(ids), 1 + n // 3))
    wanted = [by_hand(model, span) for span in given]
    for tokens in (1, 40, 10_000):
        found = scores(model, given, tokens=tokens)  # type: ignore[arg-type]
        assert [s.log_likelihood for s in found] == pytest.approx(wanted, rel=1e-12)


def test_a_window_predicts_each_token_once() -> None:
    text = "abcdefghij"
    found = page_spans(text, encoder(), 4)
    assert [bytes(s.tokens[-s.scored :]) for s in found] == [b"abcd", b"efgh", b"ij"]
    assert found[0].tokens[0] == END
    assert bytes(found[1].tokens) == b"defgh"
    assert bytes(found[2].tokens) == b"fghij"
    assert page_spans("", encoder(), 4) == []


def test_contexts_are_cut_on_the_left_and_continuations_never() -> None:
    [found] = spans([("abcdef ", "gh")], encoder(), 5, ["x"])
    assert bytes(found.tokens) == b"def gh" and found.scored == 3  # the space moved
    with pytest.raises(DataError, match=r"^piqa: item 3: .* 6 tokens and the model only 5 pos"):
        spans([("a", "bcdefg")], encoder(), 5, ["piqa: item 3"])
    with pytest.raises(DataError, match="adds no token"):
        spans([("a", "")], encoder(), 5, ["x"])


def test_the_context_has_its_own_tokens_where_it_is_no_prefix_of_the_whole() -> None:
    """As for a tokenizer that ends every text with a token."""
    ends = encoder_by(lambda texts, add: [[*t.encode(), *[END] * add] for t in texts])
    [found] = spans([("ab", "cd")], ends, 9, ["x"])
    assert found == Span((97, 98, END, 100, END), 2)


def test_a_text_without_context_follows_the_prefix_once() -> None:
    [found] = spans([("", "ab")], encoder(), 5, ["x"])
    assert found == Span((END, 97, 98), 2)
    begins = encoder_by(lambda texts, add: [[END, *t.encode()] for t in texts])
    [found] = spans([("", "ab")], begins, 5, ["x"])
    assert found == Span((END, 97, 98), 2)


@pytest.mark.parametrize(
    "name, number, requests, gold",
    [
        ("blimp", 0, [("", " The cats sleep."), ("", " The cats sleeps.")], 0),
        ("lambada_openai", 1, [('He sang: "la la"\n\nand she', " sang")], 0),
        ("winogrande", 0, [("Ann paid Eve since Ann", " was tired."),
                           ("Ann paid Eve since Eve", " was tired.")], 1),
        ("boolq", 0, [("Water is wet.\nQuestion: is water wet?\nAnswer:", " no"),
                      ("Water is wet.\nQuestion: is water wet?\nAnswer:", " yes")], 1),
        ("sciq", 0, [("Apples fall.\nQuestion: What falls?\nAnswer:", f" {choice}")
                     for choice in ("up", "left", "air", "apples")], 3),
        ("hellaswag", 0, [("Cooking: A man stands. He", f" {ending}")
                          for ending in (" eats", "sings aloud", "sleeps", "is gone")], 2),
    ],
)  # fmt: skip
def test_the_texts_are_the_harness_s(
    name: str, number: int, requests: list[tuple[str, str]], gold: int
) -> None:
    [*_, (_, item)] = items(name)[: number + 1]
    assert list(item.requests) == requests and item.gold == gold


def test_blimp_is_the_mean_of_its_paradigms_by_category() -> None:
    """s-selection is counted under argument structure, as in the paper."""
    task, chosen = TASKS["blimp"], items("blimp")
    found = measure(judge(Model()), task, chosen)
    right = [row["correct"] for row in found.rows]
    of = {uid: sum(right[3 * n : 3 * n + 3]) / 3 for n, uid in enumerate(("one", "two", "three"))}
    assert {uid: found.groups[uid]["acc"] for uid in of} == of
    assert found.groups["argument_structure"]["acc"] == of["two"]
    assert found.values["acc"] == pytest.approx(sum(of.values()) / 3)
    errors = [found.groups[uid]["acc_stderr"] for uid in of]
    assert found.values["acc_stderr"] == pytest.approx(math.hypot(*errors) / 3)


def test_a_limit_takes_the_first_of_each_paradigm_and_a_subsample_is_fixed() -> None:
    every = items_of(TASKS["blimp"], ROWS["blimp"])
    assert [n for n, _ in first(every, 2)] == [0, 1, 3, 4, 6, 7]
    some = [n for n, _ in subsample(every, 4)]
    assert len(some) == 4 and some == sorted(some)
    assert some == [n for n, _ in subsample([*every, *every], 18) if n in some]
    assert len(subsample(every, 100)) == 9


@pytest.mark.parametrize("b, c", [(0, 0), (3, 9), (12, 12), (1, 0)])
def test_mcnemar_of_few_pairs_is_the_binomial_sum(b: int, c: int) -> None:
    n, k = b + c, min(b, c)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    assert mcnemar(b, c) == pytest.approx(min(1, 2 * tail))


def test_mcnemar_of_many_pairs_is_chi_squared_and_z_the_pooled_one() -> None:
    assert mcnemar(120, 80) == pytest.approx(two_sided(39 / math.sqrt(200)))
    assert two_sided(1.959963984540054) == pytest.approx(0.05)
    z = z_of_proportions(60, 50, 100, 100)
    assert z == pytest.approx(0.1 / math.sqrt(0.55 * 0.45 * 0.02))
    assert z_of_proportions(5, 5, 5, 5) == 0
    a = [{"correct": x} for x in (1, 1, 0, 0, 1)]
    b = [{"correct": x} for x in (1, 0, 1, 0, 0)]
    test = paired(a, b)
    assert (test.both, test.only_a, test.only_b, test.neither) == (1, 2, 1, 1)
    assert test.difference == pytest.approx(0.2)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.xz", "-00000-of-00001.parquet"])
def test_copies_of_the_data_are_read(suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / "piqa"
    folder.mkdir()
    file = folder / f"validation{suffix}"
    text = "".join(json.dumps(row) + "\n" for row in ROWS["piqa"] * 3)
    if suffix.endswith("parquet"):
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(ROWS["piqa"] * 3), file)
    else:
        packed = lzma.compress(text.encode()) if suffix.endswith("xz") else text.encode()
        file.write_bytes(packed)
    assert read_rows(TASKS["piqa"], tmp_path) == ROWS["piqa"] * 3


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_raw_text_of_wikitext_is_split_at_titles(end: str, tmp_path: Path) -> None:
    text = " = A = \n one\n = = B = = \n two\n = C D = \n three\n"
    assert pages(text) == [" = A = \n one\n = = B = = \n two\n", " = C D = \n three\n"]
    (tmp_path / "wikitext").mkdir()
    (tmp_path / "wikitext" / "test.txt").write_text(text, newline=end)
    rows = read_rows(TASKS["wikitext"], tmp_path)
    assert [row["page"] for row in rows] == pages(text)


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    task = TASKS["piqa"]
    with pytest.raises(DataError, match=r"--tasks-data: must be given.*baber/piqa"):
        read_rows(task, None)
    with pytest.raises(DataError, match=r"piqa/validation.jsonl .* is missing.*baber/piqa"):
        read_rows(task, tmp_path)
    with pytest.raises(DataError, match=r"swde/validation.jsonl .* is missing.*/based-swde-v2 "):
        read_rows(TASKS["swde"], tmp_path)
    (tmp_path / "piqa").mkdir()
    file = tmp_path / "piqa" / "validation.jsonl"
    file.write_text('{"goal": "x"}\n[]\n')
    with pytest.raises(DataError, match=r"validation.jsonl:2: a JSON list"):
        read_rows(task, tmp_path)
    with pytest.raises(DataError, match=r"piqa: row 0: no column 'sol1'; it must have goal, sol1"):
        items_of(task, [{"goal": "x"}])
    with pytest.raises(DataError, match="no rows"):
        items_of(task, [])


@pytest.mark.parametrize(
    "name, key, value, wanted",
    [
        ("piqa", "label", 7, "0, 1"),
        ("piqa", "label", -1, "0, 1"),
        ("hellaswag", "label", "", "0, 1, 2, 3"),
        ("boolq", "label", 2, "0, 1"),
        ("boolq", "label", math.nan, "0, 1"),
        ("winogrande", "answer", "", "1, 2"),
        ("arc_easy", "answerKey", "E", "A, B, C, D"),
        ("openbookqa", "answerKey", "E", "A, B, C, D"),
    ],
)
def test_an_answer_that_is_no_choice_is_named_with_its_file_and_where_answers_are(
    name: str, key: str, value: Any, wanted: str, tmp_path: Path
) -> None:
    task, good = TASKS[name], ROWS[name][0]
    folder = tmp_path / task.folder
    folder.mkdir()
    parts = [folder / f"{task.splits[0]}-0000{n}-of-00002.jsonl" for n in range(2)]
    parts[0].write_text(json.dumps(good) + "\n")
    parts[1].write_text(f"{json.dumps(good)}\n{json.dumps(good | {key: value})}\n")
    rows = read_rows(task, tmp_path)
    with pytest.raises(DataError) as caught:
        items_of(task, rows, rows.place)
    assert str(caught.value) == (
        f"{name}: {parts[1]}:2: {key}: must be one of {wanted} (got {value!r}); take the split"
        f" {task.splits[0]} of the Hugging Face data set {task.source}, which has the answers"
    )


@pytest.mark.parametrize("label", [True, 1.0, "1", " 1"])
def test_an_answer_may_be_spelt_as_any_of_the_copies_do(label: object) -> None:
    assert items_of(TASKS["boolq"], [ROWS["boolq"][0] | {"label": label}])[0].gold == 1


@pytest.mark.parametrize("name", ["all.jsonl", "validation.gz", "validation.csv.gz"])
def test_where_no_file_is_of_the_split_what_the_folder_has_is_named(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / name).write_text("")
    with pytest.raises(
        DataError,
        match=rf"piqa/validation.jsonl \(or .jsonl.gz, .* is missing, for piqa; the folder has"
        rf" {re.escape(name)}; save the split validation of the Hugging Face data set baber/piqa",
    ):
        read_rows(TASKS["piqa"], tmp_path)
    for number in range(6):
        (tmp_path / "piqa" / f"a{number}").touch()
    with pytest.raises(DataError, match=r"has a0, a1, a2, a3, a4 and 2 more; save"):
        read_rows(TASKS["piqa"], tmp_path)


def test_blimp_is_a_copy_of_the_parts_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"blimp/all.jsonl .*; save the split train of the 67"
        r" configurations of the Hugging Face data set nyu-mll/blimp, joined",
    ):
        read_rows(TASKS["blimp"], tmp_path)


def test_two_copies_of_a_split_are_refused_and_so_is_packed_parquet(tmp_path: Path) -> None:
    (folder := tmp_path / "piqa").mkdir()
    file, packed = folder / "validation.jsonl", folder / "validation.jsonl.gz"
    text = "".join(json.dumps(row) + "\n" for row in ROWS["piqa"])
    file.write_text(text)
    packed.write_bytes(gzip.compress(text.encode()))
    with pytest.raises(
        DataError,
        match=r"--tasks-data: \S+/validation.jsonl and validation.jsonl.gz"
        r" are both there, and their rows would count twice; delete one of them",
    ):
        read_rows(TASKS["piqa"], tmp_path)
    file.unlink()
    assert read_rows(TASKS["piqa"], tmp_path) == ROWS["piqa"]
    packed.rename(folder / "validation.parquet.gz")
    with pytest.raises(DataError, match=r"validation.parquet.gz: Parquet within .gz .*; unpack"):
        read_rows(TASKS["piqa"], tmp_path)


def test_a_raw_text_without_titles_is_one_page_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "wikitext").mkdir()
    file = tmp_path / "wikitext" / "test.txt"
    file.write_text("= A =\n one\n = = B = = \n two\n")
    assert len(read_rows(TASKS["wikitext"], tmp_path)) == 1
    assert f"{file}: no line is the title of a page, such as ' = Title = '" in caplog.text
    caplog.clear()
    file.write_text(" = A = \n one\n")
    assert len(read_rows(TASKS["wikitext"], tmp_path)) == 1 and not caplog.records


def test_an_unknown_task_is_told_the_nearest() -> None:
    assert [t.name for t in chosen_tasks("piqa, bpt", "--tasks")][:2] == ["piqa", "lambada_openai"]
    assert len(chosen_tasks("all", "--tasks", harness=True)) == len(TASKS) - 1
    with pytest.raises(ConfigError, match=r"--tasks: unknown task 'helaswag'; did you mean 'hell"):
        chosen_tasks("piqa,helaswag", "--tasks")
    with pytest.raises(ConfigError, match="unknown task ''"):
        chosen_tasks(",", "--tasks")


def test_a_task_that_generates_is_left_to_the_harness() -> None:
    """Neither bpt nor all names it."""
    for group in ("bpt", "all"):
        assert "swde" not in [task.name for task in chosen_tasks(group, "--tasks", harness=True)]
    assert [t.name for t in chosen_tasks("all,swde", "--tasks", True)] == [*SCORED, "swde"]
    for key in ("--tasks", "eval.tasks"):
        with pytest.raises(ConfigError, match=rf"^{key}: swde generates text, .* --harness` \(nee"):
            chosen_tasks("piqa,swde", key)
