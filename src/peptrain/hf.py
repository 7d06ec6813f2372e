"""Register the factorised models with transformers, by `import peptrain.hf`.

Then `AutoModelForCausalLM.from_pretrained(DIRECTORY)` loads an export of `--form factorised`
without `trust_remote_code`: the code is this package's. Llama, Qwen2 and OLMo2 are registered on
import, any other family by its model_type, such as `register("mamba")`.
"""

from __future__ import annotations

from typing import get_args

from peptrain.models.factorised import register as register
from peptrain.models.presets import Family

for family in get_args(Family):
    register(family)
