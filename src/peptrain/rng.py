"""Addressed random numbers: every draw is a function of (seed, site, step, purpose)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rng:
    """`rng(site, step)` returns a fresh CPU generator, the same on every rank and after a resume.

    Drawing on the CPU makes the values independent of the device. (Only the bits of stochastic
    rounding, 16 per weight, are drawn on the weight's device.) Code that draws must therefore pass
    device="cpu", because torch's default device may be a GPU. An address instead of one shared
    stream makes the values independent of how many were drawn before.
    """

    seed: int

    def __call__(self, site: str, step: int = 0, purpose: str = "") -> torch.Generator:
        return torch.Generator().manual_seed(self.integer(site, step, purpose))

    def integer(self, site: str, step: int = 0, purpose: str = "") -> int:
        """Return a 63-bit integer for this address."""
        address = f"{self.seed}|{site}|{step}|{purpose}".encode()
        return int.from_bytes(hashlib.blake2b(address, digest_size=8).digest(), "little") >> 1


def seed_default(seed: int, device: torch.device | None = None) -> None:
    """Seed what a module draws from by itself, such as dropout, on `device` or the default one.

    On a CPU without torch.manual_seed, which keeps a stack trace for each kind of accelerator that
    has not been used yet, at every call.
    """
    if (device or torch.get_default_device()).type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)
