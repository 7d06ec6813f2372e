"""Continue the tokens of a prompt by a language model, with the sampler of transformers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peptrain.errors import DataError, Unsupported
from peptrain.models.hf import Precision, autocast, vocabulary_size
from peptrain.models.probe import evaluating
from peptrain.rng import seed_default
from peptrain.settings.fields import check, check_positive, check_whole, shown
from peptrain.tasks.spans import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS, TEMPERATURE = 64, 0.8
COLDEST = 1e-6
"""Below it T itself leaves fp32 at last, and the likeliest token was certain long before."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: from softmax(logits / temperature), cut to its likeliest part.

    Raises ConfigError, naming the flag, for a value that can't be used.
    """

    tokens: int = TOKENS
    """The most tokens to write."""
    temperature: float = TEMPERATURE
    """0 takes the likeliest token, 1 draws from the model's own distribution."""
    top_p: float = 1.0
    """Draw among the likeliest tokens whose probabilities add up to this."""

    def __post_init__(self) -> None:
        check_whole("--tokens", self.tokens, 1)
        check_positive("--temperature", self.temperature, or_zero=True)
        wanted = f"0, or at least {COLDEST:g}"
        check(not 0 < self.temperature < COLDEST, "--temperature", self.temperature, wanted)
        check(0 < self.top_p <= 1, "--top-p", self.top_p, "above 0 and at most 1")

    def settings(self) -> dict[str, Any]:
        """Return them by their names in transformers."""
        if self.temperature == 0:
            return {"do_sample": False}
        # top_k 0: otherwise transformers draws among 50 tokens.
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {"do_sample": True, **drawn}


def prompt_tokens(encoder: Encoder, text: str, positions: int, name: str) -> list[int]:
    """Return the tokens of a prompt. Those of an empty one are what stands before a document.

    positions: the most tokens that the model reads. Raises DataError, which begins with `name`, for
    a text that the tokenizer can't encode, and for one with more tokens.
    """
    if not text:
        return [encoder.prefix]
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{name}: must be UTF-8 (got {shown(text)})") from error
    try:
        ids = encoder.ids([text], special=True)[text]
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    if not ids:
        raise DataError(f"{name}: the tokenizer makes no token of {shown(text)}; give another text")
    if len(ids) > positions:
        raise DataError(
            f"{name}: has {len(ids):,} tokens, but the model reads {positions:,}; shorten it"
        )
    return ids


def check_prompt(model: PreTrainedModel, ids: Sequence[int], name: str) -> None:
    """Raise DataError, which begins with `name`, for a token that the model has no embedding for,
    and Unsupported for a model that transformers can't generate with."""
    if not model.can_generate():
        raise Unsupported(
            f"{type(model).__name__}: transformers can't generate text with it; give a causal"
            " language model"
        )
    if max(ids) >= (rows := vocabulary_size(model)):
        raise DataError(
            f"{name}: has token id {max(ids)}, but the model's vocabulary size is {rows}; give a"
            " text without it, or a model with its own tokenizer"
        )


@torch.no_grad()
def continuation(
    model: PreTrainedModel,
    encoder: Encoder,
    ids: Sequence[int],
    how: Sampling,
    *,
    positions: int,
    precision: Precision,
    seed: int,
    cache: bool = True,
) -> str:
    """Return the text with which the model continues the tokens `ids`, without these.

    It ends before a token that ends documents, after `how.tokens` tokens, or when the model has
    read `positions` tokens. It is a function of the arguments alone: the random numbers are those
    of `seed`, and PyTorch's generators and the model are left as they were. cache: keep keys and
    values, which a model in training can't do.
    """
    from transformers import GenerationConfig

    end = [*encoder.ends]
    settings = GenerationConfig(
        max_new_tokens=min(how.tokens, positions + 1 - len(ids)),
        **how.settings(),
        eos_token_id=end or None,
        pad_token_id=end[0] if end else 0,
        use_cache=cache,
    )
    device = model.device
    given = torch.tensor([[*ids]], device=device)
    with (
        evaluating(model),
        _own_settings(model),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        autocast(precision, device),
    ):
        seed_default(seed, device)
        made = model.generate(  # type: ignore[operator]
            given,
            settings,
            attention_mask=torch.ones_like(given),
            logits_processor=[_bounded],
        )
    written: list[int] = made[0, len(ids) :].tolist()
    if written and written[-1] in end:
        written.pop()
    before, whole = encoder.decode(ids), encoder.decode([*ids, *written])
    # Decoded alone, a continuation may lose the space that it begins with.
    return whole.removeprefix(before) if whole.startswith(before) else encoder.decode(written)


def _bounded(_: Tensor, logits: Tensor) -> Tensor:
    """Return logits with the same softmax of which none is above 0, with nan as 0.

    So their quotient by a temperature is never infinite: a model that diverges writes nonsense and
    raises no error.
    """
    finite = logits.nan_to_num(0.0)
    return finite - finite.amax(-1, keepdim=True)


@contextmanager
def _own_settings(model: PreTrainedModel) -> Iterator[None]:
    """Remove a model's generation_config.json, from which `generate` fills up what is unset."""
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before
