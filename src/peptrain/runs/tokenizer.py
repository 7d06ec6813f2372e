"""The tokenizer of a run: written at its start, verified whenever it is read.

tokenizer/tokenizer.json, tokenizer_config.json, chat_template.jinja
          SHA256SUMS    for `sha256sum -c`; missing in runs of 0.1.0
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from peptrain.data.corpus import Corpus
from peptrain.data.tokenizer import configured, end_id, load_tokenizer
from peptrain.errors import CheckpointError, ConfigError, DataError
from peptrain.files import read_json_object, scratch, sha256sums, write_atomically
from peptrain.models.hf import TOKENIZER_FILES, encode_plainly, save_tokenizer
from peptrain.runs.directory import RunDir
from peptrain.text import quoted

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SUMS = "SHA256SUMS"
NAME = 66
"""Position of the file's name in a line of the checksums."""
LEAST = ("tokenizer.json",)
log = logging.getLogger("peptrain")


def write_run_tokenizer(run: RunDir, corpus: Corpus) -> None:
    """Write the tokenizer of the corpus, and its checksums. Raises OSError if that fails."""
    _fill(run.tokenizer, corpus)


def keep_tokenizer(directory: Path, run: RunDir, end: int | None, pad: int, typed: bool) -> None:
    """Copy the tokenizer in `directory` into a run that is fine-tuned, and write its checksums.

    Unlike that of a corpus it keeps what its template adds to a text. Where that is nothing, it
    gets one that parts two texts by the token `end`, unless it is None. Where it does not say so,
    it is told to fill up texts by `pad` and, if `typed`, to tell the two apart by
    `token_type_ids`. So an export's encodes as the run does. Raises OSError if it fails.
    """
    _copy(directory, run.tokenizer)
    if end is not None:
        _part_by(run.tokenizer / "tokenizer.json", end)
    _configure(run.tokenizer, pad, typed)
    write_atomically(run.tokenizer / SUMS, _sums(run.tokenizer, TOKENIZER_FILES))


def _part_by(file: Path, end: int) -> None:
    tokenizer = load_tokenizer(file)
    if tokenizer.num_special_tokens_to_add(True):
        return
    token = tokenizer.id_to_token(end)
    first, second = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    template = {
        "type": "TemplateProcessing",
        "single": [first],
        "pair": [first, {"SpecialToken": {"id": token, "type_id": 0}}, second],
        "special_tokens": {token: {"id": token, "ids": [end], "tokens": [token]}},
    }
    content = json.loads(file.read_bytes())
    before = [content["post_processor"]] if content.get("post_processor") else []
    content["post_processor"] = {"type": "Sequence", "processors": [*before, template]}
    write_atomically(file, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def _configure(directory: Path, pad: int, typed: bool) -> None:
    token = load_tokenizer(directory).id_to_token(pad)
    file = directory / "tokenizer_config.json"
    content = read_json_object(file) if file.is_file() else {}
    if token is not None and "pad_token" not in configured(directory):
        content["pad_token"] = token
    if typed:
        content.setdefault("model_input_names", ["input_ids", "token_type_ids", "attention_mask"])
    write_atomically(file, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def check_run_tokenizer(run: RunDir) -> None:
    """Raise CheckpointError if a file of a run's tokenizer is missing or damaged."""
    if problem := _difference(run.tokenizer):
        raise CheckpointError(
            f"{problem}; copy it from the model that the run started from, which is init_from in"
            f" {run.config_file}"
        )


def restore_run_tokenizer(run: RunDir, corpus: Corpus) -> None:
    """Write the tokenizer again, with a warning, if it is damaged.

    Raises CheckpointError if that fails.
    """
    try:
        load_run_tokenizer(run)
    except CheckpointError as damage:
        log.warning("%s", damage)
    else:
        return
    try:
        with scratch(run.tokenizer) as made:
            _fill(made, corpus)
            if run.tokenizer.is_dir():
                shutil.rmtree(run.tokenizer)
            else:
                run.tokenizer.unlink(missing_ok=True)
            made.replace(run.tokenizer)
    except OSError as error:
        raise CheckpointError(f"{run.tokenizer}: can't be written: {error}") from error
    log.warning("%s: written again from %s", run.tokenizer, corpus.path)


def load_run_tokenizer(run: RunDir) -> tuple[Tokenizer, int]:
    """Return the tokenizer of a run and the id of its end token.

    Raises CheckpointError if a file is missing or damaged.
    """
    problem = _difference(run.tokenizer)
    if problem is None:
        try:
            tokenizer = load_tokenizer(run.tokenizer / "tokenizer.json")
            if end := configured(run.tokenizer).get("eos_token"):
                return tokenizer, end_id(tokenizer, end)
            problem = f"{run.tokenizer / 'tokenizer_config.json'}: names no eos_token"
        except (ConfigError, DataError) as error:
            problem = f"{run.tokenizer}: damaged ({error})"
    raise CheckpointError(
        f"{problem}; `peptrain resume {quoted(run.path)}` writes it again from the corpus, or copy"
        " it from a run on the same corpus"
    )


def copy_run_tokenizer(run: RunDir, out: Path, *, plain: bool = True) -> None:
    """Copy the files of a verified tokenizer to `out`, such that it encodes as in training.

    plain: training on a corpus added no special tokens to a text.
    """
    _copy(run.tokenizer, out)
    if plain:
        encode_plainly(out)  # those of 0.1.0 may not


def _copy(directory: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (directory / name).is_file():
            shutil.copyfile(directory / name, out / name)


def _fill(directory: Path, corpus: Corpus) -> None:
    save_tokenizer(corpus.tokenizer_file, corpus.eos_id, corpus.special_tokens, directory)
    write_atomically(directory / SUMS, _sums(directory, TOKENIZER_FILES))


def _sums(directory: Path, names: Sequence[str]) -> str:
    return sha256sums(directory, [name for name in names if (directory / name).is_file()])


def _difference(directory: Path) -> str | None:
    """Name the first file that is not as it was written. None without checksums too.

    Files may be added, such as a chat template.
    """
    if not directory.is_dir():
        return f"{directory}: missing"
    if not os.path.lexists(directory / SUMS):
        return None
    try:
        written = (directory / SUMS).read_text(encoding="utf-8")
        names = [line[NAME:] for line in written.splitlines()]
        found = _sums(directory, names) if {*LEAST} <= {*names} <= {*TOKENIZER_FILES} else None
    except (OSError, ValueError) as error:
        return f"{directory}: can't be read ({error})"
    if written == found:
        return None
    same = written.splitlines() if found is None else found.splitlines()
    changed = [line[NAME:] for line in written.splitlines() if line not in same]
    return f"{directory / [*changed, SUMS][0]}: differs from what the run wrote ({SUMS})"
