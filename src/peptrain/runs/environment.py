"""Record the versions and the device that a run used."""

from __future__ import annotations

import platform
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


def record_environment(run: RunDir, here: World) -> None:
    """Append an entry to env.json for this start, since a run may be resumed elsewhere."""
    run.append("env.json", environment(here))
