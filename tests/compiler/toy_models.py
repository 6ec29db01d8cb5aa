"""Toy checkpoints made by transformers, the independent reference of the import tests. One list of
recipes per family.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """`rope`: scaling keys besides rope_theta."""

    label: str
    config_class: str
    values: dict[str, Any] = field(default_factory=dict)
    theta: float = 10000.0
    rope: dict[str, Any] = field(default_factory=lambda: {"rope_type": "default"})


RECIPES: dict[str, list[Recipe]] = {
    "llama": [
        Recipe(label="plain", config_class="LlamaConfig"),
        Recipe(label="tied", config_class="LlamaConfig", values={"tie_word_embeddings": True}),
        Recipe(
            label="biases",
            config_class="LlamaConfig",
            values={"attention_bias": True, "mlp_bias": True, "head_dim": 48},
        ),
        Recipe(label="llama3", config_class="LlamaConfig", theta=5e5, rope=LLAMA3),
        Recipe(
            label="linear", config_class="LlamaConfig", rope={"rope_type": "linear", "factor": 4.0}
        ),
    ],
    "mistral": [
        Recipe(
            label="window",
            config_class="MistralConfig",
            values={"sliding_window": 4, "head_dim": 48},
        ),
        Recipe(
            label="full", config_class="MistralConfig", theta=1e6, values={"sliding_window": None}
        ),
    ],
    "qwen2": [
        Recipe(label="tied", config_class="Qwen2Config", values={"tie_word_embeddings": True}),
        Recipe(
            label="sliding",
            config_class="Qwen2Config",
            values={"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
        ),
        Recipe(label="yarn", config_class="Qwen2Config", theta=1e6, rope=YARN),
    ],
    "qwen3": [
        Recipe(label="plain", config_class="Qwen3Config", values={"head_dim": 48}),
        Recipe(
            label="yarn-biases",
            config_class="Qwen3Config",
            values={"head_dim": 48, "attention_bias": True},
            rope={**YARN, "attention_factor": 1.3, "beta_fast": 16.0},
        ),
    ],
}


def build(recipe: Recipe) -> Any:
    """The transformers model, every weight random (norms and biases too: 1 and 0 would hide
    errors).
    """
    import transformers

    rope = {"rope_theta": recipe.theta, **recipe.rope}
    config = getattr(transformers, recipe.config_class)(
        **BASE, **recipe.values, rope_parameters=rope
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * 0.2 + ("norm" in name))
    return model.float().eval()


def save(recipe: Recipe, directory: Path, *, old_config: bool = False, shards: bool = False) -> Any:
    """Save as transformers does; `old_config` rewrites config.json in the spelling of version 4."""
    model = build(recipe)
    model.save_pretrained(directory, max_shard_size="60KB" if shards else "5GB")
    if old_config:
        path = directory / "config.json"
        config = json.loads(path.read_text())
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        kind = rope.pop("rope_type")
        config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
        config["torch_dtype"] = config.pop("dtype")
        config.pop("layer_types", None)
        path.write_text(json.dumps(config))
    return model
