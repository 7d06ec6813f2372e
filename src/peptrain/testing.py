"""The laws that every method must obey: `check_method(cls)` checks them on a small model.

Check a method of your own with one line, in a test or a notebook:

    peptrain.testing.check_method(MyMethod)
"""

from __future__ import annotations

import random
import shutil
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from peptrain.config import RunConfig, dump, parse, resolved
from peptrain.data import PrepareConfig, prepare
from peptrain.eval.run import evaluate
from peptrain.execution.loss import NextTokenLoss
from peptrain.exporting.export import export
from peptrain.methods import METHODS
from peptrain.methods.base import Method
from peptrain.models.dense import dense_state, load_dense
from peptrain.models.hf import ModelConfig
from peptrain.models.probe import evaluating
from peptrain.models.sites import ReparamLinear, find_sites, reparametrized
from peptrain.optim.adamw import OptimConfig
from peptrain.optim.muon import dense_matrices
from peptrain.optim.schedule import ScheduleConfig
from peptrain.rng import Rng
from peptrain.runs.build import build, plain_model
from peptrain.runs.checkpoint import Checkpoint, available, read
from peptrain.runs.directory import RunDir
from peptrain.sections import DataConfig, TrainConfig
from peptrain.training.loop import resume, train

STEPS, EVENT = 8, 3
"""Steps of a run, and the interval of all periodic events in it: merges are at steps 3 and 6."""
SMALL = {"rank": 2, "warm_start_steps": 2, "restart_warmup": 0, "reset_every": EVENT}
"""Settings for every method that has the field. Its intervals are EVENT."""
MODEL = {"hidden_size": 16, "intermediate_size": 24, "layers": 2, "heads": 2, "vocab_size": 320}
TRAIN = {"steps": STEPS, "batch_size": 4, "seq_len": 16, "log_every": 1, "eval_every": 0}
QWEN = {"family": "qwen2", "kv_heads": 1}
"""Adds biases, and matrices of three more shapes."""


def small(cls: type[Method], **given: Any) -> Method:
    """Return the method at rank 2 with an event every third step. `given` overrides settings."""
    own = {f.name: f.metadata for f in fields(cls)}
    every = {k: EVENT for k, rule in own.items() if rule.get("up")}
    known = {k: v for k, v in SMALL.items() if k in own}
    return cls(**(every | known | given))


def small_run(
    method: Method, corpus: Path, run: Path | None = None, **sections: Mapping[str, Any]
) -> RunConfig[Any]:
    """Configure 8 steps in float64 at a constant rate. `sections` are dicts of what to override."""
    given: dict[str, Any] = {
        "model": (ModelConfig, MODEL), "optim": (OptimConfig, {}),
        "schedule": (ScheduleConfig, {"kind": "constant", "warmup": 0}),
        "train": (TrainConfig, TRAIN | {"precision": "fp64"}),
    }  # fmt: skip
    made = {k: cls(**{**values, **sections.pop(k, {})}) for k, (cls, values) in given.items()}
    assert not sections, sections
    return RunConfig(method=method, data=DataConfig(path=corpus), run=run, **made)


def startable(config: RunConfig[Any]) -> RunConfig[Any]:
    """Return `config` with random weights, beside its run, if its method needs given ones."""
    if config.method.needs_weights and config.run:
        plain_model(config).save_pretrained(weights := config.run.with_name("weights"))
        config = replace(config, init_from=weights)
    return config


def small_corpus(folder: Path, words: int = 6000) -> Path:
    """Prepare a corpus of random words with 300 token ids in `folder`; return its path."""
    draw = random.Random(0)
    letters = "etaoinshrd"
    lexicon = ["".join(draw.choices(letters, k=draw.randrange(2, 7))) for _ in range(60)]
    text, out = folder / "text.txt", folder / "corpus"
    text.write_text(" ".join(draw.choices(lexicon, k=words)), encoding="utf-8")
    prepare(PrepareConfig(inputs=(text,), out=out, vocab_size=300, held_out=0.02))
    return out


@dataclass
class Bench:
    """A method on a small model, stepped by hand without a trainer or a run directory."""

    config: RunConfig[Method]
    model: Any
    optimizer: Optimizer
    step: int = 0

    @property
    def layers(self) -> list[ReparamLinear]:
        return list(reparametrized(self.model))

    def backward(self) -> dict[str, bool]:
        """Backpropagate one batch. Return whether each trainable tensor has a nonzero gradient."""
        NextTokenLoss(self.model)(ids(self.step)).backward()
        trainable = ((n, p) for n, p in self.model.named_parameters() if p.requires_grad)
        return {n: p.grad is not None and bool(p.grad.any()) for n, p in trainable}

    def train(self, steps: int = 1) -> None:
        for _ in range(steps):
            self.backward()
            self.update()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.after_step(self.step)

    def after_step(self, step: int) -> None:
        self.config.method.after_step(self.model, self.optimizer, step, Rng(0))

    @torch.no_grad()
    def scramble(self, size: float = 0.3) -> None:
        """Add random values to all trainable parameters, including biases and diagonals."""
        draw = torch.Generator().manual_seed(1)
        for layer in self.layers:
            for p in layer.parameters():
                if p.requires_grad:
                    p.add_(torch.randn(p.shape, generator=draw, dtype=p.dtype), alpha=size)

    @torch.no_grad()
    def effective(self) -> dict[str, Tensor]:
        """Return W_eff of each layer, or its output for a fixed x where there is no W_eff."""
        if self.config.method.has_dense_equivalent:
            return {layer.site: layer.effective_weight().clone() for layer in self.layers}
        with evaluating(self.model):
            return {layer.site: layer(_inputs(layer)) for layer in self.layers}

    def frozen(self) -> dict[str, Tensor]:
        """Return copies of the frozen parameters."""
        return {n: p.clone() for n, p in self.model.named_parameters() if not p.requires_grad}

    @torch.no_grad()
    def logits(self) -> Tensor:
        logits: Tensor = self.model.eval()(input_ids=ids(99)).logits
        return logits


def bench(
    method: Method,
    phase: int | None = None,
    *,
    model: Mapping[str, Any] = QWEN,
    optim: Mapping[str, Any] | None = None,
) -> Bench:
    """Set up `method` in `phase`, by default the last one, which is after any warm start."""
    config = small_run(method, Path(), model=model, optim=optim or {})
    config = resolved(config, world_size=1, on_gpu=False)
    at = len(config.method.phases(STEPS)) if phase is None else phase
    built = build(config, at)
    return Bench(config, built, config.method.optimizer(built, find_sites(built), config.optim, at))


def ids(seed: int) -> Tensor:
    """Draw token ids, [4, 17]."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(MODEL["vocab_size"], (4, 17), generator=draw)


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    """Raise AssertionError unless no entry differs by more than `tolerance`."""
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def newest(run: Path) -> Checkpoint:
    """Read the latest checkpoint of a run."""
    return read(available(RunDir(run).checkpoints)[-1])


def differences(one: Checkpoint, other: Checkpoint) -> list[str]:
    """List what is not exactly equal in two checkpoints."""
    found = [k for k in ("step", "phase", "groups") if getattr(one, k) != getattr(other, k)]
    for kind in ("model", "optimizer"):
        a, b = getattr(one, kind), getattr(other, kind)
        found += sorted(a.keys() ^ b.keys())
        found += [k for k in sorted(a.keys() & b.keys()) if not same(a[k], b[k])]
    return found


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether dtypes and all values are equal."""
    return a.dtype == b.dtype and torch.equal(a, b)


def losses(run: Path) -> list[tuple[int, float]]:
    """Return step and loss of each "step" row of metrics.jsonl."""
    return [(row["step"], row["loss"]) for row in RunDir(run).metrics() if row["event"] == "step"]


def _inputs(layer: ReparamLinear) -> Tensor:
    draw = torch.Generator().manual_seed(2)
    return torch.randn(2, 5, layer.in_features, generator=draw, dtype=torch.float64)


def forward_is_the_effective_weight(one: Bench) -> None:
    """Check that y = x W_effᵀ + bias in every layer."""
    for layer in one.layers if one.config.method.has_dense_equivalent else ():
        x = _inputs(layer)
        wanted = nn.functional.linear(x, layer.effective_weight(), layer.bias)
        with evaluating(one.model):
            close(layer(x), wanted, 1e-13 * max(1.0, wanted.abs().max().item()))


# The laws. Each takes a method with small settings and the path of a corpus.


def it_is_a_frozen_dataclass_of_plain_settings(method: Method, corpus: Path) -> None:
    """It has an equation and a docstring, and survives a round trip through TOML."""
    assert method.equation and "\n" not in method.equation, "equation: must be one line"
    assert type(method).__doc__, "docstring: missing; write what the method trains"
    try:
        method.anything = 1  # type: ignore[attr-defined]
    except AttributeError:
        pass
    else:
        raise AssertionError("not a frozen dataclass: write @dataclass(frozen=True, kw_only=True)")
    for name, value in asdict(method).items():
        assert isinstance(value, str | int | float | bool | None), (
            f"{name}: not a plain value (got {value!r})"
        )
    config = resolved(small_run(method, corpus), world_size=1, on_gpu=False)
    assert parse(tomllib.loads(dump(config))) == config


def installing_keeps_the_function(method: Method, corpus: Path) -> None:
    """Checked in every phase, with the settings in `keeps_function_with`."""
    if method.keeps_function_with is None:
        return forward_is_the_effective_weight(bench(method))
    keeping = replace(method, **method.keeps_function_with)
    for phase in range(len(keeping.phases(STEPS)) + 1):
        adapted = bench(keeping, phase)
        plain = replace(adapted, model=plain_model(adapted.config))
        close(adapted.logits(), plain.logits(), 1e-12)


def a_layer_computes_its_effective_weight(method: Method, corpus: Path) -> None:
    """Checked after training, and for random values of the trainable parameters."""
    one = bench(method)
    one.train(EVENT + 2)
    forward_is_the_effective_weight(one)
    one.scramble()
    forward_is_the_effective_weight(one)


def a_merge_keeps_the_function_and_a_second_one_does_nothing(method: Method, corpus: Path) -> None:
    """`after_step` changes no layer's function. A second call changes no weight either."""
    one = bench(method)
    one.train(EVENT - 1)
    one.scramble()
    before = one.effective()
    one.after_step(EVENT)
    merged = one.effective()
    for site, weight in before.items():
        close(merged[site], weight, 1e-12)
    frozen = one.frozen()
    one.after_step(2 * EVENT)
    moved = [n for n, p in one.frozen().items() if not torch.equal(p, frozen[n])]
    moved += [s for s, weight in one.effective().items() if not torch.equal(weight, merged[s])]
    assert moved == [], f"the second merge changes {moved}"


def every_trainable_tensor_gets_a_gradient(method: Method, corpus: Path) -> None:
    """Checked within two steps of the start and of a merge. With `zero_factor` (at the start) and
    `merges` (after a merge) one factor of each layer gets none at first: the other is zero."""
    one = bench(method)
    for start in (0, EVENT):
        one.train(start - one.step)
        first = one.backward()
        for layer in one.layers:
            factors = [f"{layer.site}.{n}" for n, p in layer.named_parameters() if p.ndim == 2]
            dead = [n for n in factors if not first.get(n, True)]
            zeroed = method.merges if start else method.zero_factor
            said = f"step {start}: no gradient for {dead} of {factors}"
            assert len(dead) == 1 if zeroed else len(dead) <= 1, said
        one.update()
        second = one.backward()
        never = [n for n in first if not (first[n] or second[n])]
        assert never == [], f"no gradient in two steps: {never}"
        one.update()


def what_is_frozen_stays_the_same_between_merges(method: Method, corpus: Path) -> None:
    """Checked exactly, with weight decay."""
    one = bench(method, optim={"weight_decay": 0.1})
    for steps in (EVENT - 1, EVENT - 1):
        before = one.frozen()
        one.train(steps)
        moved = [n for n, p in one.frozen().items() if not torch.equal(p, before[n])]
        assert moved == [], f"frozen parameters changed: {moved}"
        one.train()  # the merge


def the_dense_twin_has_the_same_logits(method: Method, corpus: Path) -> None:
    """Checked on Qwen2, on Qwen2 with tied embeddings and on OLMo2."""
    for model in (QWEN, QWEN | {"tied": True}, {"family": "olmo2"}):
        one = bench(method, model=model)
        one.train(EVENT + 1)
        one.scramble(0.05)
        if not method.has_dense_equivalent:
            continue
        plain = plain_model(one.config)
        load_dense(plain, dense_state(one.model))
        # Hugging Face's norms compute in fp32, which costs an error of 1e-7.
        close(one.logits(), replace(one, model=plain).logits(), 1e-5)


def a_run_resumes_to_the_same_bits(method: Method, corpus: Path) -> None:
    """Checked from a checkpoint half-way, for weights, moments and losses, by each optimizer."""
    half, keep = STEPS // 2, {"checkpoint_every": STEPS // 2, "keep": 9}
    has_dense = dense_matrices(find_sites(bench(method, phase=0).model))  # which muon needs
    for kind in (k for k in method.optim_kinds if k != "muon" or has_dense):
        optim = {"kind": kind} | ({"momentum": 0.9} if kind == "sgd" else {})
        with tempfile.TemporaryDirectory() as folder:
            whole, parted = Path(folder, "whole"), Path(folder, "parted")
            train(startable(small_run(method, corpus, whole, train=keep, optim=optim)))
            shutil.copytree(whole, parted)
            for path in available(RunDir(parted).checkpoints):
                if path.name > f"step-{half:08d}":
                    shutil.rmtree(path)
            assert newest(parted).step == half
            resume(parted)
            apart = differences(newest(whole), newest(parted))
            assert apart == [], f"{kind}: not as in an uninterrupted run: {apart}"
            assert losses(whole) == losses(parted), f"{kind}: other losses than uninterrupted"


def a_run_is_evaluated_and_exported(method: Method, corpus: Path) -> None:
    """Evaluation reproduces the final loss of the run, and export, which compares logits, works."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        end = train(startable(small_run(method, corpus, run))).held_out.loss
        found = evaluate(run).loss
        assert abs(found - end) <= 1e-6 * end, f"loss {found} in evaluation, {end} in training"
        if method.has_dense_equivalent or method.activation is not None:
            export(run, Path(folder, "out"), method.export_form)


Law = Callable[[Method, Path], None]
LAWS: tuple[Law, ...] = (
    it_is_a_frozen_dataclass_of_plain_settings,
    installing_keeps_the_function,
    a_layer_computes_its_effective_weight,
    a_merge_keeps_the_function_and_a_second_one_does_nothing,
    every_trainable_tensor_gets_a_gradient,
    what_is_frozen_stays_the_same_between_merges,
    the_dense_twin_has_the_same_logits,
    a_run_resumes_to_the_same_bits,
    a_run_is_evaluated_and_exported,
)


@contextmanager
def registered(cls: type[Method]) -> Iterator[None]:
    """Register the method within this context, so that a run can use it by name."""
    ours = METHODS.get(cls.name)
    assert ours in (None, cls), f"{cls.name!r} is the name of another method; choose another one"
    METHODS[cls.name] = cls
    try:
        yield
    finally:
        if ours is None:
            del METHODS[cls.name]


def check_method(cls: type[Method], **settings: Any) -> None:
    """Check all laws on `cls`, at rank 2 with intervals of 3 steps; `settings` override these.

    Runs on a CPU in float64, in a temporary directory, and takes about ten seconds. Raises an
    AssertionError that lists every law that does not hold, and why.
    """
    method, broken = small(cls, **settings), list[str]()
    with tempfile.TemporaryDirectory() as folder, registered(cls):
        corpus = small_corpus(Path(folder))
        for law in LAWS:
            try:
                law(method, corpus)
            except Exception as error:  # including those of the method's own code
                said = law.__name__.replace("_", " ")
                broken.append(f"- {said}: {type(error).__name__}: {error}")
    if broken:
        raise AssertionError("\n".join([f"{cls.__name__} breaks {len(broken)} laws:", *broken]))
