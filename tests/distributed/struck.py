"""Run as a rank by test_restarts.py: `peptrain ARGUMENTS`, while signals strike at chosen moments.

python struck.py OUT "RANK:WHERE:STEP:SIGNAL ..." ARGUMENTS

The command trains OUT/run once for every strike, beginning with that of this restart, and then
OUT/whole without any. Exit codes are appended to OUT/codes-RANK. The rank ends after a failure, as
it does when its launcher sees the other's first.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peptrain.methods.bpt as bpt
import peptrain.training.loop as trainer
import peptrain.training.state as trainer_state
from peptrain.cli.app import main
from peptrain.distributed.launch import restarts

RANK = os.environ["RANK"]
due: list[str] = []
"""WHERE, STEP and SIGNAL of the strike that this rank gets in the command under way."""


def struck(owner: Any, name: str, where: str, step_of: Callable[..., int]) -> None:
    """Let a function of `owner` do its work, and then send this process the signal that is due."""
    real = getattr(owner, name)

    def function(*given: Any, **named: Any) -> Any:
        done = real(*given, **named)
        if due and due[:2] == [where, str(step_of(*given))]:
            os.kill(os.getpid(), signal.Signals[due.pop()])
            due.clear()
        return done

    setattr(owner, name, function)


def run(out: Path, strikes: list[str], arguments: list[str]) -> None:
    struck(trainer, "advance", "step", lambda state, *rest: int(state.step))
    struck(bpt.BPTLinear, "merge", "merge", lambda layer, step, rng: int(step))
    struck(trainer_state, "check_rebuilt", "save", lambda state: int(state.step))
    trainer.flops_per_token = lambda *given, **named: 1.0
    commands = [(strike, out / "run") for strike in strikes] + [("none", out / "whole")]
    for strike, directory in commands[restarts() :]:
        rank, _, rest = strike.partition(":")
        due[:] = rest.split(":") if rank == RANK else []
        code = main([*arguments, f"--run={directory}"])
        with (out / f"codes-{RANK}").open("a") as file:
            file.write(f"{code}\n")
        if code == 1:
            sys.exit(code)


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2].split(), sys.argv[3:])
