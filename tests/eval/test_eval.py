"""Perplexity against a count by hand, and the evaluation of a run."""

import errno
import json
import math
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import rows, tiny
from torch import Tensor, nn

from peptrain.cli.app import main
from peptrain.config import load, resolved
from peptrain.data import Corpus, PrepareConfig, prepare
from peptrain.distributed.world import World
from peptrain.errors import ConfigError, DataError
from peptrain.eval.perplexity import Evaluation, held_out_loss, held_out_loss_legacy
from peptrain.eval.run import _record, evaluate
from peptrain.methods import METHODS
from peptrain.models.hf import build_model
from peptrain.runs.directory import RunDir
from peptrain.testing import MODEL, small_corpus
from peptrain.training.loop import train

V = MODEL["vocab_size"]
both_evaluators = pytest.mark.parametrize("measure", [held_out_loss, held_out_loss_legacy])


def draw(tokens: int, vocabulary: int = V) -> np.ndarray:
    return np.random.default_rng(tokens).integers(vocabulary, size=tokens).astype("<u2")


class Model(nn.Module):
    """Logits from the sum of what came before: every token of the context counts."""

    device = torch.device("cpu")

    def __init__(self, vocabulary: int = 11) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(vocabulary, vocabulary, generator=generator, dtype=torch.float64)
        self.seen: list[tuple[tuple[int, ...], bool]] = []
        """Shape of the ids, and whether the model was in training mode."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        self.seen.append((tuple(input_ids.shape), self.training))
        assert input_ids.dtype == torch.int64 and not use_cache
        return SimpleNamespace(logits=self.table[input_ids].cumsum(1))


def surprise(logits: Tensor, target: int) -> float:
    """-log softmax(logits)[target], spelt out in Python's floats."""
    values = [float(x) for x in logits]
    top = max(values)
    return math.log(sum(math.exp(x - top) for x in values)) + top - values[target]


def by_hand(model: Any, tokens: np.ndarray, seq_len: int) -> list[float]:
    """The loss of every token but the first, each from a forward pass of its own."""
    found = []
    for t in range(1, len(tokens)):
        start = (t - 1) // seq_len * seq_len
        context = torch.from_numpy(tokens[start:t].astype(np.int64))[None]
        with torch.no_grad():
            logits = model(input_ids=context, use_cache=False).logits[0, -1]
        found.append(surprise(logits.double(), int(tokens[t])))
    return found


def close(a: Evaluation, b: Evaluation) -> bool:
    return a.tokens == b.tokens and a.loss == pytest.approx(b.loss, rel=1e-12)


@pytest.fixture(scope="module")
def network() -> Any:
    """A real model, in float64, whose logits are far from uniform."""
    config = resolved(tiny("full", Path()), world_size=1, on_gpu=False)
    model = build_model(config.model, seq_len=16, seed=0, precision="fp64")
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p *= 30
    return model.eval()


@pytest.mark.parametrize("tokens, seq_len", [(50, 16), (33, 16), (3, 16), (12, 1)])
def test_perplexity_is_that_of_a_count_by_hand(network: Any, tokens: int, seq_len: int) -> None:
    ids = draw(tokens)
    losses = by_hand(network, ids, seq_len)
    found = held_out_loss(network, ids, seq_len=seq_len, batch_size=3, precision="fp64")
    assert found.tokens == len(losses) == tokens - 1
    # 1e-7 is what Hugging Face's norms lose by computing in fp32.
    assert found.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.loss), rel=1e-12)
    assert found.loss > math.log(V) + 0.1  # far from uniform, and wrong


streams = given(n=st.integers(2, 70), L=st.integers(1, 20), rows=st.integers(1, 9))


@streams
@settings(max_examples=60, deadline=None)
def test_batches_and_the_last_short_window_change_nothing(n: int, L: int, rows: int) -> None:
    model, ids = Model(), draw(n, 11)
    losses = by_hand(model, ids, L)
    found = held_out_loss(model, ids, seq_len=L, batch_size=rows)  # type: ignore[arg-type]
    assert close(found, Evaluation(sum(losses) / len(losses), n - 1))


@streams
@settings(max_examples=30, deadline=None)
def test_nothing_is_padded_and_nothing_is_read_twice(n: int, L: int, rows: int) -> None:
    model = Model()
    held_out_loss(model, draw(n, 11), seq_len=L, batch_size=rows)  # type: ignore[arg-type]
    assert sum(shape[0] * shape[1] for shape, _ in model.seen) == n - 1
    assert all(shape[0] <= rows and shape[1] <= L for shape, _ in model.seen)


@pytest.mark.parametrize("seq_len, rows", [(256, 8), (300, 6), (2048, 1), (5000, 1)])
def test_a_forward_pass_on_a_cpu_has_2048_tokens_and_at_least_one_window(
    seq_len: int, rows: int
) -> None:
    model, tokens = Model(), max(seq_len * rows * 2, 10_001)
    found = held_out_loss(model, draw(tokens + 1, 11), seq_len=seq_len)  # type: ignore[arg-type]
    assert model.seen[0][0] == (rows, seq_len) and found.tokens == tokens
    assert max(shape[0] for shape, _ in model.seen) == rows


class Share(World):
    """One of several ranks, which keeps what it would have sent to the others."""

    def sum(self, values: Tensor) -> Tensor:
        shares.append(values)
        return torch.ones_like(values)


shares: list[Tensor] = []


@streams
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("ranks", [2, 5])
def test_the_shares_of_the_ranks_add_up(ranks: int, n: int, L: int, rows: int) -> None:
    shares.clear()
    model, ids = Model(), draw(n, 11)
    kwargs: Any = {"seq_len": L, "batch_size": rows}
    for rank in range(ranks):  # some may have no window at all
        held_out_loss(model, ids, world=Share(rank, ranks, model.device), **kwargs)  # type: ignore[arg-type]
    loss, tokens = torch.stack(shares).sum(0).tolist()
    assert close(held_out_loss(model, ids, **kwargs), Evaluation(loss / tokens, round(tokens)))  # type: ignore[arg-type]


@streams
@settings(max_examples=30, deadline=None)
@pytest.mark.parametrize("ranks", [1, 3])
def test_who_watches_is_told_after_each_forward_pass(ranks: int, n: int, L: int, rows: int) -> None:
    model = Model()
    for rank in range(ranks):
        seen: list[tuple[int, int]] = []
        held_out_loss(
            model, draw(n, 11), seq_len=L, batch_size=rows, world=Share(rank, ranks, model.device),
            watch=lambda *told, seen=seen: seen.append(told),
        )  # type: ignore[arg-type]  # fmt: skip
        has_a_window = (n - 2) // L >= rank
        assert [total for _, total in seen] == [n - 1] * len(seen)
        assert sorted({done for done, _ in seen}) == [done for done, _ in seen]
        assert not has_a_window or seen[-1] == (n - 1, n - 1)
    assert len(model.seen) >= len(seen)


@pytest.mark.parametrize("limit", [1, 7, 8, 9, 49, 50, 1000])
def test_a_limit_is_a_number_of_predicted_tokens(limit: int) -> None:
    model, ids = Model(), draw(51, 11)
    kwargs: Any = {"seq_len": 8, "batch_size": 2}
    found = held_out_loss(model, ids, limit=limit, **kwargs)  # type: ignore[arg-type]
    assert found.tokens == min(limit, 50)
    assert found == held_out_loss(model, ids[: limit + 1], **kwargs)  # type: ignore[arg-type]


def test_the_older_evaluator_divides_the_batches_means_by_one_too_many() -> None:
    model, ids = Model(), draw(8 * 5 + 4, 11)
    losses = by_hand(model, ids, 8)  # five whole windows, and a short one that is a batch alone
    found = {}
    for batch_size, cuts in {1: (8, 16, 24, 32, 40), 2: (16, 32, 40), 5: (40,)}.items():
        means = [float(part.mean()) for part in np.split(np.array(losses), cuts)]
        wanted = sum(means) / (len(means) + 1)
        legacy = held_out_loss_legacy(model, ids, seq_len=8, batch_size=batch_size)  # type: ignore[arg-type]
        assert close(legacy, Evaluation(wanted, len(losses)))
        found[batch_size] = legacy.loss
    assert found[5] < found[2] < found[1]
    right = held_out_loss(model, ids, seq_len=8, batch_size=1)  # type: ignore[arg-type]
    assert all(loss < right.loss for loss in found.values())


@both_evaluators
@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_comes_back(measure: Any, training: bool) -> None:
    model = Model().train(training)
    measure(model, draw(20, 11), seq_len=8, batch_size=2)
    assert model.training is training
    assert not any(mode for _, mode in model.seen)


@both_evaluators
def test_the_models_mode_comes_back_after_an_error(measure: Any) -> None:
    model = Model(5).train()
    with pytest.raises(IndexError):
        measure(model, np.array([0, 1, 7, 2]), seq_len=8, batch_size=2)
    assert model.training


@both_evaluators
@pytest.mark.parametrize("tokens", [0, 1])
def test_nothing_to_predict_is_an_error(measure: Any, tokens: int) -> None:
    with pytest.raises(DataError, match=rf"has {tokens} tokens, .* nothing to predict.*--held-out"):
        measure(Model(), draw(tokens), seq_len=8, batch_size=2)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity() -> None:
    config = resolved(tiny("full", Path()), world_size=1, on_gpu=False)
    model = build_model(config.model, seq_len=16, seed=0)
    nn.init.zeros_(model.get_output_embeddings().weight)
    for precision in ("fp32", "bf16-mixed"):
        found = held_out_loss(model, draw(100), seq_len=16, batch_size=4, precision=precision)
        assert found.perplexity == pytest.approx(V, rel=1e-6)


def test_a_loss_too_large_for_exp_is_no_error() -> None:
    assert Evaluation(800.0, 1).perplexity == math.inf


# Of a run.


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run by each method."""
    folder = tmp_path_factory.mktemp("eval")
    for name in METHODS:
        train(tiny(name, corpus, folder / name, train={"precision": "fp32"}))
    return {name: folder / name for name in METHODS}


def recorded(run: Path) -> list[dict[str, Any]]:
    file = run / "eval.json"
    return list(json.loads(file.read_text())) if file.exists() else []


@pytest.mark.parametrize("name", METHODS)
def test_a_run_is_measured_as_it_was_at_its_end(name: str, runs: dict[str, Path]) -> None:
    (end,) = rows(runs[name], "end")
    for batch_size in (None, 1, 7):
        found = evaluate(runs[name], batch_size=batch_size)
        assert found.tokens == end["held_out_tokens"]
        # Trained factors against the folded weight, in fp32.
        assert found.loss == pytest.approx(end["held_out_loss"], abs=1e-5)


@pytest.mark.parametrize("legacy", [False, True])
def test_an_evaluation_of_a_run_can_be_watched(legacy: bool, runs: dict[str, Path]) -> None:
    seen: list[tuple[int, int]] = []
    found = evaluate(runs["full"], legacy=legacy, batch_size=4, watch=lambda *n: seen.append(n))
    assert seen[0] == (64, found.tokens) and seen[-1] == (found.tokens, found.tokens)


def test_results_are_kept_beside_the_run(runs: dict[str, Path], corpus: Path) -> None:
    run, before = runs["full"], len(recorded(runs["full"]))
    plain, legacy = evaluate(run), evaluate(run, legacy=True, batch_size=2)
    first, second = recorded(run)[before:]
    assert (first["loss"], first["perplexity"], first["tokens"]) == (
        plain.loss, plain.perplexity, plain.tokens
    )  # fmt: skip
    assert (first["legacy"], second["legacy"]) == (False, True)
    assert second["loss"] == legacy.loss < plain.loss
    assert first["step"] == 8 and first["data"] == Corpus.open(corpus).fingerprint


def test_evaluations_at_the_same_time_are_all_kept(
    runs: dict[str, Path], corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peptrain.eval.run.WAIT", 600.0)
    run, before, found = RunDir(runs["full"]), recorded(runs["full"]), Evaluation(1.0, 2)
    opened = Corpus.open(corpus)
    threads = [
        threading.Thread(target=_record, args=(run, step, opened, found, False))
        for step in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    after = recorded(run.path)
    assert after[: len(before)] == before
    assert sorted(row["step"] for row in after[len(before) :]) == list(range(6))
    assert not list(run.path.glob("eval.json?*"))


@pytest.mark.parametrize("damage", ["a directory", "[{", "null", "{}", "[" * 10**5, "9" * 5000])
def test_a_damaged_eval_json_is_kept_aside(
    damage: str, runs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, row = RunDir(tmp_path), {"step": 3}
    for number in ("", "-2"):
        (tmp_path / "eval.json").unlink(missing_ok=True)
        if damage == "a directory":
            (tmp_path / "eval.json").mkdir()
        else:
            (tmp_path / "eval.json").write_text(damage)
        run.append("eval.json", row)
        run.append("eval.json", row)
        assert json.loads((tmp_path / "eval.json").read_text()) == [row, row]
        aside = tmp_path / f"eval.damaged{number}"
        assert aside.is_dir() or aside.read_text() == damage
        assert "eval.json: damaged (" in caplog.text and f"moved to {aside}" in caplog.text


def test_a_run_that_can_not_be_written_is_evaluated(
    runs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A resume of it is refused in one line."""

    def refused(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    run = tmp_path / "run"
    shutil.copytree(runs["full"], run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    monkeypatch.setattr("peptrain.runs.lock._open", refused)
    assert main(["eval", str(run)]) == 0
    said = "".join(capsys.readouterr().out.split())  # a warning is wrapped
    (end,) = rows(run, "end")
    assert f"loss{end['held_out_loss']:.4f}over" in said
    assert "eval.json:theresultcouldnotbesaved:" in said and "Read-only" in said
    assert main(["resume", str(run)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {run}/lock: can't be written: Read-only file system; make its")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_the_command_says_that_the_older_evaluator_flatters(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(runs["full"])
    assert main(["eval", run]) == 0
    plain = capsys.readouterr().out
    assert main(["eval", run, "--legacy", "--batch-size", "1"]) == 0
    legacy = capsys.readouterr().out
    assert "legacy: divided by batches + 1, which flatters the model" in legacy
    assert "flatters" not in plain
    assert [row["legacy"] for row in recorded(runs["full"])[-2:]] == [False, True]
    shown = [f"perplexity {row['perplexity']:.3f}" for row in recorded(runs["full"])[-2:]]
    assert plain.startswith(shown[0]) and legacy.startswith(shown[1])
    assert f"over {recorded(runs['full'])[-1]['tokens']:,} tokens" in plain


def test_only_the_older_evaluator_takes_the_micro_batch(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    for measure in (held_out_loss, held_out_loss_legacy):

        def noted(*args: Any, batch_size: int | None, **kwargs: Any) -> Evaluation:
            asked.append(batch_size)
            return Evaluation(1.0, 1)

        monkeypatch.setattr(f"peptrain.eval.run.{measure.__name__}", noted)
    for legacy in (False, True):
        for batch_size in (None, 7):
            evaluate(runs["full"], legacy=legacy, batch_size=batch_size)
    assert asked == [None, 7, load(runs["full"] / "config.toml").train.micro_batch, 7]


@pytest.fixture
def other(runs: dict[str, Path], tmp_path: Path) -> Iterator[Path]:
    """Another text in the run's tokens, all of which its model knows."""
    text = tmp_path / "other.txt"
    text.write_text("tea in a tin, rain on a rose. " * 20)
    tokenizer = runs["bpt"] / "tokenizer"
    config = PrepareConfig(
        inputs=(text,), out=tmp_path / "other", tokenizer=tokenizer, held_out=0.5
    )
    yield prepare(config).path


def test_another_corpus_can_be_measured(runs: dict[str, Path], other: Path) -> None:
    run = runs["bpt"]
    own, found = evaluate(run), evaluate(run, data=other)
    assert found.tokens == len(Corpus.open(other).held_out()) - 1 != own.tokens
    assert found.loss != own.loss
    assert recorded(run)[-1]["data"] == Corpus.open(other).fingerprint


def test_a_corpus_of_another_tokenizer_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    foreign = small_corpus(tmp_path, words=2000)  # other merges: its ids mean other words
    before = recorded(runs["bpt"])
    with pytest.raises(DataError, match=r"another tokenizer than the run's.*--tokenizer .*bpt/tok"):
        evaluate(runs["bpt"], data=foreign)
    assert recorded(runs["bpt"]) == before


def test_ids_that_the_model_lacks_are_named(corpus: Path, other: Path, tmp_path: Path) -> None:
    known = Corpus.open(other).max_id + 1
    assert known <= Corpus.open(corpus).max_id
    train(tiny("full", other, tmp_path / "run", model={"vocab_size": known}, train={"steps": 1}))
    with pytest.raises(DataError, match=rf"contains token id \d+, but .* is {known}"):
        evaluate(tmp_path / "run", data=corpus)


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_of_nothing_is_refused(runs: dict[str, Path], size: int) -> None:
    with pytest.raises(ConfigError, match=rf"--batch-size: must be >= 1 \(got {size}\)"):
        evaluate(runs["full"], batch_size=size)
