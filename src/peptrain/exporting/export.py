"""Export a run as a plain Hugging Face model or as a small factorised model."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from peptrain.config import RunConfig
from peptrain.errors import CheckpointError, ConfigError, Unsupported
from peptrain.exporting.card import Loading, describe, metadata, write_card
from peptrain.exporting.encoding import compare_pairs, compare_tokenizers
from peptrain.exporting.factorised import own_tensors, plain_form, write_factorised
from peptrain.exporting.gguf import check_gguf, load_gguf, write_gguf
from peptrain.exporting.peft import check_peft, load_peft, peft_tensors, write_peft
from peptrain.files import open_up, scratch
from peptrain.methods.base import Method
from peptrain.models.auto import load_model
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

log = logging.getLogger("peptrain")
Form = Literal["dense", "factorised", "peft", "gguf"]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""Largest accepted difference of logits computed in this dtype, relative to the largest logit.
Folding fp32 factors changed logits by 3e-7 to 6e-5. Omitting a factor or diagonal changes them by
0.02 (in the first steps of BPT) to 2 (tests/exporting/test_export.py). In float64 the tolerance is
looser than it could be, because Hugging Face's norms compute in fp32."""


@dataclass(frozen=True)
class Kind:
    """A form of exports. The writers return the model as it is read back from the directory."""

    write: Callable[[Opened, Path], PreTrainedModel]
    tensors: Callable[[PreTrainedModel, PreTrainedModel], Mapping[str, Tensor]]
    """The run's tensors, given its model and the written one, by the names of the latter."""
    loading: Callable[[RunConfig[Method]], Loading]
    check: Callable[[Opened], None]
    """Raises Unsupported, with the reason, for a run that does not have the form."""


def export(run: Path | str, out: Path | str, form: Form = "dense") -> Path:
    """Write the latest checkpoint of a run, or RUN@STEP, to `out`, and compare the logits.

    dense: a plain directory that `AutoModelForCausalLM.from_pretrained` loads without peptrain, or
    `AutoModelForSequenceClassification` (T5: `AutoModelForSeq2SeqLM`) if it was fine-tuned.
    factorised: two nn.Linear for each matrix, which `AutoModelForCausalLM.from_pretrained` loads
    with `trust_remote_code=True` or after `import peptrain.hf`, and `load_factorised` in a faster
    form. It is available for W = B A (lowrank, loro, spectron) and methods with an `activation`
    (cola).
    peft: the adapter of lora, dora or vera around the model of --init-from.
    gguf: one file for llama.cpp.
    All have the tokenizer as it was in training, and a model card.

    Raises ConfigError when `out` exists, Unsupported for a form that the method does not support,
    and CheckpointError for a run whose tokenizer is missing or damaged, for an `out` that can't be
    written, or when the written model's weights or logits differ from the run's. A warning is
    logged if `AutoTokenizer` encodes text otherwise than the training data was encoded.
    """
    run, out = Path(run), Path(out)
    _check_free(out)
    opened, kind = open_run(run), FORMS[form]
    _check_form(opened, form)
    tuned = bool(opened.config.tune.task)
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
            written = kind.write(opened, temporary)
            loading = kind.loading(opened.config)
            difference = _compare(opened.model, written, kind.tensors(opened.model, written))
            if tuned:
                fits = compare_pairs(temporary)
            else:
                fits = compare_tokenizers(tokenizer, end, temporary)
            if not fits:
                loading = replace(loading, tokenizer="PreTrainedTokenizerFast")
            write_card(opened, temporary, loading, difference)
            open_up(temporary)
            _check_free(out)
            temporary.replace(out)
    except (OSError, SafetensorError) as error:
        of_run = str(getattr(error, "filename", None) or "").startswith(f"{opened.run.path}/")
        if of_run and not out.is_relative_to(opened.run.path):
            raise
        raise CheckpointError(
            f"--out {out}: can't be written: {error}; choose another path"
        ) from error
    return out


def how_to_load(run: Path, form: Form) -> str:
    """Return the Python expression that loads a form of a run; DIR stands for its directory."""
    config = run_config(RunDir.open(at(run)[0]))
    return FORMS[form].loading(config).call.replace("BASE", repr(str(config.init_from)))


def _check_free(out: Path) -> None:
    """Raise ConfigError if `out` exists, maybe since another export has finished."""
    if os.path.lexists(out):
        raise ConfigError(f"--out {out}: exists and is never overwritten; choose another path")


def _check_form(opened: Opened, form: Form) -> None:
    """Raise Unsupported for a form that the run does not have, naming those that it has."""
    try:
        FORMS[form].check(opened)
    except Unsupported as error:
        others = " or ".join(_forms_of(opened)) or "none: this run has no export"
        raise Unsupported(f"--form {form}: {error}; use --form {others}") from error


def _forms_of(opened: Opened) -> Iterator[Form]:
    for form, kind in FORMS.items():
        with contextlib.suppress(Unsupported):
            kind.check(opened)
            yield form


def _check_dense(opened: Opened) -> None:
    if not (method := opened.config.method).has_dense_equivalent:
        raise Unsupported(f"{method.name} has no dense equivalent")


def _check_factorised(opened: Opened) -> None:
    if opened.config.tune.task:
        raise Unsupported("is for language models, and the run is a fine-tuned classifier")
    plain_form(opened.model, opened.config.method)


def _load_dense(config: RunConfig[Method]) -> Loading:
    loader = "AutoModelForCausalLM"
    if config.tune.task:
        text = hf_config(config.model, config.train.seq_len).is_encoder_decoder
        loader = "AutoModelForSeq2SeqLM" if text else "AutoModelForSequenceClassification"
    call = f"transformers.{loader}.from_pretrained(DIR)"
    return Loading("transformers", "", call)


def _load_factorised(config: RunConfig[Method]) -> Loading:
    call = "transformers.AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)"
    note = (
        "`trust_remote_code=True` runs the file `modeling_factorised.py`, which builds the model."
    )
    return Loading("transformers", "", call, flags=", trust_remote_code=True", note=note)


def _dense(opened: Opened, out: Path) -> PreTrainedModel:
    twin, tuned = opened.dense_twin(), bool(opened.config.tune.task)
    if not tuned:
        _name_end_token(twin, opened.model.config.eos_token_id)
    twin.save_pretrained(out)
    said = metadata(opened)
    for file in out.glob("*.safetensors"):
        describe(file, said)
    model, _ = load_model(out, classifier=twin.config if tuned else None)
    model.eval()
    return model


def _name_end_token(model: PreTrainedModel, end: int) -> None:
    """Set the end-of-document token, at which `generate` stops."""
    model.config.eos_token_id = end
    if model.generation_config is not None:
        model.generation_config.eos_token_id = end


@torch.no_grad()
def _compare(
    model: PreTrainedModel, written: PreTrainedModel, folded: Mapping[str, Tensor]
) -> float:
    """Return the largest difference of logits, relative to the largest logit.

    Raises CheckpointError unless weights, which should be those of `folded`, are read back
    unchanged and logits agree.

    Logits are compared on random tokens, in at least fp32 and with weights that were not rounded:
    in bf16 a correct fold of a small OLMo2 changed them by 0.4 of the largest.
    """
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
    both: dict[str, Any] = {"use_cache": False} if model.can_generate() else {}  # some have none
    if model.config.is_encoder_decoder:
        both["decoder_input_ids"] = ids
    before, after = model(ids, **both).logits, written(ids, **both).logits
    if not before.isfinite().all():
        raise CheckpointError(
            "the run's own logits are not finite, so its training had diverged; nothing was"
            " exported; give an earlier checkpoint by --step"
        )
    difference = _relative(before, after)
    if not difference <= TOLERANCE[before.dtype]:
        raise CheckpointError(
            f"the exported model's logits differ by {difference:.2g} from the run's, relative to"
            " the largest logit; nothing was exported"
        )
    log.info("logits of the exported model agree to %.1e, relative to the largest", difference)
    return difference


def _relative(before: Tensor, after: Tensor) -> float:
    largest = before.abs().max().double()
    return float((before.double() - after.double()).abs().max() / largest)


FORMS: dict[Form, Kind] = {
    "dense": Kind(_dense, lambda model, _: dense_state(model), _load_dense, _check_dense),
    "factorised": Kind(
        write_factorised, lambda model, _: own_tensors(model), _load_factorised,
        _check_factorised,
    ),
    "peft": Kind(write_peft, peft_tensors, load_peft, check_peft),
    "gguf": Kind(write_gguf, lambda model, _: dense_state(model), load_gguf, check_gguf),
}  # fmt: skip
