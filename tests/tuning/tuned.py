"""Made-up rows of tasks, and small models to fine-tune."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from support import tiny, tiny_method
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import RobertaConfig, RobertaForMaskedLM, T5Config, T5ForConditionalGeneration

from peptrain.config import RunConfig
from peptrain.methods.base import Method
from peptrain.sections import TuneConfig
from peptrain.training.loop import train

WORDS = ["<pad>", "</s>", "<s>", "<unk>", "a", "cat", "dog", "sat", "ran", "good", "bad", "not",
         "yes", "no", ".", "unacceptable", "acceptable", "entailment", "not_entailment", ":",
         "cola", "rte", "stsb", "sentence", "sentence1", "sentence2",
         *(f"{fifths / 5:.1f}" for fifths in range(26)), "negative", "positive", "not_equivalent",
         "equivalent", "not_duplicate", "duplicate", "neutral", "contradiction"]  # fmt: skip
ROBERTA: dict[str, Any] = {"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 40,
    "pad_token_id": 0, "type_vocab_size": 1, "bos_token_id": 2, "eos_token_id": 1}  # fmt: skip
T5: dict[str, Any] = {"vocab_size": len(WORDS), "d_model": 16, "d_kv": 8, "d_ff": 24,
    "num_layers": 2, "num_heads": 2, "pad_token_id": 0, "eos_token_id": 1,
    "decoder_start_token_id": 0}  # fmt: skip
SHORT = {"batch_size": 8, "seq_len": 24, "micro_batch": 4, "precision": "fp64", "device": "cpu",
         "log_every": 2, "eval_every": None}  # fmt: skip


def sentence(draw: random.Random) -> str:
    return " ".join(draw.choices(WORDS[4:14], k=draw.randint(2, 9)))


def write_rows(folder: Path, *, train: int = 22, validation: int = 10) -> Path:
    """Write CoLA, RTE and STS-B with random words as a directory of tasks; return it."""
    draw = random.Random(0)
    for split, count in (("train", train), ("validation", validation)):
        made: dict[str, list[dict[str, Any]]] = {"cola": [], "rte": [], "stsb": []}
        for n in range(count):
            one, two = sentence(draw), sentence(draw)
            made["cola"].append({"sentence": one, "label": n % 2})
            made["rte"].append({"sentence1": one, "sentence2": two, "label": n % 2})
            made["stsb"].append({"sentence1": one, "sentence2": two, "label": n % 5 + 0.4})
        for name, rows in made.items():
            (folder / name).mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / name / f"{split}.jsonl").write_text(text)
    return folder


def pretrained(corpus: Path, run: Path) -> Path:
    """Train a small decoder of which the first and the last checkpoint are kept; return its run."""
    train(tiny("full", corpus, run, train={"keep_at": "0", "device": "cpu", "eval_every": 0}))
    return run


def write_encoder(folder: Path, **differs: Any) -> Path:
    """Save a small RoBERTa with a language-model head and a tokenizer with its template."""
    RobertaForMaskedLM(RobertaConfig(**{**ROBERTA, **differs})).save_pretrained(folder)
    pair = "<s> $A </s> </s> $B </s>"
    special = [("<s>", WORDS.index("<s>")), ("</s>", WORDS.index("</s>"))]
    _write_tokenizer(folder, processors.TemplateProcessing("<s> $A </s>", pair, special))
    return folder


def write_t5(folder: Path, **differs: Any) -> Path:
    """Save a small T5 and a tokenizer that ends a text by </s>."""
    T5ForConditionalGeneration(T5Config(**{**T5, **differs})).save_pretrained(folder)
    special = [("</s>", WORDS.index("</s>"))]
    _write_tokenizer(folder, processors.TemplateProcessing("$A </s>", "$A $B </s>", special))
    return folder


def _write_tokenizer(folder: Path, template: Any) -> None:
    words = Tokenizer(models.WordLevel({w: n for n, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = template
    words.save(str(folder / "tokenizer.json"))
    named = {
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


def tuning(
    method: Method | str,
    start: Path,
    data: Path,
    run: Path | None = None,
    tune: dict[str, Any] | None = None,
    **sections: Any,
) -> RunConfig[Any]:
    """Fine-tune for 2 epochs of 22 rows in batches of 8: 6 steps in float64."""
    chosen = tiny_method(method) if isinstance(method, str) else method
    given = {**SHORT, **sections.pop("train", {})}
    config = tiny(chosen, data, run, train=given, **sections)
    asked = TuneConfig(**{"task": "cola", "tasks_data": data, "epochs": 2, **(tune or {})})
    plain = RunConfig(method=chosen)
    return replace(config, model=plain.model, data=plain.data, init_from=start, tune=asked)
