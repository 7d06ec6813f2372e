"""The model card of an export, README.md, and the metadata in its safetensors files."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peptrain import __version__
from peptrain.data.index import INDEX, Index
from peptrain.errors import DataError
from peptrain.files import read_json
from peptrain.models.hf import count_parameters
from peptrain.runs.build import Opened
from peptrain.runs.select import at
from peptrain.settings import toml
from peptrain.text import one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig

CARD = "README.md"
NO_RESULTS = {
    *("event", "step", "crc32", "time", "seconds", "device_hours", "tokens_per_second"),
    *("peak_bytes", "observe_seconds", "tasks_seconds", "state_bytes", "flops_per_token"),
    *("parameters", "trainable", "non_embedding_trainable", "best_step"),
}
"""Values of the rows "eval" and "end" that say nothing about the model's quality."""
log = logging.getLogger("peptrain")


@dataclass(frozen=True)
class Loading:
    """How a form is loaded, for its card and for the command."""

    library: str
    """Value of library_name on the hub."""
    imports: str
    """Import statements, besides that of transformers."""
    call: str
    """The expression that returns the model. DIR is the directory, BASE that of the base model."""
    tokenizer: str = "AutoTokenizer"
    """Class of transformers that loads the tokenizer as it was in training."""
    flags: str = ""
    """More arguments of the tokenizer's from_pretrained, each after a comma."""
    note: str = ""
    """What else is to know, in Markdown."""

    def code(self) -> str:
        """Return the Python that loads the model and the tokenizer."""
        tokenizer = f"tokenizer = transformers.{self.tokenizer}.from_pretrained(DIR{self.flags})"
        imports = "\n".join(filter(None, ["import transformers", self.imports]))
        return f"{imports}\n\nmodel = {self.call}\n{tokenizer}"


def base_of(path: Path) -> str:
    """Return the name of a base model: ORG/NAME for one in a cache of the hub, else its own name.

    Never a path, which would tell where it is on this machine.
    """
    names = [part for part in path.parts if part.startswith("models--")]
    return names[-1].removeprefix("models--").replace("--", "/") if names else path.name


def in_markdown(name: str) -> str:
    """Return a name for a cell of a table, or between backticks, neither of which it may end."""
    return re.sub(r"[`|]", "_", one_line(name))


def metadata(opened: Opened) -> dict[str, str]:
    """Return what safetensors files say about themselves: method, recipe, step and version."""
    recipe = _recipe(opened)
    found = {"method": opened.config.method.name, "step": str(opened.saved.step)}
    return found | {"peptrain": __version__} | ({"recipe": recipe} if recipe else {})


def describe(file: Path, said: Mapping[str, str]) -> None:
    """Add `said` to the metadata of a safetensors file. Its tensors stay as they are.

    Offsets in the header count from its end, so that a longer one changes none. Raises OSError if
    the file can't be written.
    """
    copy = file.with_name(f"{file.name}.new")
    with file.open("rb") as old, copy.open("wb") as new:
        header = json.loads(old.read(int.from_bytes(old.read(8), "little")))
        header["__metadata__"] = {**header.get("__metadata__", {}), **said}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the tensors stay aligned
        new.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(old, new, 1 << 20)
    copy.replace(file)


def write_card(opened: Opened, out: Path, loading: Loading, difference: float) -> None:
    """Write the model card to `out`. Nothing in it names a path of this machine.

    difference: of the logits from the run's, relative to the largest.
    """
    from huggingface_hub import ModelCard, ModelCardData

    config = opened.config
    tuned = bool(config.tune.task)
    writes = not tuned or opened.model.config.is_encoder_decoder
    base = base_of(at(config.init_from)[0]) if config.init_from else None
    data = ModelCardData(
        library_name=loading.library,
        pipeline_tag="text-generation" if writes else "text-classification",
        tags=["peptrain", config.method.name, "fine-tuning" if tuned else "pre-training"],
        datasets=_datasets(opened) or None,
        base_model=base if base and "/" in base else None,
    )
    parts = [f"---\n{data.to_yaml()}\n---", *_text(opened, loading, base, difference)]
    ModelCard("\n\n".join(parts) + "\n").save(out / CARD)


def title(opened: Opened) -> str:
    """Return the first line of the card: family, size and method."""
    how = "pre-trained" if opened.config.init_from is None else "trained further"
    if opened.config.tune.task:
        how = f"fine-tuned on {_task(opened)}"
    family, size = opened.model.config.model_type, _size(count_parameters(opened.model))
    return f"{family} with {size} parameters, {how} by {opened.config.method.name}"


def _size(number: int) -> str:
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return str(number)


def _text(opened: Opened, loading: Loading, base: str | None, difference: float) -> Iterator[str]:
    method = opened.config.method
    yield f"# {title(opened)}"
    yield f"Trained by peptrain with the method `{method.name}`: {one_line(method.equation)}."
    yield "## Load it"
    yield "`DIR` is this directory, or its name on the hub."
    yield f"```python\n{loading.code()}\n```"
    if loading.note:
        yield loading.note
    yield "## How it was trained"
    yield _table(_training(opened, base))
    yield "All settings, without paths:"
    yield f"```toml\n{_settings(opened)}\n```"
    yield "## Results"
    results = [*_results(opened)]
    yield _table([("measured", "value"), *results]) if results else "Not measured at this step."
    yield "## Limits"
    yield _limits(opened, difference)


def _table(rows: Any) -> str:
    first, *rest = [f"| {key} | {value} |" for key, value in rows]
    return "\n".join([first, "|---|---|", *rest])


def _training(opened: Opened, base: str | None) -> Iterator[tuple[str, str]]:
    c, step = opened.config, opened.saved.step
    model = opened.model
    yield "setting", "value"
    yield "step", f"{step:,} of {c.train.steps:,}"
    if c.tune.task:
        yield "task", _task(opened)
        yield "batch", f"{c.train.batch_size:,} rows"
    else:
        each = c.train.batch_size * c.train.seq_len
        yield "tokens", f"{step * each:,}"
        yield "batch", f"{c.train.batch_size:,} sequences of {c.train.seq_len:,} tokens"
    trainable = count_parameters(model, trainable=True)
    yield "model", _sizes(model.config)
    yield "parameters in training", f"{count_parameters(model):,}, of them {trainable:,} trainable"
    yield "learning rate", f"{c.optim.lr} ({c.optim.kind}, schedule {c.schedule.kind})"
    yield "precision", str(c.train.precision)
    yield "seed", str(c.train.seed)
    yield "started from", in_markdown(base) if base else "random weights"
    if recipe := _recipe(opened):
        yield "recipe", recipe
    yield "peptrain", " and ".join(dict.fromkeys(_versions(opened))) or "unknown"


def _sizes(config: PretrainedConfig) -> str:
    named = {
        "layers": "num_hidden_layers",
        "hidden size": "hidden_size",
        "vocabulary": "vocab_size",
    }
    found = {name: getattr(config, key, None) for name, key in named.items()}
    return ", ".join([config.model_type, *(f"{k} {v:,}" for k, v in found.items() if v)])


def _task(opened: Opened) -> str:
    """Return the name of the task, which may be given as a file."""
    return in_markdown(Path(opened.config.tune.task).stem)


def _settings(opened: Opened) -> str:
    sections = toml.dump(opened.config, _is_private).strip().split("\n\n")
    left_out = ("[eval]", "[data]", *(() if opened.config.tune.task else ("[tune]",)))
    return "\n\n".join(x for x in sections if "\n" in x.strip() and not x.startswith(left_out))


def _is_private(_: Field[Any], value: object) -> bool:
    """Return whether a setting tells nothing, or where something is on this machine."""
    if isinstance(value, str):
        return not value or Path(value).is_absolute() or value.endswith(".toml")
    return value is None or isinstance(value, Path)


def _results(opened: Opened) -> Iterator[tuple[str, str]]:
    """Yield what was measured at this step: in the training, and later by `peptrain eval`."""
    step = opened.saved.step
    found: dict[str, Any] = {}
    for row in opened.run.metrics():
        if row["event"] in ("eval", "end") and row["step"] == step:
            found |= {k: v for k, v in row.items() if k not in NO_RESULTS}
    for entry in _entries(opened, "eval.json"):
        if entry.get("step") == step:
            found |= _evaluated(entry, opened.saved.identity.get("data"))
    for name, value in found.items():
        if isinstance(value, int | float):
            shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
            yield in_markdown(name.replace("_", " ")), shown


def _evaluated(entry: Mapping[str, Any], data: Any) -> dict[str, Any]:
    """Return the results of an entry of eval.json by the names that the training gives them."""
    if isinstance(task := entry.get("task"), str):
        values = {k: v for k, v in entry.items() if k not in ("step", "positions")}
        return {f"{task}_{k}": v for k, v in values.items()}
    if entry.get("data") != data or entry.get("legacy"):
        return {}
    kept = {"loss": "held_out_loss", "perplexity": "perplexity", "tokens": "held_out_tokens"}
    return {name: entry[key] for key, name in kept.items() if key in entry}


def _limits(opened: Opened, difference: float) -> str:
    agree = f"logits agree with the run's to {difference:.0e}, relative to the largest"
    return "\n".join(
        f"- {line}"
        for line in (
            "It was tested on the text or the task above only. Nobody looked for harmful, biased"
            " or false output, and it may repeat its training text.",
            "It was not tuned to follow instructions." if not opened.config.tune.task
            else "It is made for its task, and for texts like those of the task.",
            f"Checked when it was exported: {agree}.",
        )
    )  # fmt: skip


def _datasets(opened: Opened) -> list[str]:
    """Return the hub datasets in the run's corpus. Other sources may be private and are not named.

    Only of a corpus that is still there, and is the one that the run was trained on.
    """
    path = opened.config.data.path
    if path is None or not (path / INDEX).is_file():
        return []
    try:
        index = Index.load(path)
    except DataError as error:
        log.warning("%s: names no datasets, since %s", CARD, error)
        return []
    if index.fingerprint != opened.saved.identity.get("data"):
        return []
    named = (re.match(r"hf:([^@:]+)", str(one.get("source"))) for one in index.sources)
    return list(dict.fromkeys(found[1] for found in named if found))


def _recipe(opened: Opened) -> str | None:
    """Return the recipe that the command which began the run named."""
    for entry in _entries(opened, "env.json")[:1]:
        found = re.search(r"--recipe[ =]([\w.-]+)(?= |$)", str(entry.get("command", "")))
        return found[1] if found else None
    return None


def _versions(opened: Opened) -> Iterator[str]:
    return (one_line(str(entry["peptrain"])) for entry in _entries(opened, "env.json")
            if "peptrain" in entry)  # fmt: skip


def _entries(opened: Opened, name: str) -> list[dict[str, Any]]:
    """Return the entries of a JSON list of the run; none, with a warning, if it is damaged."""
    file = opened.run.path / name
    if not file.exists():
        return []
    try:
        return [entry for entry in read_json(file, list) if isinstance(entry, dict)]
    except ValueError as error:
        log.warning("%s: %s; %s lacks what is in it", file.parent, error, CARD)
        return []
