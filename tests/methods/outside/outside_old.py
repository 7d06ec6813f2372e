"""A package made for peptrain 0.1.0, whose hooks had other names. test_outside.py installs it."""

from dataclasses import dataclass

from peptrain.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class Old(Method):
    """It forgets moments at a boundary, by the hook's old name."""

    name = "old"
    equation = "W"

    def enter(self, model: object, optimizer: object, phase: int) -> None:
        """Called `on_phase_start` now."""
