"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from compiler.checkpoint import ConfigReader
from compiler.families.decoder import Parts, decoder_spec
from compiler.families.family import Family, register
from compiler.families.layers import all_experts
from compiler.families.names import LLAMA_NAMES, expert_modules, named
from compiler.families.spec import ModelSpec, Router


def spec(config: ConfigReader) -> ModelSpec:
    window = config.value("sliding_window", int, None) or None
    dense = decoder_spec(config, Parts(name="mixtral", window=lambda layer: window))
    return all_experts(config, dense, Router(score="softmax", renormalise=True))


MIXTRAL = register(
    Family(
        name="mixtral",
        architectures=("MixtralForCausalLM",),
        spec=spec,
        names=named(
            LLAMA_NAMES | {"router": "block_sparse_moe.gate"},
            expert_modules(*(f"block_sparse_moe.experts.{{e}}.w{n}" for n in (1, 3, 2))),
        ),
        spelling={"num_local_experts": "num_experts"},
        defaults={
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
        ignored="output_router_logits router_aux_loss_coef router_jitter_noise",
    )
)
