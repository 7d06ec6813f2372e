"""The tokenizer of a run: damage is noticed and repaired, and its export encodes as in training."""

import errno
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import transformers.modeling_utils
from safetensors import SafetensorError
from support import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import peptrain.models.hf
from peptrain.data import Corpus, PrepareConfig, prepare
from peptrain.data.tokenizer import encode, train_tokenizer
from peptrain.errors import CheckpointError
from peptrain.eval.run import evaluate
from peptrain.exporting.export import export
from peptrain.files import write_atomically
from peptrain.runs.directory import RunDir
from peptrain.runs.init_from import compare_tokenizers
from peptrain.runs.tokenizer import SUMS, load_run_tokenizer
from peptrain.training.loop import resume, train

FILES = ("tokenizer.json", "tokenizer_config.json", SUMS)


@pytest.fixture(scope="module")
def run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a method that both forms of an export support."""
    return train(tiny("lowrank", corpus, tmp_path_factory.mktemp("runs") / "run")).run


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def flipped(content: bytes) -> bytes:
    at = random.Random(0).randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "deleted": lambda content: None,
    "emptied": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "last byte off": lambda content: content[:-1],
    "random": lambda content: random.Random(0).randbytes(len(content)),
    "flip": flipped,
    "null": lambda content: b"null",
    "list": lambda content: b"[]",
    "object": lambda content: b"{}",
    "nested": lambda content: b"[" * 100_000,
    "integer": lambda content: b'{"eos_token": ' + b"9" * 5000 + b"}",
}


def damage(file: Path, kind: str) -> None:
    content = file.read_bytes()
    file.unlink()
    if kind == "directory":
        file.mkdir()
    elif (changed := DAMAGES[kind](content)) is not None:
        file.write_bytes(changed)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", [*DAMAGES, "directory"])
def test_a_damaged_tokenizer_is_named_with_its_repair(file: str, kind: str, copy: Path) -> None:
    damage(copy / "tokenizer" / file, kind)
    if (file, kind) == (SUMS, "deleted"):
        load_run_tokenizer(RunDir(copy))  # nothing that is read differs
        return
    with pytest.raises(CheckpointError, match=r"tokenizer.*: .*`peptrain resume .*writes it again"):
        load_run_tokenizer(RunDir(copy))
    if file == SUMS:
        return
    (copy / "tokenizer" / SUMS).unlink()
    try:  # as in a run of 0.1.0: what can't be noticed is not a traceback
        load_run_tokenizer(RunDir(copy))
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert kind in ("flip", "last byte off")


def test_every_command_that_reads_it_refuses_a_damaged_tokenizer(
    copy: Path, corpus: Path, tmp_path: Path
) -> None:
    file = copy / "tokenizer" / "tokenizer.json"
    file.write_bytes(file.read_bytes().replace(b'"id"', b'"id" ', 1))  # the same to a reader
    begun = replace(tiny("full", corpus), init_from=copy)
    commands: list[Callable[[], object]] = [
        lambda: export(copy, tmp_path / "out"),
        lambda: export(copy, tmp_path / "out", "factorised"),
        lambda: evaluate(copy),
        lambda: compare_tokenizers(begun, Corpus.open(corpus)),
    ]
    for command in commands:
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: differs .*`peptrain resume"):
            command()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["tokenizer.json", "directory", "a file", "all"])
def test_a_resume_writes_a_damaged_tokenizer_again(
    kind: str, copy: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copy / "tokenizer"
    if kind == "tokenizer.json":
        (folder / kind).write_text("{}")
    elif kind == "directory":
        damage(folder / "tokenizer.json", kind)
    else:
        shutil.rmtree(folder)
        if kind == "a file":
            folder.touch()
    resume(copy)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in (run / "tokenizer").iterdir()
    }
    assert "written again from" in caplog.text


def test_a_run_of_0_1_0_has_no_checksums(
    copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its tokenizer was saved by transformers, with all that the given one added and varied."""
    folder = copy / "tokenizer"
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own = Tokenizer.from_str(plain.to_str())
    end = "<|endoftext|>"
    added = [(end, own.token_to_id(end))]
    own.post_processor = processors.TemplateProcessing(single=f"{end} $A", special_tokens=added)
    own.model.dropout = 0.9  # type: ignore[attr-defined]
    own.save(str(tmp_path / "own.json"))
    shutil.rmtree(folder)
    old = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "own.json"))
    old.eos_token = end
    old.save_pretrained(folder)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    resume(copy)
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}
    text = "the cat sat on the mat " * 9
    ids = plain.encode(text).ids
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids != ids
    exported = AutoTokenizer.from_pretrained(export(copy, tmp_path / "out"))
    assert exported(text).input_ids == ids and exported.eos_token == end
    assert "replaces it" not in caplog.text


# Exports encode as the training data was encoded.

TEXT = "The 3 foxes of 2026: naïve\n\n  (x == 1)  你好 🙂"


def byte_level() -> Tokenizer:
    made = train_tokenizer(iter([TEXT * 20]), 320, "</s>")
    made.add_special_tokens(["<s>", "<pad>"])
    made.post_processor = processors.Sequence([processors.ByteLevel(), template(made)])
    return made


def template(made: Tokenizer) -> processors.TemplateProcessing:
    ids = [(name, made.token_to_id(name)) for name in ("<s>", "</s>")]
    return processors.TemplateProcessing(
        single="<s> $A </s>", pair="$A $B </s>", special_tokens=ids
    )


def like_t5() -> Tokenizer:
    scores = [(t, 0.0) for t in ("<pad>", "</s>", "<unk>", "<s>")]
    scores += [(c, -3.0) for c in "\u2581abcdefghijklmnopqrstuvwxyz"]
    made = Tokenizer(models.Unigram(scores, 2))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.add_special_tokens(["<pad>", "</s>", "<unk>", "<s>"])
    made.post_processor = template(made)
    return made


def like_bert() -> Tokenizer:
    words = ("[UNK]", "[CLS]", "[SEP]", "<pad>", "the", "fox", "##es", "<s>", "</s>")
    made = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    made.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return made


@pytest.mark.parametrize(
    "made", [byte_level(), like_t5(), like_bert()], ids=lambda t: type(t.model).__name__
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "olmo2"])
def test_an_exported_tokenizer_encodes_as_the_training_data(
    made: Tokenizer, family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    made.save(str(source / "tokenizer.json"))
    chosen = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "add_bos_token": True}
    (source / "tokenizer_config.json").write_text(
        json.dumps(chosen | {"chat_template": "{{ messages }}"})
    )
    (tmp_path / "in.jsonl").write_text(f"{json.dumps({'text': TEXT})}\n" * 9)
    prepare(
        PrepareConfig(
            inputs=(tmp_path / "in.jsonl",), tokenizer=source, held_out=0.3, out=tmp_path / "corpus"
        )
    )
    corpus = Corpus.open(tmp_path / "corpus")
    model = {"family": family, "vocab_size": corpus.vocab_size}
    caplog.clear()
    finished = train(
        tiny("full", corpus.path, tmp_path / "run", model=model, train={"steps": 1, "seq_len": 8})
    )
    out = export(finished.run, tmp_path / "out")
    (ids,) = encode(made, [TEXT], np.dtype("<u4"))
    differs = AutoTokenizer.from_pretrained(out)(TEXT).input_ids != ids.tolist()
    assert differs == ("AutoTokenizer replaces it" in caplog.text)
    assert differs == (family == "qwen2")  # transformers has its own for this type of model
    exported = PreTrainedTokenizerFast.from_pretrained(out)
    assert exported(TEXT).input_ids == ids.tolist()
    assert exported(TEXT, TEXT).input_ids == ids.tolist() * 2
    tokens = exported.bos_token, exported.eos_token, exported.pad_token
    assert tokens == ("<s>", "</s>", "<pad>") and exported.chat_template == "{{ messages }}"
    assert exported.decode(ids) == made.decode(ids.tolist(), skip_special_tokens=False)
    for folder in (finished.run / "tokenizer", out):
        raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
        assert raw.encode(TEXT).ids == ids.tolist()


# A disk that fills.


def full_at(name: str, patch: pytest.MonkeyPatch) -> None:
    def write(path: Path, content: str) -> None:
        if path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_atomically(path, content)

    patch.setattr(peptrain.models.hf, "write_atomically", write)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_disk_that_fills_leaves_no_run_and_no_export(
    name: str, run: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_at(name, monkeypatch)
    with pytest.raises(CheckpointError, match=r"can't be written: No space left"):
        train(tiny("full", corpus, tmp_path / "run"))
    assert not (tmp_path / "run" / "config.toml").exists()
    with pytest.raises(CheckpointError, match=rf"can't be written: .*No space left.*{name}"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists() and [*tmp_path.glob(".out*")] == []


def test_a_disk_that_fills_with_weights_leaves_no_export(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **settings: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full)
    with pytest.raises(CheckpointError, match=r"--out .*: can't be written: .*No space left"):
        export(run, tmp_path / "out", "factorised")
    assert [*tmp_path.iterdir()] == []
