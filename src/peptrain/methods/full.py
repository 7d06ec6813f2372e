"""Full training: AdamW on every parameter, the baseline of all the papers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from peptrain.methods.base import Method


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Train every parameter with AdamW."""

    name: ClassVar[str] = "full"
    purpose: ClassVar[str] = "reference: all weights trained by AdamW"
    equation: ClassVar[str] = "W, all trainable"
