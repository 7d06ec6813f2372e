"""The tasks: what the model reads of a row of the data set, and where the data come from.

The texts are those of the lm-evaluation-harness 0.4, zero-shot, so that the numbers are comparable.
A new task is one function and one entry of `TASKS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from peptrain.errors import ConfigError
from peptrain.settings.fields import nearest, shown

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Item:
    """One question: which texts are scored, and what is correct."""

    requests: tuple[tuple[str, str], ...]
    """Pairs of a context and the continuation whose log-likelihood is measured, or that a
    generated text has to contain."""
    gold: int = 0
    """Index of the correct request."""
    lengths: tuple[int, ...] = ()
    """Characters of each choice, for acc_norm; words and UTF-8 bytes of a page."""
    groups: tuple[str, ...] = ()
    """Names of groups with results of their own: BLiMP's paradigm and category."""


@dataclass(frozen=True)
class Task:
    """A data set with its question."""

    name: str
    """Also the harness's name."""
    kind: Literal["choice", "word", "page", "text"]
    """choice: is the correct continuation the likeliest? word: is each token of the continuation
    the likeliest? page: how likely is a document? text: does what the model generates contain the
    continuation? The own scorer generates nothing, so that only the harness measures these."""
    item: Callable[[Row], Item]
    folder: str
    """Folder of the data, below the directory of all."""
    splits: tuple[str, ...]
    """Names of the data file, without suffix; the first that exists is used."""
    source: str
    """Hugging Face data set, with its configuration."""
    columns: str
    normalized: bool = False
    """Whether acc_norm, by log-likelihood per character, is reported too."""
    stock: str = ""
    """File of the task in the harness; of kind text its class."""
    chance: float | None = None
    """Accuracy of guessing, where all items have as many choices."""
    parts: int = 1
    """Configurations of the data set, whose splits of the last name in `splits` are joined."""

    def copy_of(self, split: str) -> str:
        """Return in words what the file of a split is a copy of."""
        of = f"the Hugging Face data set {self.source}"
        if self.parts > 1:
            return f"the split {self.splits[-1]} of the {self.parts} configurations of {of}, joined"
        return f"the split {split} of {of}"


class NoAnswer(ValueError):
    """The answer in a row is not among its choices."""


def _answer(row: Row, key: str, names: Sequence[str]) -> int:
    """Return the place of a row's answer among the names of its choices."""
    value = row[key]
    whole = isinstance(value, bool) or (isinstance(value, float) and value.is_integer())
    name = str(int(value) if whole else value).strip()
    if name not in names:
        raise NoAnswer(f"{key}: must be one of {', '.join(names)} (got {shown(value)})")
    return names.index(name)


def _numbers(choices: Sequence[str]) -> list[str]:
    return [str(number) for number in range(len(choices))]


def _choices(context: str, choices: list[str], gold: int) -> Item:
    requests = tuple((context, f" {choice}") for choice in choices)
    return Item(requests, gold, tuple(map(len, choices)))


CATEGORY = {"s-selection": "argument_structure"}
"""Terms of BLiMP's files that its paper counts under another of its 12 categories."""


def _blimp(row: Row) -> Item:
    """The model has to prefer the grammatical one of two sentences."""
    sentences = (row["sentence_good"], row["sentence_bad"])
    term: str = row["linguistics_term"]
    groups: tuple[str, ...] = (row["UID"], CATEGORY.get(term, term))
    return Item(tuple(("", f" {s}") for s in sentences), 0, tuple(map(len, sentences)), groups)


def _hellaswag(row: Row) -> Item:
    last = row["ctx_b"]
    begun = f"{row['activity_label']}: {row['ctx_a']} {last.capitalize()}"
    endings = [_without_marks(ending) for ending in row["endings"]]
    return _choices(_without_marks(begun), endings, _answer(row, "label", _numbers(endings)))


def _without_marks(text: str) -> str:
    """Remove what the pages of WikiHow marked in brackets."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _piqa(row: Row) -> Item:
    solutions = [row["sol1"], row["sol2"]]
    return _choices(_asked(row["goal"]), solutions, _answer(row, "label", _numbers(solutions)))


def _asked(question: str, before: str = "") -> str:
    return f"{before}Question: {question}\nAnswer:"


def _arc(row: Row) -> Item:
    return _labelled(_asked(row["question"]), row)


def _openbookqa(row: Row) -> Item:
    return _labelled(row["question_stem"], row)


def _labelled(context: str, row: Row) -> Item:
    choices = row["choices"]
    return _choices(
        context, list(choices["text"]), _answer(row, "answerKey", [*map(str, choices["label"])])
    )


def _sciq(row: Row) -> Item:
    choices = [row[f"distractor{n}"] for n in (1, 2, 3)] + [row["correct_answer"]]
    return _choices(_asked(row["question"], f"{row['support'].lstrip()}\n"), choices, 3)


def _winogrande(row: Row) -> Item:
    """The end of the sentence is scored after each of the two names (partial scoring)."""
    before, gap, after = row["sentence"].partition("_")
    if not gap:
        raise ValueError("the sentence has no _")
    begun = [before + row[name] for name in ("option1", "option2")]
    end = f" {after.strip()}"
    return Item(tuple((one, end) for one in begun), _answer(row, "answer", ("1", "2")))


def _boolq(row: Row) -> Item:
    asked = _asked(f"{row['question']}?", f"{row['passage']}\n")
    key = "label" if "label" in row else "answer"
    return _choices(asked, ["no", "yes"], _answer(row, key, ("0", "1")))


def _lambada(row: Row) -> Item:
    context, _, word = row["text"].rpartition(" ")
    return Item(((context, f" {word}"),))


def _wikitext(row: Row) -> Item:
    page = row["page"]
    lengths = len(re.split(r"\s+", page)), len(page.encode())
    return Item((("", detokenized(page)),), 0, lengths)


def _swde(row: Row) -> Item:
    """The text of a page ends where the value belongs that the model has to generate."""
    return Item(((row["text"].strip(), row["value"].strip()),))


MARKS = (
    *((f" @{sign}@ ", sign) for sign in "-,."),
    *((f" {sign} ", f"{sign} ") for sign in ":;.!?,"),
)
"""Marks of WikiText that stand apart, and what they become."""
INSIDE = (
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
)
"""Brackets and quotes, inside which no spaces are left at the ends."""
REST = (
    *(("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" \u00b0 ", "\u00b0")),
    *((" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")),
)


def detokenized(page: str) -> str:
    """Return a page of WikiText as ordinary text, as the harness scores it."""
    text = page.replace("s '", "s'")
    for old, new in MARKS:
        text = text.replace(old, new)
    for pattern, new in INSIDE:
        text = re.sub(pattern, new, text)
    for old, new in REST:
        text = text.replace(old, new)
    return text


TASKS = {
    task.name: task
    for task in (
        Task("blimp", "choice", _blimp, "blimp", ("all", "train"), "nyu-mll/blimp",
             "sentence_good, sentence_bad, linguistics_term, UID", chance=0.5, parts=67),
        Task("lambada_openai", "word", _lambada, "lambada_openai", ("test",),
             "EleutherAI/lambada_openai", "text", stock="lambada/lambada_openai.yaml"),
        Task("hellaswag", "choice", _hellaswag, "hellaswag", ("validation",), "Rowan/hellaswag",
             "activity_label, ctx_a, ctx_b, endings, label", True, "hellaswag/hellaswag.yaml",
             0.25),
        Task("winogrande", "choice", _winogrande, "winogrande_xl", ("validation",),
             "allenai/winogrande (winogrande_xl)", "sentence, option1, option2, answer", False,
             "winogrande/default.yaml", 0.5),
        Task("piqa", "choice", _piqa, "piqa", ("validation",), "baber/piqa",
             "goal, sol1, sol2, label", True, "piqa/piqa.yaml", 0.5),
        Task("boolq", "choice", _boolq, "boolq", ("validation",), "aps/super_glue (boolq)",
             "passage, question, label or answer", False, "super_glue/boolq/default.yaml", 0.5),
        Task("sciq", "choice", _sciq, "sciq", ("test", "validation"), "allenai/sciq",
             "support, question, distractor1, distractor2, distractor3, correct_answer", True,
             "sciq/sciq.yaml", 0.25),
        Task("openbookqa", "choice", _openbookqa, "openbookqa", ("test", "validation"),
             "allenai/openbookqa (main)", "question_stem, choices, answerKey", True,
             "openbookqa/openbookqa.yaml", 0.25),
        Task("arc_easy", "choice", _arc, "arc_easy", ("test", "validation"),
             "allenai/ai2_arc (ARC-Easy)", "question, choices, answerKey", True,
             "arc/arc_easy.yaml"),
        Task("arc_challenge", "choice", _arc, "arc_challenge", ("test", "validation"),
             "allenai/ai2_arc (ARC-Challenge)", "question, choices, answerKey", True,
             "arc/arc_challenge.yaml"),
        Task("wikitext", "page", _wikitext, "wikitext",
             ("test", "wikitext-raw.test"), "EleutherAI/wikitext_document_level"
             " (wikitext-2-raw-v1)", "page", stock="wikitext/wikitext.yaml"),
        Task("swde", "text", _swde, "swde", ("validation",), "hazyresearch/based-swde-v2",
             "text, value", stock="swde.task.SWDE"),
    )
}  # fmt: skip
GROUPS = {
    "bpt": ("lambada_openai", "hellaswag", "winogrande", "piqa", "boolq", "sciq", "openbookqa",
            "arc_easy", "arc_challenge"),
}  # fmt: skip
"""bpt: the nine tasks whose mean accuracy (acc, not acc_norm) BPT's tables call Avg."""
SCORED = tuple(name for name, task in TASKS.items() if task.kind != "text")
"""What `all` stands for: the tasks of the own scorer."""


def chosen_tasks(listed: str, key: str, harness: bool = False) -> list[Task]:
    """Return the tasks of a list such as "blimp,piqa". A group stands for its tasks.

    harness: whether the harness measures them. Raises ConfigError, which names `key`, for an
    unknown task, and without the harness for one that generates text.
    """
    known = [*TASKS, *GROUPS, "all"]
    names: dict[str, None] = {}
    for name in re.split(r"[\s,]+", listed.strip(" ,")):
        if name not in known:
            hint = nearest(name, known)
            raise ConfigError(
                f"{key}: unknown task {shown(name)}; {hint}choose from {', '.join(known)}"
            )
        parts = SCORED if name == "all" else GROUPS.get(name, (name,))
        names |= dict.fromkeys(parts)
    for name in names:
        if TASKS[name].kind == "text" and not harness:
            raise ConfigError(
                f"{key}: {name} generates text, which only the lm-evaluation-harness measures; use"
                f" `peptrain eval RUN --tasks {name} --tasks-data DIR --harness` (needs pip install"
                " 'peptrain[eval]')"
            )
    return [TASKS[name] for name in names]
