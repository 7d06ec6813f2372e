"""`peptrain generate`: print how a model continues a prompt, and nothing else, on stdout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from peptrain.display.console import make, say, stderr, stdout
from peptrain.display.training import count
from peptrain.distributed.launch import speaks
from peptrain.errors import DataError
from peptrain.text import escaped, one_line

LONGEST = 1 << 22
"""Bytes of a prompt on standard input: more tokens than any model reads."""
SHOWN = 60
"""Characters of the prompt that are repeated."""


def generate_text(
    run: Positional[Path],
    prompt: Positional[str],
    tokens: int = 64,
    temperature: float = 0.8,
    top_p: float = 1.0,
    seed: int = 0,
    samples: int = 1,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Continue a prompt with the model of a run.

    The continuation alone is on standard output, so that it can be piped. It ends where the model
    ends the document. What is generated, and how, is on standard error.

    Args:
        run: Run directory, RUN@STEP for the checkpoint of a step, or a Hugging Face directory, also
            a factorised export.
        prompt: Text to continue; "" begins a document; - reads it from standard input, without its
            last line feed.
        tokens: Most tokens to write. A run reads as many, with the prompt, as its training
            sequences have.
        temperature: Logits are divided by it: 1 draws from the model's own distribution, less
            prefers likely tokens, 0 takes the likeliest.
        top_p: Draw among the likeliest tokens whose probabilities add up to this.
        seed: Random seed. The same one gives the same text.
        samples: Number of continuations. Each is the same for any number of them.
        device: auto uses a GPU if there is one.
    """
    given = _piped() if prompt == "-" else prompt
    from peptrain.distributed.world import world
    from peptrain.generation.generate import check_samples, continuations
    from peptrain.generation.sample import Sampling
    from peptrain.tasks.subject import open_subject

    how, told = Sampling(tokens, temperature, top_p), make(stderr, quiet=not speaks())
    check_samples(samples, how, seed)
    with world(device) as here:
        subject = open_subject(run)
        drawn = f"temperature {temperature:g}, seed {seed}" if temperature else "the likeliest"
        end = given if len(given) <= SHOWN else f"...{given[-SHOWN:]}"
        begun = f'continues "{one_line(end)}"' if given else "begins a document"
        say(f"{subject.name} {begun}: up to {count(tokens, 'token')}, {drawn}", to=told)
        for number, text in enumerate(
            continuations(subject, given, how, seed, samples, here.device)
        ):
            if samples > 1:
                say(f"sample {number + 1} of {samples}", to=told)
            if here.main:
                stdout.write(f"{escaped(text) if stdout.isatty() else text}\n")
                stdout.flush()
            if stdout.lost:
                break


def _piped() -> str:
    """Return what is on standard input. Raises DataError if it is closed, too long or not UTF-8."""
    if sys.stdin is None:
        raise DataError("prompt: standard input is closed; give the text as an argument")
    content = sys.stdin.buffer.read(LONGEST + 1)
    if len(content) > LONGEST:
        raise DataError(
            f"prompt: standard input has more than {LONGEST:,} bytes; give a shorter one"
        )
    try:
        return content.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"prompt: standard input is not UTF-8 (byte {error.start}); convert it with iconv"
        ) from error
