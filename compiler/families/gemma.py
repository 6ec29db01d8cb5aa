"""Gemma 1, 2 and 3 (text): norm weights stored around zero, scaled embeddings, GELU gates; 2 and 3
with norms on both sides of every branch and layers that slide; 2 with soft caps, 3 with q and k
norms and a rope for each kind of layer.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from msgspec import structs

from compiler.checkpoint import ConfigReader
from compiler.families.decoder import (
    Parts,
    alternating,
    context,
    decoder_spec,
    head_dim,
    rounded_to_dtype,
)
from compiler.families.family import IGNORABLE_KEYS, Family, register
from compiler.families.names import LLAMA_NAMES, named
from compiler.families.rope import plain_rope, rope_spec
from compiler.families.spec import ModelSpec

TANH = ("gelu_pytorch_tanh", "gelu")  # early files say gelu and mean the tanh form


def _shared(config: ConfigReader) -> dict[str, Any]:
    config.require("hidden_activation", (None, *TANH), None)
    config.require("hidden_act", (None, *TANH), None)
    config.require("attention_bias", (False,), False)
    config.require("use_bidirectional_attention", (None, False), None)
    scale = rounded_to_dtype(config, math.sqrt(config.integer("hidden_size")))
    return {"act": "gelu_tanh", "embed_scale": scale}


def spec_gemma(config: ConfigReader) -> ModelSpec:
    return decoder_spec(config, Parts(name="gemma", **_shared(config)))


def _sandwich(config: ConfigReader) -> dict[str, Any]:
    return {
        **_shared(config),
        "placement": "sandwich",
        "scale": config.number("query_pre_attn_scalar", 256) ** -0.5,
        "head_softcap": config.number("final_logit_softcapping", None),
    }


def spec_gemma2(config: ConfigReader) -> ModelSpec:
    cap = config.number("attn_logit_softcapping", None)
    window = alternating(config, 2)
    parts = Parts(name="gemma2", softcap=cap, window=window, **_sandwich(config))
    return decoder_spec(config, parts)


def spec_gemma3(config: ConfigReader) -> ModelSpec:
    config.require("attn_logit_softcapping", (None,), None)
    window = alternating(config, 6)
    dim, size = head_dim(config), context(config)
    full = rope_spec(config, dim, size, theta=1e6, layer_type="full_attention")
    local = plain_rope(config, dim, config.number("rope_local_base_freq", 10000.0))
    if config.has("rope_parameters"):
        local = rope_spec(config, dim, size, theta=1e4, layer_type="sliding_attention")
    parts = Parts(
        name="gemma3",
        qk_norm="head",
        window=window,
        rope=lambda layer: local if window(layer) else full,
        **_sandwich(config),
    )
    return decoder_spec(config, parts)


def spec_gemma3_multimodal(config: ConfigReader) -> ModelSpec:
    """The language half; its config is a section, its tensors lie beside the vision tower's."""
    dtype = config.text("torch_dtype", config.text("dtype", "float32"))
    assumed = {**DEFAULTS["gemma3"], "torch_dtype": dtype}
    text = config.section("text_config").translated(SPELLING, assumed)
    spec = structs.replace(spec_gemma3(text), family="gemma3_multimodal")
    text.finish(IGNORABLE_KEYS.union(IGNORED.split()))
    return spec


def plus_one(x: torch.Tensor) -> torch.Tensor:
    """Norm weights are stored as the difference from 1."""
    return x + 1


def renamed(prefix: str) -> dict[str, str]:
    """Llama's modules under `prefix`, with the norms of both sides."""
    return {
        **{k: v.replace("model.", prefix, 1) for k, v in LLAMA_NAMES.items()},
        "attn_post_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "ffn_post_norm": "post_feedforward_layernorm",
    }


IGNORED = "cache_implementation"
SPELLING = {"_sliding_window_pattern": "sliding_window_pattern"}
SIZES = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
DEFAULTS = {
    "gemma": {"head_dim": 256, "tie_word_embeddings": True},
    "gemma2": {**SIZES, "tie_word_embeddings": True},
    "gemma3": {
        **SIZES,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
}
GEMMA = register(
    Family(
        name="gemma",
        architectures=("GemmaForCausalLM",),
        spec=spec_gemma,
        names=named(LLAMA_NAMES, norms=plus_one),
        defaults=DEFAULTS["gemma"],
    )
)
GEMMA2 = register(
    Family(
        name="gemma2",
        architectures=("Gemma2ForCausalLM",),
        spec=spec_gemma2,
        names=named(renamed("model."), norms=plus_one),
        defaults=DEFAULTS["gemma2"],
        ignored=IGNORED,
    )
)
GEMMA3 = register(
    Family(
        name="gemma3",
        architectures=("Gemma3ForCausalLM",),
        spec=spec_gemma3,
        names=named(renamed("model."), norms=plus_one),
        spelling=SPELLING,
        defaults=DEFAULTS["gemma3"],
        ignored=IGNORED,
    )
)
GEMMA3_MULTIMODAL = register(
    Family(
        name="gemma3_multimodal",
        architectures=("Gemma3ForConditionalGeneration",),
        spec=spec_gemma3_multimodal,
        names=named(renamed("language_model.model."), norms=plus_one),
        unused=(r"vision_tower\..*", r"multi_modal_projector\..*"),
        ignored=(
            "boi_token_index eoi_token_index image_token_index mm_tokens_per_image vision_config"
            " tie_word_embeddings"
        ),
    )
)
