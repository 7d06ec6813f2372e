"""`peptrain generate` and `peptrain.generate`: text from runs and Hugging Face directories."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import peptrain
import peptrain.tasks.subject
from peptrain.cli.app import main
from peptrain.errors import CheckpointError, ConfigError, DataError, Unsupported
from peptrain.exporting.export import export
from peptrain.exporting.factorised import RECIPE
from peptrain.generation.generate import generate
from peptrain.generation.sample import Sampling, continuation
from peptrain.methods import METHODS
from peptrain.runs.build import open_run
from peptrain.tasks.subject import open_subject
from peptrain.testing import startable
from peptrain.training.loop import train

LEARNT = {"seq_len": 64, "steps": 8, "precision": "fp32"}
PROMPT = "etao in"


@pytest.fixture(scope="module")
def made(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of full training and one of factors, and an export of each."""
    folder = tmp_path_factory.mktemp("made")
    for name in ("full", "lowrank"):
        keep_at = {"keep_at": "4"}
        train(tiny(name, corpus, folder / name, train=LEARNT | keep_at, optim={"lr": 0.02}))
    export(folder / "full", folder / "dense")
    export(folder / "lowrank", folder / "small", "factorised")
    return folder


def test_the_likeliest_text_of_a_run_is_what_transformers_writes_with_its_export(
    made: Path,
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(made / "dense")
    model = AutoModelForCausalLM.from_pretrained(made / "dense", dtype=torch.float32)
    asked = tokenizer(PROMPT, return_tensors="pt")
    written = model.generate(**asked, max_new_tokens=20, do_sample=False, pad_token_id=0)[0]
    expected = tokenizer.decode(written[asked["input_ids"].shape[1] :], skip_special_tokens=True)
    assert len(expected) > 5
    for path in ("full", "full@8", "dense"):
        assert generate(made / path, PROMPT, tokens=20, temperature=0) == [expected], path
    assert generate(made / "full@4", PROMPT, tokens=20, temperature=0) != [expected]


def test_a_run_in_training_may_delete_the_checkpoint_once_it_was_read(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(made / "full", run := tmp_path / "run")
    expected = open_subject(run)

    def training(path: Path) -> Any:
        opened = open_run(path)
        shutil.rmtree(run / "checkpoints" / "step-00000008", ignore_errors=True)
        return opened

    monkeypatch.setattr(peptrain.tasks.subject, "open_run", training)
    found = open_subject(run)
    assert found.step == 8 and found.weights == expected.weights != open_subject(run).weights


def test_factors_write_what_their_dense_equivalent_writes(made: Path) -> None:
    given: dict[str, Any] = {"tokens": 20, "samples": 2, "seed": 3}
    assert generate(made / "small", PROMPT, **given) == generate(made / "lowrank", PROMPT, **given)


def test_a_sample_depends_on_the_seed_and_its_number_and_on_nothing_before(made: Path) -> None:
    torch.manual_seed(1)
    three = generate(made / "full", PROMPT, samples=3)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == after, "PyTorch's generator was used"
    assert len(set(three)) == 3
    assert generate(made / "full", PROMPT, samples=2) == three[:2]
    assert generate(made / "full", PROMPT, seed=1) != three[:1]


def test_drawing_is_from_the_tempered_distribution_cut_to_its_likeliest_part(made: Path) -> None:
    """Next tokens are counted over many seeds. All 300 take part, not the 50 likeliest alone."""
    subject = open_subject(made / "full")
    with torch.no_grad():
        logits = subject.model(input_ids=torch.tensor([[5, 6]])).logits[0, -1].double()

    def draw(how: Sampling, count: int) -> list[str]:
        given: Any = {"positions": 64, "precision": "fp32", "cache": False}
        model, encoder = subject.model, subject.encoder
        return [continuation(model, encoder, [5, 6], how, seed=n, **given) for n in range(count)]

    def likely(tokens: torch.Tensor) -> set[str]:
        before = subject.encoder.decode([5, 6])
        whole = (subject.encoder.decode([5, 6, int(t)]) for t in tokens)
        return {text.removeprefix(before) for text in whole}

    sampled = draw(Sampling(1, 1.5), 150)
    assert len(set(sampled)) > 50
    p = logits.softmax(-1).sort(descending=True)
    most = int((p.values.cumsum(0) < 0.2).sum()) + 1
    assert set(draw(Sampling(1, 1.0, 0.2), 40)) <= likely(p.indices[:most])
    assert set(draw(Sampling(1, 1e-4), 10)) == likely(p.indices[:1])


def test_a_text_ends_with_its_document_and_where_the_model_has_read_all_it_can(
    made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    subject = open_subject(made / "full")
    model, encoder = subject.model, subject.encoder
    given: Any = {"positions": 64, "precision": "fp32", "seed": 0}
    asked = {"max_new_tokens": 12, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    ids = model.generate(torch.tensor([[5]]), **asked)[0, 1:].tolist()
    end = next(n for n in range(3, 12) if ids[n] not in ids[:n])
    ending = replace(encoder, ends=(0, ids[end]))
    text = continuation(model, ending, [5], Sampling(12, 1.0), **given)
    assert encoder.decode([5]) + text == encoder.decode([5, *ids[:end]])
    [text] = generate(made / "full", PROMPT, tokens=1000)
    assert text and "--tokens 1000: at most" in caplog.text
    with pytest.raises(DataError, match=r"prompt: has 1,[0-9]+ tokens, but the model reads 64"):
        generate(made / "full", PROMPT * 200)


def test_an_empty_prompt_begins_a_document(made: Path) -> None:
    subject = open_subject(made / "full")
    given: Any = {"positions": 64, "precision": "fp32", "seed": 1}
    end, how = subject.encoder.ends[0], Sampling(10, 0)
    expected = continuation(subject.model, subject.encoder, [end], how, **given)
    assert generate(made / "full", "", tokens=10, temperature=0) == [expected]


def test_what_a_directory_sets_for_generation_does_not_change_the_distribution(
    made: Path, tmp_path: Path
) -> None:
    plain = generate(made / "dense", PROMPT)
    shutil.copytree(made / "dense", tmp_path / "set")
    file = tmp_path / "set" / "generation_config.json"
    own = {"top_k": 1, "repetition_penalty": 5.0, "temperature": 0.01, "do_sample": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | own))
    assert generate(tmp_path / "set", PROMPT) == plain


def test_a_model_whose_numbers_are_gone_writes_nonsense_and_no_error(made: Path) -> None:
    subject = open_subject(made / "full")
    with torch.no_grad():
        next(subject.model.parameters()).fill_(torch.nan)
    given: Any = {"positions": 64, "precision": "fp32", "seed": 1}
    continuation(subject.model, subject.encoder, [5], Sampling(5), **given)


@pytest.mark.parametrize("temperature", [0.8, 1e-6])
def test_logits_near_the_largest_number_are_drawn_from(made: Path, temperature: float) -> None:
    """Divided by a temperature below 1 they would be infinite."""
    subject = open_subject(made / "full")
    with torch.no_grad():
        subject.model.lm_head.weight.fill_(-1e37)
        subject.model.lm_head.weight[8] = 1e38
        subject.model.lm_head.weight[9] = -1e38
    given: Any = {"positions": 64, "precision": "fp32", "seed": 1}
    text = continuation(subject.model, subject.encoder, [5], Sampling(5, temperature), **given)
    assert set(text) <= set(subject.encoder.decode([8, 9]))


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"tokens": 0}, ConfigError, r"--tokens: must be >= 1 \(got 0\)"),
        ({"temperature": -1.0}, ConfigError, "--temperature: must be a finite number >= 0"),
        ({"temperature": float("nan")}, ConfigError, "--temperature: must be a finite"),
        ({"temperature": 1e-45}, ConfigError, "--temperature: must be 0, or at least 1e-06"),
        ({"top_p": 0.0}, ConfigError, "--top-p: must be above 0 and at most 1"),
        ({"samples": 0}, ConfigError, "--samples: must be >= 1"),
        ({"samples": 2, "temperature": 0}, ConfigError, "--samples: must be 1 with --temperature"),
        ({"seed": -1}, ConfigError, "--seed: must be >= 0"),
        ({"prompt": "a\udcff"}, DataError, r"prompt: must be UTF-8 \(got 'a\\udcff'\)"),
        ({"path": "nowhere"}, CheckpointError, "neither a run directory"),
        ({"path": "full@3"}, CheckpointError, "full@3: no checkpoint of that step is kept"),
    ],
)
def test_what_can_not_be_used_is_named(
    given: dict[str, Any], error: type[Exception], said: str, made: Path
) -> None:
    path, prompt = made / given.pop("path", "full"), given.pop("prompt", "x")
    with pytest.raises(error, match=said):
        generate(path, prompt, **given)


def test_a_token_that_the_model_lacks_is_named(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "dense", tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    content = json.loads(file.read_text())
    first = content["added_tokens"][0]
    more = [{**first, "id": 300 + n, "content": f"<new{n}>"} for n in range(30)]
    content["added_tokens"] += more
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"prompt: has token id 325, .*vocabulary size is 320"):
        generate(tmp_path / "other", "<new25>")


@pytest.mark.parametrize("form", ["dense", "small"])
def test_a_tokenizer_that_can_not_be_read_is_named(form: str, made: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(made / form, tmp_path / "copy")
    (copy / RECIPE).unlink(missing_ok=True)
    (copy / "tokenizer_config.json").write_text("[]")
    said = rf"^{re.escape(str(copy))}: no tokenizer .*tokenizer_config.json: a JSON list, not an"
    with pytest.raises(CheckpointError, match=said):
        generate(copy, PROMPT)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_factorised_exports_tokenizer_is_the_one_that_was_exported(
    name: str, made: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(made / "small", tmp_path / "copy")
    (copy / "chat_template.jinja").write_text("{{ messages }}")  # may be added
    assert generate(copy, PROMPT) == generate(made / "small", PROMPT)
    content = json.loads((copy / name).read_text())
    (copy / name).write_text(json.dumps(content))  # the same values in other bytes
    with pytest.raises(CheckpointError, match=f"copy: {name}: differs from what was exported"):
        generate(copy, PROMPT)
    (copy / RECIPE).unlink()  # as after save_pretrained
    assert generate(copy, PROMPT) == generate(made / "small", PROMPT)


def test_a_model_that_is_no_language_model_is_refused(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = open_subject(made / "full")
    monkeypatch.setattr(type(subject.model), "can_generate", lambda _: False)
    with pytest.raises(Unsupported, match="LlamaForCausalLM: transformers can't generate"):
        generate(made / "full", "x")


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_every_method_writes_text(name: str, corpus: Path, tmp_path: Path) -> None:
    train(startable(tiny(name, corpus, tmp_path / "run", train={"seq_len": 32})))
    assert len(generate(tmp_path / "run", PROMPT, samples=2)) == 2


def piped(text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))


def test_the_command_prints_the_text_alone_and_says_the_rest_on_standard_error(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generate(made / "full", PROMPT, samples=2, tokens=20)
    line = [str(made / "full"), PROMPT, "--tokens", "20", "--device", "cpu"]
    assert main(["generate", *line, "--samples", "2"]) == 0
    out, err = capsys.readouterr()
    assert out == "".join(f"{text}\n" for text in expected)
    assert f'full@8 continues "{PROMPT}": up to 20 tokens, temperature 0.8, seed 0' in err
    assert "sample 2 of 2" in err
    piped(f"{PROMPT}\n".encode(), monkeypatch)
    line[1] = "-"
    assert main(["generate", *line]) == 0
    assert capsys.readouterr().out == f"{expected[0]}\n"
    assert main(["generate", str(made / "full"), PROMPT, "--tokens", "500"]) == 0
    out, err = capsys.readouterr()
    assert "WARNING --tokens 500" in err and "WARNING" not in out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a\xff", "error: prompt: standard input is not UTF-8 (byte 1)"),
        (b"a" * ((1 << 22) + 1), "error: prompt: standard input has more than 4,194,304 bytes"),
        (None, "error: prompt: standard input is closed"),
    ],
)
def test_a_standard_input_that_is_no_prompt_is_named(
    content: bytes | None,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if content is None:
        monkeypatch.setattr(sys, "stdin", None)
    else:
        piped(content, monkeypatch)
    assert main(["generate", "run", "-"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and said in err


def test_a_terminal_gets_control_characters_escaped_and_a_pipe_gets_them_as_they_are(
    made: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def written(*_: Any) -> Any:
        yield "a\x1b[31mb\nc"

    monkeypatch.setattr("peptrain.generation.generate.continuations", written)
    line = ["generate", str(made / "full"), "x"]
    assert main(line) == 0
    assert capsys.readouterr().out == "a\x1b[31mb\nc\n"
    monkeypatch.setattr("peptrain.display.console.Display.isatty", lambda self: True)
    assert main(line) == 0
    assert capsys.readouterr().out == "a\\x1b[31mb\nc\n"


def process(*given: object, **settings: Any) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "peptrain", "generate", *map(str, given), "--device", "cpu"]
    path = os.pathsep.join(sys.path)
    return subprocess.Popen(
        line, env=os.environ | {"PYTHONPATH": path}, stderr=subprocess.PIPE, **settings
    )


@pytest.mark.slow
def test_a_closed_pipe_ends_it_and_so_does_ctrl_c(made: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with process(made / "full", PROMPT, "--samples", 100_000, stdout=write) as closed:
        os.close(write)
        assert b"Broken pipe" in closed.communicate(timeout=60)[1]
    assert closed.returncode == 1
    with process(made / "full", PROMPT, "--samples", 100_000, stdout=subprocess.PIPE) as stopped:
        assert stopped.stdout is not None and stopped.stdout.read(1)  # the first text is there
        stopped.send_signal(signal.SIGINT)
        err = stopped.communicate(timeout=60)[1]
    assert stopped.returncode == 130
    assert b"stopped" in err and b"Traceback" not in err


def test_it_is_on_the_face() -> None:
    assert peptrain.generate is generate
