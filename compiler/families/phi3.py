"""Phi-3, 3.5 and 4: Llama with packed q, k, v and gate, up, sliding windows and LongRoPE."""

from __future__ import annotations

from compiler.checkpoint import ConfigReader
from compiler.families.decoder import Parts, context, decoder_spec
from compiler.families.family import Family, register
from compiler.families.names import LLAMA_NAMES, named, packed
from compiler.families.spec import ModelSpec


def spec(config: ConfigReader) -> ModelSpec:
    config.require("attention_bias", (False,), False)
    for key in ("lm_head_bias", "mlp_bias"):
        config.require(key, (False,), False)
    for key in ("full_attn_mod", "interpolate_factor"):  # of other Phi-4 models
        config.require(key, (1,), 1)
    config.value("original_max_position_embeddings", int, None)  # of LongRoPE, where it is used
    window = config.value("sliding_window", int, None)
    if window is not None and window >= context(config):
        window = None
    return decoder_spec(config, Parts(name="phi3", window=lambda layer: window))


PHI3 = register(
    Family(
        name="phi3",
        architectures=("Phi3ForCausalLM",),
        spec=spec,
        names=named(LLAMA_NAMES, packed(qkv="self_attn.qkv_proj", gate_up="mlp.gate_up_proj")),
    )
)
