"""Variables that launchers leave behind: one process is one process, or one line names them."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from peptrain.distributed.launch import Launch, cores, launch, speaks, threads
from peptrain.distributed.world import ARRIVED, LAUNCHERS, ON_GPU, World, _arrive, world
from peptrain.errors import ConfigError, Unsupported

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
COMPLETE = {"WORLD_SIZE": "4", "RANK": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost",
            "MASTER_PORT": "29501"}  # fmt: skip


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Any:
    def give(**values: str) -> None:
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return give


@pytest.mark.parametrize(
    "left",
    [{}, dict.fromkeys(NAMES, ""), {"RANK": "3"}, {"LOCAL_RANK": "7"}, {"RANK": "x"},
     COMPLETE | {"WORLD_SIZE": "1"}, COMPLETE | {"WORLD_SIZE": ""}, {"WORLD_SIZE": " 1 "},
     {"MASTER_ADDR": "nowhere", "MASTER_PORT": "0"}],
)  # fmt: skip
def test_one_process_is_one_process(left: dict[str, str], given: Any) -> None:
    given(**left)
    assert launch() == Launch(0, 1, 0) and speaks()
    with world("cpu") as here:
        assert here == World(0, 1, torch.device("cpu"))


def test_several_processes_have_their_places(given: Any) -> None:
    given(**COMPLETE)
    assert launch() == Launch(2, 4, 1) and not speaks()
    given(**COMPLETE, LOCAL_WORLD_SIZE="2")
    assert launch() == Launch(2, 4, 1, 2)


@pytest.mark.parametrize(
    "set_to, machine, share",
    [("1", 4, 8), ("1", 64, 1), ("1", 1, None), ("2", 4, None), ("", 4, None)],
)
def test_processes_of_a_machine_share_its_cores_where_torchrun_gave_each_one(
    set_to: str, machine: int, share: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peptrain.distributed.launch.cores", lambda: 33)
    monkeypatch.setenv("OMP_NUM_THREADS", set_to)
    assert threads(machine) == share


def test_a_process_of_several_uses_its_share(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peptrain.distributed.launch.cores", lambda: 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    try:
        with socket.create_server(("localhost", 0)) as server:
            port = str(server.getsockname()[1])
            given(**COMPLETE | {"RANK": "0", "MASTER_PORT": port}, LOCAL_WORLD_SIZE="2")
            with pytest.raises(Unsupported, match="did not meet"), world("cpu"):
                pass
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_there_are_as_many_cores_as_the_process_may_use() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(
    "changed, named",
    [({"RANK": ""}, "RANK: not set"), ({"MASTER_ADDR": ""}, "MASTER_ADDR: not set"),
     ({"MASTER_PORT": ""}, "MASTER_PORT: not set"), ({"RANK": "4"}, "RANK: must be .*got '4'"),
     ({"WORLD_SIZE": "two"}, "WORLD_SIZE: must be .*'two'"), ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
     ({"WORLD_SIZE": "-1"}, "WORLD_SIZE"), ({"RANK": "-1"}, "RANK"), ({"RANK": "1.0"}, "RANK"),
     ({"LOCAL_RANK": "9"}, "LOCAL_RANK"), ({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE"),
      ({"MASTER_PORT": "99999"}, "MASTER_PORT")],
)  # fmt: skip
def test_what_is_missing_or_impossible_is_named(
    changed: dict[str, str], named: str, given: Any
) -> None:
    given(**COMPLETE | changed)
    with pytest.raises(Unsupported, match=f"^{named}.*torchrun.*unset WORLD_SIZE"), world("cpu"):
        pass


@pytest.mark.parametrize(
    "name, launcher",
    [
        ("SLURM_STEP_NUM_TASKS", "srun --ntasks-per-node 1"),
        ("OMPI_COMM_WORLD_SIZE", "mpirun --map-by ppr:1:node"),
    ],
)
def test_processes_that_do_not_know_of_each_other_are_refused_with_the_command_to_use(
    name: str, launcher: str, given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given()
    monkeypatch.setenv(name, "4")
    line = f"^{name}: {launcher.split()[0]} started 4 processes, .*`{launcher} torchrun --nnodes"
    with pytest.raises(ConfigError, match=line), world("cpu"):
        pass
    assert speaks()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launch() == Launch()
    given(**COMPLETE)
    assert launch().size == 4
    given()
    monkeypatch.setenv(name, "1")
    assert launch() == Launch()


def test_processes_that_do_not_meet_are_an_error(
    given: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def alone(url: str, timeout: timedelta) -> Iterator[Any]:
        raise dist.DistStoreError("timed out\nand so on")

    given(**COMPLETE)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(dist, "rendezvous", alone)
    told = r"WORLD_SIZE: 4 processes did not meet at localhost:29501 \(timed out\); start"
    with pytest.raises(Unsupported, match=told), world("cpu"):
        pass
    told = "waiting up to 60 s for the other 3 of 4 processes at localhost:29501; start"
    assert told in caplog.text


def test_a_port_in_use_is_named(given: Any) -> None:
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
        given(**COMPLETE | {"RANK": "0", "MASTER_PORT": str(port)})
        told = rf"WORLD_SIZE: 4 processes did not meet at localhost:{port} \(.*in use"
        with pytest.raises(Unsupported, match=told), world("cpu"):
            pass


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("launched", [False, True])
def test_processes_that_never_come_are_waited_for_a_limited_time(
    rank: str, launched: bool, given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher has left a complete set of variables behind."""
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    given(**COMPLETE | {"WORLD_SIZE": "2", "RANK": rank, "MASTER_PORT": str(port)})
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys.modules[world.__module__], "UNKNOWN", 0.5)
    monkeypatch.setattr(sys.modules[world.__module__], "LAUNCHED", 0.6)
    if launched:
        monkeypatch.setenv("SLURM_STEP_ID", "0")
    waited = rf"waited 0\.{6 if launched else 5} s as RANK {rank} for the other 1 of 2 processes"
    with (
        pytest.raises(Unsupported, match=f"WORLD_SIZE: {waited} at .*torchrun.*unset WORLD_SIZE"),
        world("cpu"),
    ):
        pass


def test_a_torchrun_whose_other_process_never_comes_is_waited_for_a_limited_time(
    given: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its store is a process of its own and answers at once."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    given(**COMPLETE | {"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": str(store.port)})
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(sys.modules[world.__module__], "LAUNCHED", 0.5)
    with (
        pytest.raises(Unsupported, match=r"waited 0\.5 s as RANK 0 for the other 1 of 2"),
        world("cpu"),
    ):
        pass


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_processes_with_and_without_a_gpu_are_refused_on_each(gpus: int) -> None:
    store, until = dist.HashStore(), time.monotonic() + 5
    store.add(ARRIVED, 1)
    store.add(ON_GPU, gpus // 2)
    refused = pytest.raises(Unsupported, match="only 1 of 2 processes have a GPU")
    with refused if gpus == 1 else contextlib.nullcontext():
        _arrive(store, 2, gpus > 0, until)


def test_a_pytorch_without_nccl_is_named(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given(**COMPLETE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(Unsupported, match="several GPUs need NCCL"), world():
        pass


def test_a_command_with_a_rank_left_behind_prints(given: Any, importable: None) -> None:
    given(RANK="1", LOCAL_RANK="1")
    line = [sys.executable, "-m", "peptrain", "--version"]
    assert subprocess.run(line, capture_output=True).stdout
