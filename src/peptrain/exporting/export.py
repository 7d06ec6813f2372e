"""Export a run as a plain Hugging Face model or as a small factorised model."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from peptrain.data.tokenizer import ADVICE, CANT_ENCODE, encode, explained
from peptrain.data.tokenizer import load_tokenizer as read_tokenizer
from peptrain.errors import CheckpointError, ConfigError, DataError, Unsupported
from peptrain.exporting.factorised import own_tensors, write_factorised
from peptrain.files import open_up, scratch
from peptrain.models.auto import load_model, load_tokenizer
from peptrain.models.dense import dense_state
from peptrain.models.hf import hf_config, positions_of
from peptrain.ops.precision import at_least_fp32
from peptrain.runs.build import Opened, open_run, run_config
from peptrain.runs.directory import RunDir
from peptrain.runs.select import at
from peptrain.runs.tokenizer import (
    check_run_tokenizer,
    copy_run_tokenizer,
    load_run_tokenizer,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger("peptrain")
Form = Literal["dense", "factorised"]
SAMPLE = "In 2026 the naïve fox's 12,345 jumps:\n\n    return x == 'é'\t#  你好 🙂 <a>\n"
"""Text that tokenizers split in different ways."""
LOAD = "load the tokenizer with PreTrainedTokenizerFast.from_pretrained"
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest accepted difference of logits computed in this dtype, relative to the largest logit.
Folding fp32 factors changed logits by 3e-7 to 6e-5. Omitting a factor or diagonal changes them by
0.02 (in the first steps of BPT) to 2 (tests/exporting/test_export.py). In float64 the tolerance is
looser than it could be, because Hugging Face's norms compute in fp32."""


def export(run: Path, out: Path, form: Form = "dense") -> Path:
    """Write the latest checkpoint of a run, or RUN@STEP, to `out`, and compare the logits.

    dense: a plain directory that `AutoModelForCausalLM.from_pretrained` loads without peptrain, or
    `AutoModelForSequenceClassification` (T5: `AutoModelForSeq2SeqLM`) if it was fine-tuned.
    factorised: two nn.Linear for each matrix, which `AutoModelForCausalLM.from_pretrained` loads
    with `trust_remote_code=True` or after `import peptrain.hf`, and `load_factorised` in a faster
    form. It is available for W = B A (lowrank, loro) and for methods with an `activation`.

    Raises ConfigError when `out` exists, Unsupported for a form that the method does not support,
    and CheckpointError for a run whose tokenizer is missing or damaged, for an `out` that can't be
    written, or when the written model's weights or logits differ from the run's. A warning is
    logged if `AutoTokenizer` encodes text otherwise than the training data was encoded.
    """
    _check_free(out)
    opened = open_run(run)
    method = opened.config.method
    if form == "dense" and not method.has_dense_equivalent:
        raise Unsupported(
            f"--form dense: {method.name} has no dense equivalent; use --form factorised, if its"
            " layers are y = B f(A x)"
        )
    tuned = bool(opened.config.tune.task)
    if form == "factorised" and tuned:
        raise Unsupported(
            "--form factorised: is for language models, and the run is a fine-tuned classifier;"
            " export it without --form"
        )
    if tuned:
        check_run_tokenizer(opened.run)
    else:
        tokenizer, end = load_run_tokenizer(opened.run)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with scratch(out) as temporary:
            copy_run_tokenizer(opened.run, temporary, plain=not tuned)
            if not tuned:
                _name_end_token(opened.model, end)
            written = (_dense if form == "dense" else write_factorised)(opened, temporary)
            _compare(opened.model, written)
            if tuned:
                _compare_pairs(temporary)
            else:
                _compare_tokenizers(tokenizer, end, temporary)
            open_up(temporary)
            _check_free(out)
            temporary.replace(out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"--out {out}: can't be written: {error}; choose another path"
        ) from error
    return out


def loader_of(run: Path) -> str:
    """Return the class of transformers that loads the dense form of a run."""
    config = run_config(RunDir.open(at(run)[0]))
    if not config.tune.task:
        return "AutoModelForCausalLM"
    text = hf_config(config.model, config.train.seq_len).is_encoder_decoder
    return "AutoModelForSeq2SeqLM" if text else "AutoModelForSequenceClassification"


def _check_free(out: Path) -> None:
    """Raise ConfigError if `out` exists, maybe since another export has finished."""
    if os.path.lexists(out):
        raise ConfigError(f"--out {out}: exists and is never overwritten; choose another path")


def _dense(opened: Opened, out: Path) -> PreTrainedModel:
    twin, tuned = opened.dense_twin(), bool(opened.config.tune.task)
    if not tuned:
        _name_end_token(twin, opened.model.config.eos_token_id)
    twin.save_pretrained(out)
    model, _ = load_model(out, classifier=twin.config if tuned else None)
    model.eval()
    return model


def _name_end_token(model: PreTrainedModel, end: int) -> None:
    """Set the end-of-document token, at which `generate` stops."""
    model.config.eos_token_id = end
    if model.generation_config is not None:
        model.generation_config.eos_token_id = end


def _compare_tokenizers(trained: Tokenizer, end: int, out: Path) -> None:
    """Warn unless the exported tokenizer encodes as the training data was encoded.

    Raises Unsupported if it needs code of its own.
    """
    try:
        exported = load_tokenizer(out)
    except DataError as error:
        log.warning("%s; %s", error, LOAD)
        return
    try:
        (ids,) = encode(trained, [SAMPLE], np.dtype("<u4"))
    except DataError:  # it has no unknown token for the characters of the sample
        return
    if exported(SAMPLE).input_ids != ids.tolist() or exported.eos_token_id != end:
        log.warning(
            "tokenizer: AutoTokenizer replaces it by a %s for this type of model, which does not"
            " encode as the training data was encoded; %s",
            *(type(exported).__name__, LOAD),
        )


def _compare_pairs(out: Path) -> None:
    """Warn unless `AutoTokenizer` encodes two texts as the tokenizer.json of a fine-tuned run.

    Raises Unsupported if it needs code of its own.
    """
    own = read_tokenizer(out)
    try:
        with explained(CANT_ENCODE, ADVICE):
            ids = own.encode(SAMPLE, SAMPLE).ids
        exported = load_tokenizer(out)
    except DataError as error:
        log.warning("%s", error)
        return
    if exported(SAMPLE, SAMPLE).input_ids != ids:
        log.warning(
            "tokenizer: AutoTokenizer replaces it by a %s for this type of model, which does not"
            " encode as the fine-tuning did; %s", type(exported).__name__, LOAD,
        )  # fmt: skip


@torch.no_grad()
def _compare(model: PreTrainedModel, written: PreTrainedModel) -> None:
    """Raise CheckpointError unless weights are read back unchanged and logits agree.

    Logits are compared on random tokens, in at least fp32 and with weights that were not rounded:
    in bf16 a correct fold of a small OLMo2 changed them by 0.4 of the largest.
    """
    folded = own_tensors(model) if hasattr(written.config, "ranks") else dense_state(model)
    for name, p in written.named_parameters():
        if not torch.equal(p, folded[name].to(p.dtype)):
            raise CheckpointError(f"{name}: changed when read back from disk; nothing was exported")
    wide = at_least_fp32(model.dtype)
    model.to(wide)  # type: ignore[arg-type]
    for name, p in written.to(wide).named_parameters():  # type: ignore[arg-type]
        p.copy_(folded[name])
    limit = positions_of(model) or getattr(model.config, "max_position_embeddings", None)
    ids = torch.randint(
        model.config.get_text_config().vocab_size,
        (2, min(64, limit or 64)),
        generator=torch.Generator().manual_seed(0),
    )
    both = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    before, after = model(ids, **both).logits, written(ids, **both).logits
    difference = _relative(before, after)
    if not difference <= TOLERANCE[before.dtype]:
        raise CheckpointError(
            f"the exported model's logits differ by {difference:.2g} from the run's, relative to"
            " the largest logit; nothing was exported"
        )
    log.info("logits of the exported model agree to %.1e, relative to the largest", difference)


def _relative(before: Tensor, after: Tensor) -> float:
    largest = before.abs().max().double()
    return float((before.double() - after.double()).abs().max() / largest)
