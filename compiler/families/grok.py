"""Grok-1: norms on both sides of every branch, soft-capped scores, experts with a GELU gate. Two
published layouts: the Hugging Face port's and the one of serving engines.
"""

from __future__ import annotations

from compiler.checkpoint import ConfigReader
from compiler.families.decoder import Parts, decoder_spec
from compiler.families.family import Family, register
from compiler.families.layers import all_experts
from compiler.families.names import Source, expert_modules, first_of, named
from compiler.families.spec import ModelSpec, Router

PORT = {
    "embed": "model.embed_tokens",
    "layer": "model.layers.{i}",
    **{n: f"attn.{n}_proj" for n in "qkvo"},
    "router": "moe_block.gate",
    "attn_norm": "pre_attn_norm",
    "attn_post_norm": "post_attn_norm",
    "ffn_norm": "pre_moe_norm",
    "ffn_post_norm": "post_moe_norm",
    "final_norm": "model.norm",
    "head": "lm_head",
}
ENGINE = PORT | {n: f"self_attn.{n}_proj" for n in "qkvo"} | {"router": "block_sparse_moe.gate"}


def spec(config: ConfigReader) -> ModelSpec:
    config.require("router_logit_softcapping", (None, 0, 0.0), None)  # the original has none
    parts = Parts(
        name="grok",
        placement="sandwich",
        scale=config.number("attn_output_multiplier"),
        softcap=config.number("max_attn_value", 30.0),
        act="gelu_tanh",
        embed_scale=config.number("embedding_multiplier_scale"),
        head_scale=config.number("output_multiplier_scale"),
    )
    config.require("hidden_act", ("gelu", "gelu_pytorch_tanh"), "gelu")  # the port writes gelu
    dense = decoder_spec(config, parts)
    return all_experts(config, dense, Router(score="softmax"), act="gelu_tanh")


def scales(spec: ModelSpec, layer: int, part: str) -> tuple[Source, ...] | None:
    """The port calls the weight of a norm its scale."""
    return (Source(tensor=f"{PORT[part]}.scale"),) if part.endswith("_norm") else None


SPELLING = {"num_local_experts": "num_experts", "attn_logit_softcapping": "max_attn_value"}
DEFAULTS = {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}
IGNORED = "output_router_logits router_aux_loss_coef"

GROK = register(
    Family(
        name="grok",
        architectures=("Grok1ModelForCausalLM",),
        spec=spec,
        names=named(
            PORT,
            first_of(
                scales,
                expert_modules(
                    *(f"moe_block.experts.{{e}}.{n}" for n in ("linear", "linear_v", "linear_1"))
                ),
            ),
        ),
        spelling=SPELLING,
        defaults=DEFAULTS,
        ignored=IGNORED,
    )
)
GROK_ENGINE = register(
    Family(
        name="grok_engine",
        architectures=("Grok1ForCausalLM",),
        spec=spec,
        names=named(
            ENGINE, expert_modules(*(f"block_sparse_moe.experts.{{e}}.w{n}" for n in (1, 3, 2)))
        ),
        spelling=SPELLING,
        defaults=DEFAULTS,
        ignored=IGNORED,
    )
)
