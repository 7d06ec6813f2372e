"""What happens to ReLoRA's state between steps: the switch, a merge, a partial optimizer reset."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import algebra
from .algebra import Moments

Reset = Callable[[str, int, Tensor, Tensor, int], Moments]  # of (name, completed steps, m, v, k)


def switch(
    state: dict[str, Tensor], adapted: Sequence[str], first_A: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """The factors that join a dense state: A r x m as given, B = 0 n x r. W stays what it is."""
    begun: dict[str, Tensor] = {}
    for site in adapted:
        A = first_A(site).double()
        n, m = state[f"{site}.weight"].shape
        if A.shape[1] != m:
            raise ValueError(f"{site}: A is r x {m}, not {tuple(A.shape)}")
        begun |= {f"{site}.B": torch.zeros(n, A.shape[0]).double(), f"{site}.A": A}
    return begun


def merge(state: dict[str, Tensor], site: str, scale: float | None, new_A: Tensor) -> None:
    """W += s B A, A drawn anew, B = 0, and a trained s back where it began."""
    W, B, A, s = (state.get(f"{site}.{x}") for x in ("weight", "B", "A", "s"))
    if s is not None:
        state[f"{site}.s"] = torch.full_like(s, scale)
    state[f"{site}.weight"], state[f"{site}.B"] = algebra.relora_merge(
        W, B, A, scale if s is None else s
    )
    state[f"{site}.A"] = new_A.double()


def reset(moments: dict[str, Moments], site: str, done: int, how: str | Reset, of: str) -> None:
    """Reset the moments of both factors and of a trained s (of = "both") or of A alone ("A").

    how: "zero" the moments and steps, "keep" them, or a function."""
    letters = {"both": "BAs", "A": "A"}[of]
    for name in [f"{site}.{x}" for x in letters if f"{site}.{x}" in moments]:
        m, v, k = moments[name]
        if callable(how):
            moments[name] = how(name, done, m, v, k)
        else:
            moments[name] = {"zero": algebra.reset_zero(m, v), "keep": (m, v, k)}[how]
