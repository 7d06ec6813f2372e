"""Record the versions and the device that a run used."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib.metadata import version

import torch

from peptrain import __version__
from peptrain.distributed.world import World
from peptrain.runs.directory import RunDir


def environment(here: World) -> dict[str, object]:
    """Return versions, the device's name and the number of processes."""
    on_gpu = here.device.type == "cuda"
    return {
        "peptrain": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "threads": torch.get_num_threads(),
        "ranks": here.size,
    }


def record_environment(run: RunDir, here: World, data: str) -> None:
    """Append an entry to env.json for this start, since a run may be resumed elsewhere.

    It adds the command line, the host, the git commit of the working directory (null outside a
    repository) and `data`, the fingerprint of the corpus.
    """
    start = {"command": shlex.join(sys.argv), "host": platform.node(), "commit": _commit()}
    run.append("env.json", environment(here) | start | {"data": data})


def _commit() -> str | None:
    command = ["git", "rev-parse", "--verify", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
