"""Build Hugging Face models with a head for a task with labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from peptrain.models.auto import new_classifier
from peptrain.models.hf import ModelConfig, Precision, dtype_of, hf_config
from peptrain.rng import seed_default

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def classifier_config(
    config: ModelConfig, classes: Sequence[str], pad_token: int, seq_len: int
) -> PretrainedConfig:
    """Return the configuration of a classifier; without `classes` of a model of one number.

    An encoder and decoder, such as T5, writes the name of the class and has no head for it.
    """
    made = hf_config(config, seq_len)
    made.pad_token_id = pad_token
    if not made.is_encoder_decoder:
        made.num_labels = max(1, len(classes))
        if classes:
            made.id2label = dict(enumerate(classes))
            made.label2id = {name: number for number, name in enumerate(classes)}
        made.problem_type = "single_label_classification" if classes else "regression"
    return made


def build_classifier(
    config: ModelConfig,
    classes: Sequence[str],
    pad_token: int,
    *,
    seq_len: int,
    seed: int,
    precision: Precision = "fp32",
) -> PreTrainedModel:
    """Return a newly initialised classifier on the CPU. Its weights depend only on the seed.

    Raises Unsupported for an architecture that has none in Hugging Face.
    """
    made = classifier_config(config, classes, pad_token, seq_len)
    with torch.random.fork_rng(devices=[]):
        seed_default(seed)
        return new_classifier(made, dtype_of(precision))
