"""Made-up items of every task, in the columns that the data sets have."""

import json
from pathlib import Path
from typing import Any

from peptrain.tasks.table import TASKS

CHOICES = {"text": ["a cat", "two dogs", "the moon", "no one"], "label": ["A", "B", "C", "D"]}
ROWS: dict[str, list[dict[str, Any]]] = {
    "blimp": [
        {"sentence_good": f"The {n} sleep.", "sentence_bad": f"The {n} sleeps.", "UID": uid,
         "linguistics_term": term, "field": "syntax", "pairID": str(k)}
        for uid, term in (("one", "binding"), ("two", "s-selection"), ("three", "ellipsis"))
        for k, n in enumerate(("cats", "dogs", "mice"))
    ],
    "lambada_openai": [{"text": "We saw the red house and went into the house"},
                       {"text": "He sang: \"la la\"\n\nand she sang"}],
    "hellaswag": [{"activity_label": "Cooking", "ctx_a": "A man [step] stands.", "ctx_b": "he",
                   "endings": ["[title] eats", "sings  aloud", "sleeps", "is [substeps] gone"],
                   "label": "2"}],
    "winogrande": [{"sentence": "Ann paid Eve since _ was tired.", "option1": "Ann",
                    "option2": "Eve", "answer": "2"}],
    "piqa": [{"goal": "How to open a door?", "sol1": "Push it.", "sol2": "Eat it.", "label": 0}],
    "boolq": [{"passage": "Water is wet.", "question": "is water wet", "answer": True},
              {"passage": "Fire is hot.", "question": "is fire cold", "label": 0}],
    "sciq": [{"question": "What falls?", "support": " Apples fall.", "distractor1": "up",
              "distractor2": "left", "distractor3": "air", "correct_answer": "apples"}],
    "openbookqa": [{"question_stem": "At night one sees", "choices": CHOICES, "answerKey": " C"}],
    "arc_easy": [{"question": "Which purrs?", "choices": CHOICES, "answerKey": "A"}],
    "arc_challenge": [{"question": "How many bark?", "choices": CHOICES, "answerKey": "B"}],
    "wikitext": [{"page": " = A B = \n The s ' of x @-@ y , is ( so ) . \n"},
                 {"page": " = C = \n \" q \" = = d = = \n"}, {"page": " = É = \n 1 @,@ 000 ; \n"}],
    "swde": [
        {"text": f"\n<h1>Mr {n}</h1> <dl><dt>Eyes</dt><dd>red</dd> <dt>Height of {n} in cm</dt>\n",
         "value": f" {150 + n} ", "key": "height", "doc_id": f"{n}.htm"} for n in range(20)
    ],
}  # fmt: skip


def write_data(folder: Path, times: int = 1) -> Path:
    """Write the items as a directory of --tasks-data; return it."""
    for name, given in ROWS.items():
        task = TASKS[name]
        (folder / task.folder).mkdir(parents=True)
        text = "".join(json.dumps(row) + "\n" for row in given * times)
        (folder / task.folder / f"{task.splits[0]}.jsonl").write_text(text)
    return folder
