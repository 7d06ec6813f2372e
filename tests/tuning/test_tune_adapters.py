"""Fine-tuned adapters for PEFT, with the parts that were trained beside them."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support import tiny_method
from tuned import tuning

from peptrain.errors import Unsupported
from peptrain.exporting.export import export
from peptrain.models.auto import load_model
from peptrain.runs.build import open_run
from peptrain.training.loop import train

IDS = torch.arange(40).view(4, 10) % 30 + 3


@pytest.mark.parametrize(
    ("start", "task", "trained", "saved"),
    [
        ("encoder", "rte", "classifier", ["classifier", "score"]),
        ("encoder", "stsb", "classifier,norm", None),
        ("t5", "cola", "norm", None),
    ],
)
def test_peft_computes_what_was_fine_tuned(
    start: str, task: str, trained: str, saved: list[str] | None, data: Path, tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    base = request.getfixturevalue(start)
    method = tiny_method("lora", warm_start_steps=0, train=trained)
    train(tuning(method, base, data, tmp_path / "run", {"task": task}))
    out = export(tmp_path / "run", tmp_path / "out", "peft")
    model = open_run(tmp_path / "run").model
    plain, _ = load_model(base, model.dtype, model.config)
    found = peft.PeftModel.from_pretrained(plain, out)
    given: dict[str, Any] = {"decoder_input_ids": IDS} if start == "t5" else {}
    with torch.no_grad():
        wanted = model(IDS, **given).logits
        torch.testing.assert_close(found(input_ids=IDS, **given).logits, wanted)
    written = json.loads((out / "adapter_config.json").read_text())
    assert saved is None or written["modules_to_save"] == saved
    assert written["task_type"] == ("SEQ_2_SEQ_LM" if start == "t5" else "SEQ_CLS")
    assert "pipeline_tag: text-" in (out / "README.md").read_text()


def test_a_classifier_has_no_form_for_language_models(
    encoder: Path, data: Path, tmp_path: Path
) -> None:
    method = tiny_method("lora", warm_start_steps=0, train="classifier")
    train(tuning(method, encoder, data, tmp_path / "run", {"task": "rte"}))
    for form in ("gguf", "factorised"):
        said = f"--form {form}: is for language models.*use --form dense or peft"
        with pytest.raises(Unsupported, match=said):
            export(tmp_path / "run", tmp_path / "out", form)
