"""What a notebook shows of a training, where `!peptrain` writes to a terminal of Jupyter's."""

import re
import shlex
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
from test_cli import flags
from traitlets.config import Config

STEPS = 8


def printed(code: str) -> str:
    """What a notebook with one cell of `code` shows below it."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    limits = {"timeout": 900, "startup_timeout": 900}  # seconds
    # Sockets in files: ports that are found free may be taken until the kernel listens there.
    config = Config(KernelManager={"transport": "ipc"})
    nbclient.NotebookClient(notebook, **limits, kernel_name="python3", config=config).execute()
    (cell,) = notebook.cells
    streams = [output for output in cell.outputs if output.output_type == "stream"]
    assert not [
        output for output in cell.outputs if output.output_type in ("error", "display_data")
    ]
    return "".join(output.text for output in streams).replace("\r\n", "\n")


@pytest.mark.slow
def test_a_notebook_gets_plain_lines_with_each_step_once(
    corpus: Path, tmp_path: Path, importable: None
) -> None:
    run, settings = tmp_path / "run", shlex.join(flags("bpt", corpus))
    shown = printed(f"!{sys.executable} -m peptrain train bpt --run {run} {settings}")
    steps = re.findall(r"^bpt  step (\d) of 8  loss .*$", shown, re.M)
    assert steps == [str(n) for n in range(1, STEPS + 1)]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown), repr(shown)
    assert shown.splitlines()[-1].startswith("bpt  finished: held-out perplexity ")
    assert max(map(len, shown.splitlines())) > 80


@pytest.mark.slow
def test_train_shows_the_same_in_a_notebook(corpus: Path, tmp_path: Path, importable: None) -> None:
    shown = printed(f"""
from pathlib import Path
from peptrain.testing import small_run
from peptrain import Full, train
_ = train(small_run(Full(), Path({str(corpus)!r}), Path({str(tmp_path / "run")!r})), show=True)
""")
    steps = re.findall(r"^full  step (\d) of 8  loss .*$", shown, re.M)
    assert steps == [str(n) for n in range(1, STEPS + 1)]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", shown), repr(shown)
