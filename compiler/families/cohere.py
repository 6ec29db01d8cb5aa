"""Command-R and Aya (cohere), Command-R7B (cohere2): one LayerNorm per layer for parallel branches,
interleaved rope, scaled logits; cohere2 slides on three layers of four and rotates only there.
"""

from __future__ import annotations

from typing import Any

from compiler.checkpoint import ConfigReader
from compiler.families.decoder import (
    QKVO,
    Parts,
    alternating,
    context,
    decoder_spec,
    head_dim,
)
from compiler.families.family import Family, register
from compiler.families.names import LLAMA_NAMES, Source, named
from compiler.families.rope import rope_spec
from compiler.families.spec import LayerNorm, ModelSpec, RopeSpec


def _shared(config: ConfigReader) -> dict[str, Any]:
    return {
        # The 128k of Command-R stand beside the 8k it was first trained with.
        "context": config.integer("model_max_length", context(config)),
        "norm": LayerNorm(eps=config.number("layer_norm_eps", 1e-5)),
        "placement": "parallel",
        "biases": QKVO if config.flag("attention_bias", False) else (),
        "head_scale": config.number("logit_scale", 0.0625),
    }


def _rope(config: ConfigReader, theta: float) -> RopeSpec:
    return rope_spec(config, head_dim(config), context(config), theta=theta, interleaved=True)


def spec_cohere(config: ConfigReader) -> ModelSpec:
    rope = _rope(config, 500000.0)
    own = config.flag("use_qk_norm", False)
    parts = Parts(
        name="cohere",
        qk_norm="heads" if own else None,
        rope=lambda layer: rope,
        **_shared(config),
    )
    return decoder_spec(config, parts)


def spec_cohere2(config: ConfigReader) -> ModelSpec:
    config.require("use_qk_norm", (None, False), None)
    config.require("rotary_pct", (None, 1.0), None)
    config.require("position_embedding_type", (None, "rope_gptj"), None)
    config.require("order_of_interleaved_layers", (None, "local_attn_first"), None)
    for key in ("use_gated_activation", "use_parallel_block", "use_embedding_sharing"):
        config.require(key, (None, True), None)
    rope, window = _rope(config, 10000.0), alternating(config, 4)
    parts = Parts(
        name="cohere2",
        window=window,
        rope=lambda layer: rope if window(layer) else None,
        **_shared(config),
    )
    return decoder_spec(config, parts)


def norms_by_head(spec: ModelSpec, layer: int, part: str) -> tuple[Source, ...] | None:
    """Stored [heads, head_dim]."""
    if part not in ("q_norm", "k_norm"):
        return None
    return (Source(tensor=f"self_attn.{part}.weight", view=(-1,)),)


COHERE = register(
    Family(
        name="cohere",
        architectures=("CohereForCausalLM",),
        spec=spec_cohere,
        names=named(LLAMA_NAMES, norms_by_head),
        defaults={"tie_word_embeddings": True},
    )
)
COHERE2 = register(
    Family(
        name="cohere2",
        architectures=("Cohere2ForCausalLM",),
        spec=spec_cohere2,
        names=named(LLAMA_NAMES),
        spelling={"layer_switch": "sliding_window_pattern"},
        defaults={"tie_word_embeddings": True},
        ignored="cache_implementation use_parallel_embedding",
    )
)
