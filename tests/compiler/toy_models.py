"""Toy checkpoints in every family's published naming, beside an independent reference: the class of
transformers, or for families without one a class that computes the same under other names. One
list of recipes per family.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import toy_exports
from safetensors.torch import save_file
from toy_moe import MOE_RECIPES, XVERSE_MOE
from toy_recipe import DYNAMIC, LLAMA3, SHORT, YARN, Recipe, longrope
from toy_references import Reference, alibi, by_prompt, growing


def partial(share: float, **rope: Any) -> dict[str, Any]:
    return {"rope_type": "default", **rope, "partial_rotary_factor": share}


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
        Recipe(
            label="dynamic",
            config_class="LlamaConfig",
            values={"max_position_embeddings": SHORT},
            rope=DYNAMIC,
            reference=growing,
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
    "gemma": [
        Recipe(
            label="mqa",
            config_class="GemmaConfig",
            values={"num_key_value_heads": 1, "head_dim": 32},
        )
    ],
    "gemma2": [
        Recipe(
            label="caps",
            config_class="Gemma2Config",
            values={
                "head_dim": 32,
                "query_pre_attn_scalar": 20,
                "sliding_window": 4,
                "attn_logit_softcapping": 3.0,
                "final_logit_softcapping": 4.0,
            },
        )
    ],
    "gemma3": [
        Recipe(
            label="two ropes",
            config_class="Gemma3TextConfig",
            values={
                "num_hidden_layers": 4,
                "head_dim": 32,
                "query_pre_attn_scalar": 20,
                "sliding_window": 4,
                "sliding_window_pattern": 2,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            },
            rope=None,
            old={"sliding_window_pattern": 2},
        )
    ],
    "gemma3_multimodal": [
        Recipe(
            label="text",
            config_class="Gemma3TextConfig",
            values={
                "num_attention_heads": 8,
                "num_key_value_heads": 4,
                "head_dim": 256,
                "num_hidden_layers": 6,
                "sliding_window": 4,
            },
            rope=None,
            export=toy_exports.gemma3_multimodal,
        )
    ],
    "qwen": [
        Recipe(
            label="ntk and logn",
            config_class="Qwen2Config",
            values={"num_key_value_heads": 4},
            export=toy_exports.qwen,
            reference=by_prompt,
        )
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
    "stablelm": [
        Recipe(
            label="biases",
            config_class="StableLmConfig",
            values={"num_key_value_heads": 4, "use_qkv_bias": True},
            rope=partial(0.25),
        ),
        Recipe(
            label="parallel",
            config_class="StableLmConfig",
            values={"qk_layernorm": True, "use_parallel_residual": True},
            rope=partial(0.25),
        ),
    ],
    "cohere": [
        Recipe(
            label="plain",
            config_class="CohereConfig",
            values={"logit_scale": 0.25},
            theta=8e6,
        ),
        Recipe(
            label="head norms",
            config_class="CohereConfig",
            values={"logit_scale": 0.8, "use_qk_norm": True, "attention_bias": True},
        ),
    ],
    "cohere2": [
        Recipe(
            label="no rope",
            config_class="Cohere2Config",
            values={
                "num_hidden_layers": 4,
                "sliding_window": 4,
                "sliding_window_pattern": 2,
                "logit_scale": 0.25,
            },
            old={"sliding_window_pattern": 2, "layer_switch": 2, "rotary_pct": 1.0},
        )
    ],
    "chatglm": [
        Recipe(
            label="ratio",
            config_class="GlmConfig",
            values={"head_dim": 16},
            theta=500 * 10000.0,
            rope=partial(0.5),
            export=toy_exports.chatglm,
        ),
        Recipe(
            label="2-32k",
            config_class="GlmConfig",
            values={"head_dim": 16},
            rope=partial(0.5, rope_type="linear", factor=4.0),
            export=toy_exports.chatglm2_32k,
        ),
    ],
    "glm": [
        Recipe(
            label="plain",
            config_class="GlmConfig",
            values={"head_dim": 16},
            rope=partial(0.5),
        )
    ],
    "glm4": [
        Recipe(
            label="sandwich",
            config_class="Glm4Config",
            values={"head_dim": 32},
            rope=partial(0.5),
        )
    ],
    "internlm2": [
        Recipe(
            label="dynamic",
            config_class="LlamaConfig",
            values={"max_position_embeddings": SHORT},
            theta=1e6,
            rope=DYNAMIC,
            export=toy_exports.internlm2,
            reference=growing,
        )
    ],
    "exaone": [
        Recipe(
            label="llama3",
            config_class="LlamaConfig",
            theta=1e6,
            rope=LLAMA3,
            export=toy_exports.exaone,
        )
    ],
    "baichuan": [
        Recipe(
            label="rope and unit head",
            config_class="LlamaConfig",
            values={"vocab_size": 125696, "num_key_value_heads": 4},
            export=toy_exports.baichuan_7b,
        ),
        Recipe(
            label="alibi",
            config_class="LlamaConfig",
            values={"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 6},
            export=toy_exports.baichuan_13b,
            reference=alibi,
        ),
    ],
    "minicpm": [
        Recipe(
            label="scales",
            config_class="GraniteConfig",
            values={
                "tie_word_embeddings": True,
                "embedding_multiplier": 12.0,
                "residual_multiplier": 1.4 / 2**0.5,
                "logits_scaling": 64 / 16,
                "attention_multiplier": 16**-0.5,
            },
            export=toy_exports.minicpm,
        )
    ],
    "xverse": [
        Recipe(label="plain", config_class="LlamaConfig", export=toy_exports.xverse),
        XVERSE_MOE,
    ],
    "phi": [
        Recipe(
            label="plain",
            config_class="PhiConfig",
            values={"num_key_value_heads": 4},
            rope=partial(0.5),
        )
    ],
    "phi3": [
        Recipe(
            label="window",
            config_class="Phi3Config",
            values={"sliding_window": 4},
        ),
        Recipe(
            label="longrope",
            config_class="Phi3Config",
            values={"original_max_position_embeddings": SHORT},
            rope=longrope(8),
        ),
        Recipe(
            label="partial",
            config_class="Phi3Config",
            values={
                "original_max_position_embeddings": SHORT,
                "tie_word_embeddings": True,
            },
            rope=partial(0.75, **longrope(6)),
            old={"rope_type": "su"},
        ),
    ],
    "smollm3": [
        Recipe(
            label="no rope",
            config_class="SmolLM3Config",
            values={"num_hidden_layers": 4, "no_rope_layer_interval": 2},
            theta=5e6,
        )
    ],
    **MOE_RECIPES,
}


def build(recipe: Recipe) -> Any:
    """The transformers model, every weight random (norms and biases too: 1 and 0 would hide
    errors).
    """
    import transformers

    values = recipe.base | recipe.values
    if recipe.rope is not None:
        values["rope_parameters"] = {"rope_theta": recipe.theta, **recipe.rope}
    config = getattr(transformers, recipe.config_class)(**values)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(
                torch.randn_like(p) * 0.2 + any("norm" in part for part in name.split(".")[-3:])
            )
        for name, b in model.named_buffers():
            if name.endswith("correction_bias"):
                b.copy_(torch.randn_like(b) * 0.2)
        if recipe.change is not None:
            recipe.change(model)
    return model.float().eval()


def save(
    recipe: Recipe, directory: Path, *, old_config: bool = False, shards: bool = False
) -> Reference:
    """A checkpoint as transformers writes it, or as the family's own export; `old_config` rewrites
    config.json in the spelling of transformers 4."""
    model = build(recipe)
    if recipe.export is not None:
        config, tensors = recipe.export(
            old_spelling(model.config.to_dict(), {}), model.state_dict()
        )
        directory.mkdir(exist_ok=True)
        save_file({n: t.contiguous() for n, t in tensors.items()}, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps(config))
        return recipe.reference(model)
    model.save_pretrained(directory, max_shard_size="60KB" if shards else "5GB")
    if old_config:
        path = directory / "config.json"
        path.write_text(json.dumps(old_spelling(json.loads(path.read_text()), recipe.old)))
    return recipe.reference(model)


def old_spelling(config: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """A config of transformers 5 as transformers 4 wrote it."""
    config = dict(config)
    rope = dict(config.pop("rope_parameters"))
    if "full_attention" in rope:
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    config["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = extra.get("rope_type", rope.pop("rope_type"))
    rope.pop("rope_type", None)
    if "short_factor" in rope:  # its old place is the top level
        config["original_max_position_embeddings"] = rope.pop("original_max_position_embeddings")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype", "float32")
    config.pop("layer_types", None)
    return config | {key: value for key, value in extra.items() if key != "rope_type"}
