"""The held-out loss along the line between two models (LORO, Figure 3)."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from peptrain.analysis.source import Source, check_alike, digest, open_source
from peptrain.analysis.table import as_csv, read_table, write_tables
from peptrain.distributed.world import World
from peptrain.errors import CheckpointError, ConfigError
from peptrain.eval.perplexity import held_out_loss
from peptrain.eval.run import corpus_of
from peptrain.runs.environment import environment
from peptrain.settings.fields import check, check_whole

ALPHAS = tuple(i / 10 for i in range(11))
STEM = "line"


@dataclass(frozen=True)
class Point:
    """The loss of (1 - alpha) W_one + alpha W_other, in nats per token."""

    alpha: float
    loss: float
    tokens: int


def losses_along(
    one: Path,
    other: Path,
    *,
    data: Path | None = None,
    tokens: int = 0,
    alphas: Sequence[float] = ALPHAS,
    device: torch.device | str = "cpu",
    watch: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[Point]:
    """Return the losses of (1 - alpha) W_one + alpha W_other, for all weights of two runs.

    Dense equivalents are mixed and evaluated in fp32: in lower precision the ends are rounded, and
    the line has steps. Two runs of the same method with different seeds are the control, since
    their barrier is that of two random initialisations. Embeddings and norms are mixed too.

    one, other: runs, or RUN@STEP, with the same matrices. The held-out part is that of `one`, or of
    the prepared corpus `data`; `tokens` limits it, 0 is all. Raises CheckpointError, naming a
    matrix, for models of different shapes.
    """
    return _losses_along(open_source(one), open_source(other), data, tokens, alphas, device, watch)


def _losses_along(
    first: Source,
    second: Source,
    data: Path | None,
    tokens: int,
    alphas: Sequence[float],
    device: torch.device | str,
    watch: Callable[[str, int, int], None],
) -> list[Point]:
    check_alike(first, second)
    if first.opened is None or second.opened is None:
        raise ConfigError("--line: must be given two runs (got a Hugging Face directory)")
    corpus, train = corpus_of(first.opened, data), first.opened.config.train
    corpus_of(second.opened, data or first.opened.config.data.path)
    begin, end = (s.dense().to(device) for s in (first, second))  # type: ignore[arg-type]
    mixed, points = first.dense().to(device), []  # type: ignore[arg-type]
    for done, alpha in enumerate(alphas, 1):
        with torch.no_grad():
            for p, a, b in zip(*(m.parameters() for m in (mixed, begin, end)), strict=True):
                torch.lerp(a, b, alpha, out=p)
        found = held_out_loss(mixed, corpus.held_out(), seq_len=train.seq_len,
                              batch_size=train.micro_batch or 1, limit=tokens)  # fmt: skip
        points.append(Point(alpha, found.loss, found.tokens))
        watch(f"alpha {alpha}", done, len(alphas))
    return points


def write_line(
    runs: Sequence[Path],
    out: Path | None,
    data: Path | None = None,
    tokens: int = 0,
    device: torch.device | str = "cpu",
    watch: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> Path:
    """Write `losses_along` two runs to OUT/line.csv, with a JSON beside it; return its path.

    Both say which models they are between, as RUN@STEP. Raises ConfigError, before anything is
    measured, if `out` has the line between two others.
    """
    check(len(runs) == 2, "--line", [str(run) for run in runs], "given two runs")
    if out is None:
        raise ConfigError("--out: must be given with --line (got None)")
    check_whole("--tokens", tokens, 0)
    first, second = map(open_source, runs)
    pair = {"one": first.name, "other": second.name}
    _check_free(out, pair)
    points = _losses_along(first, second, data, tokens, ALPHAS, device, watch)
    lines = [{**pair, **asdict(point)} for point in points]
    about = {**pair, "weights": [digest(first), digest(second)], "dtype": "float32",
             "held_out_tokens": points[0].tokens,
             "versions": environment(World(0, 1, torch.device(device)))}  # fmt: skip
    return write_tables(out, STEM, {"csv": as_csv(list(lines[0]), lines)}, about)


def _check_free(out: Path, pair: Mapping[str, str]) -> None:
    """Raise ConfigError if `out` has the line between two other models."""
    file = out / f"{STEM}.csv"
    if not file.exists():
        return
    try:
        rows = read_table(file)
    except (OSError, ValueError, csv.Error) as error:
        raise CheckpointError(f"{file}: can't be read ({error}); choose another --out") from error
    for row in rows:
        found = {key: row.get(key) for key in pair}
        if found != pair:
            raise ConfigError(
                f"--out {out}: has the line between {found['one']} and {found['other']}, not"
                f" between {pair['one']} and {pair['other']}; choose another directory for this one"
            )
