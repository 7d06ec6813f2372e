"""Model architectures of the papers, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from peptrain.settings.fields import nearest

Family = Literal["llama", "qwen2", "olmo2"]


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder in the papers' letters: vocabulary V, hidden d, MLP f, layers L."""

    family: Family
    V: int
    d: int
    f: int
    L: int
    heads: int
    kv: int
    tied: bool = False

    @property
    def parameters(self) -> int:
        """Number of parameters of the dense model."""
        d, kv = self.d, self.kv * self.d // self.heads
        norms_and_biases = {"llama": 2 * d, "qwen2": 3 * d + 2 * kv, "olmo2": 3 * d + kv}
        layer = 2 * d * (d + kv) + 3 * d * self.f + norms_and_biases[self.family]
        return (1 if self.tied else 2) * self.V * d + self.L * layer + d


PRESETS: dict[str, Decoder] = {
    # Ours, for a laptop. The vocabulary is that of the embedded default corpus.
    "tiny": Decoder("llama", 4096, 128, 384, 4, 4, 4),
    # LLaMA as in GaLore, ReLoRA and LORO (T5's vocabulary without the sentinels).
    "llama-60m": Decoder("llama", 32000, 512, 1376, 8, 8, 8),
    "llama-130m": Decoder("llama", 32000, 768, 2048, 12, 12, 12),
    "llama-250m": Decoder("llama", 32000, 768, 2560, 24, 16, 16),
    "llama-350m": Decoder("llama", 32000, 1024, 2736, 24, 16, 16),
    "llama-1b": Decoder("llama", 32000, 2048, 5461, 24, 32, 32),
    "llama-7b": Decoder("llama", 32000, 4096, 11008, 32, 32, 32),
    # The study of ReLoRA in small models.
    "pico-tiny": Decoder("llama", 50304, 96, 384, 12, 12, 4),
    "pico-small": Decoder("llama", 50304, 384, 1536, 12, 12, 4),
    # BPT; its table prints another model's shapes for the 1.5B row.
    "qwen-100m": Decoder("qwen2", 151936, 512, 2048, 8, 8, 2, tied=True),
    "qwen-0.5b": Decoder("qwen2", 151936, 896, 4864, 24, 14, 2, tied=True),
    "qwen-1.5b": Decoder("qwen2", 151936, 1536, 8960, 28, 12, 2, tied=True),
    "olmo2-1b": Decoder("olmo2", 100352, 2048, 8192, 16, 16, 16),
}


DEFAULT_PRESET = "tiny"


def unknown_preset(name: str) -> str:
    """Return the error message for an unknown preset, with the nearest name or else all names."""
    hint = nearest(name, PRESETS) or f"known are {', '.join(PRESETS)}; "
    return f"model.preset: {name!r} is unknown; {hint}or set model.config to a config.json"
