"""What a toy checkpoint is made of: the class and values of its reference, and how it is
published.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import toy_exports
from toy_references import Reference, full

BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Class defaults lie beyond the toy vocabulary.
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
DYNAMIC = {"rope_type": "dynamic", "factor": 8.0}
# Prompts of 40 and of 23 tokens stand on both sides of it, and 23 + 8 generated ones cross it.
SHORT = 26


def longrope(half: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "short_factor": [1.0 + 0.1 * i for i in range(half)],
        "long_factor": [1.5 + 0.7 * i for i in range(half)],
        "original_max_position_embeddings": SHORT,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """`rope`: scaling keys besides rope_theta (None: the class writes its own). `old`: what the
    older spelling of config.json has beyond the generic rewriting. `export`: to the names and keys
    of a family that transformers has no class for. `reference`: how its logits are asked for.
    `change`: edits to the random model; `more_parameters`: than the class counts. `mla`: the form
    of latent attention it is compiled in.
    """

    label: str
    config_class: str
    values: dict[str, Any] = field(default_factory=dict)
    theta: float = 10000.0
    rope: dict[str, Any] | None = field(default_factory=lambda: {"rope_type": "default"})
    base: dict[str, Any] = field(default_factory=lambda: BASE)
    change: Callable[[Any], None] | None = None
    more_parameters: int = 0
    old: dict[str, Any] = field(default_factory=dict)
    export: Callable[[dict[str, Any], toy_exports.Tensors], toy_exports.Exported] | None = None
    reference: Callable[[Any], Reference] = full
    mla: str = "auto"

    def forms(self) -> list[Recipe]:
        """In every form of latent attention, where it has that."""
        if "kv_lora_rank" not in self.values:
            return [self]
        return [self, replace(self, label=f"{self.label}-plain", mla="plain")]

    @property
    def options(self) -> list[str]:
        """What a compile of it is called with."""
        return [f"model.mla={self.mla}"]
