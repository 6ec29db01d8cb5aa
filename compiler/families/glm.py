"""GLM-4 in the Hugging Face format (glm) and GLM-4-0414 (glm4): biases on q, k, v, packed gate and
up, half of each head rotates in neighbouring pairs; glm4 with norms on both sides of every branch.
"""

from __future__ import annotations

from typing import Literal

from compiler.checkpoint import ConfigReader
from compiler.families.decoder import QKV, Parts, context, decoder_spec, head_dim
from compiler.families.family import Family, register
from compiler.families.names import LLAMA_NAMES, named, packed
from compiler.families.rope import rope_spec
from compiler.families.spec import ModelSpec


def _spec(config: ConfigReader, name: str, placement: Literal["pre", "sandwich"]) -> ModelSpec:
    rope = rope_spec(config, head_dim(config), context(config), partial=0.5, interleaved=True)
    return decoder_spec(
        config,
        Parts(
            name=name,
            placement=placement,
            biases=QKV if config.flag("attention_bias", True) else (),
            rope=lambda layer: rope,
        ),
    )


DEFAULTS = {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-7}
PACKED = packed(gate_up="mlp.gate_up_proj")
GLM = register(
    Family(
        name="glm",
        architectures=("GlmForCausalLM",),
        spec=lambda config: _spec(config, "glm", "pre"),
        names=named(LLAMA_NAMES, PACKED),
        defaults=DEFAULTS,
    )
)
POST_NORMS = {
    "attn_post_norm": "post_self_attn_layernorm",
    "ffn_post_norm": "post_mlp_layernorm",
}
GLM4 = register(
    Family(
        name="glm4",
        architectures=("Glm4ForCausalLM",),
        spec=lambda config: _spec(config, "glm4", "sandwich"),
        names=named(LLAMA_NAMES | POST_NORMS, PACKED),
        defaults=DEFAULTS,
    )
)
