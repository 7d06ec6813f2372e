"""Compare an exported tokenizer with the one that encoded the training data."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from peptrain.data.tokenizer import ADVICE, CANT_ENCODE, encode, explained
from peptrain.data.tokenizer import load_tokenizer as read_tokenizer
from peptrain.errors import DataError
from peptrain.models.auto import load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

log = logging.getLogger("peptrain")
SAMPLE = "In 2026 the naïve fox's 12,345 jumps:\n\n    return x == 'é'\t#  你好 🙂 <a>\n"
"""Text that tokenizers split in different ways."""
LOAD = "load the tokenizer with PreTrainedTokenizerFast.from_pretrained"


def compare_tokenizers(trained: Tokenizer, end: int, out: Path) -> bool:
    """Return whether `AutoTokenizer` encodes as the training data was encoded, or warn.

    Raises Unsupported if it needs code of its own.
    """
    try:
        exported = load_tokenizer(out)
    except DataError as error:
        log.warning("%s; %s", error, LOAD)
        return False
    try:
        (ids,) = encode(trained, [SAMPLE], np.dtype("<u4"))
    except DataError:  # it has no unknown token for the characters of the sample
        return True
    same = bool(exported(SAMPLE).input_ids == ids.tolist() and exported.eos_token_id == end)
    if not same:
        log.warning(
            "tokenizer: AutoTokenizer replaces it by a %s for this type of model, which does not"
            " encode as the training data was encoded; %s",
            *(type(exported).__name__, LOAD),
        )
    return same


def compare_pairs(out: Path) -> bool:
    """Return whether `AutoTokenizer` encodes two texts as the run's tokenizer.json, or warn.

    Raises Unsupported if it needs code of its own.
    """
    own = read_tokenizer(out)
    try:
        with explained(CANT_ENCODE, ADVICE):
            ids = own.encode(SAMPLE, SAMPLE).ids
        exported = load_tokenizer(out)
    except DataError as error:
        log.warning("%s", error)
        return False
    same = bool(exported(SAMPLE, SAMPLE).input_ids == ids)
    if not same:
        log.warning(
            "tokenizer: AutoTokenizer replaces it by a %s for this type of model, which does not"
            " encode as the fine-tuning did; %s", type(exported).__name__, LOAD,
        )  # fmt: skip
    return same
