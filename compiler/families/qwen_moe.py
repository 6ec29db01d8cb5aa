"""Qwen 1.5 / 2 MoE (biases on q, k, v, a gated shared expert) and Qwen 3 MoE (norms on heads)."""

from __future__ import annotations

from compiler.checkpoint import ConfigReader
from compiler.families.decoder import QKV, Parts, decoder_spec
from compiler.families.family import Family, register
from compiler.families.layers import count_of_experts, listed_layers, with_experts
from compiler.families.names import LLAMA_NAMES, expert_modules, named
from compiler.families.qwen import parts_qwen3, sliding
from compiler.families.spec import ModelSpec, MoeFfn, Router, SharedExperts

NAMES = named(
    LLAMA_NAMES
    | {"router": "mlp.gate", "shared_router": "mlp.shared_expert_gate"}
    | {f"shared_{n}": f"mlp.shared_expert.{n}_proj" for n in ("gate", "up", "down")},
    expert_modules(*(f"mlp.experts.{{e}}.{n}_proj" for n in ("gate", "up", "down"))),
)
IGNORED = "output_router_logits router_aux_loss_coef"


def mixture(config: ConfigReader, shared: SharedExperts | None) -> MoeFfn:
    experts, chosen = count_of_experts(
        config, config.integer("num_experts"), config.integer("num_experts_per_tok")
    )
    return MoeFfn(
        experts=experts,
        top_k=chosen,
        width=config.integer("moe_intermediate_size"),
        router=Router(score="softmax", renormalise=config.flag("norm_topk_prob", False)),
        shared=shared,
    )


def full_qwen2(layer: int, first: int) -> bool:
    """Its class lets every other layer below `max_window_layers` slide, from the first on."""
    return layer % 2 == 1 or layer >= first


def spec_qwen2(config: ConfigReader) -> ModelSpec:
    biases = QKV if config.flag("qkv_bias", True) else ()
    parts = Parts(name="qwen2_moe", biases=biases, window=sliding(config, full_qwen2))
    shared = SharedExperts(width=config.integer("shared_expert_intermediate_size"), gated=True)
    dense = decoder_spec(config, parts)
    return with_experts(dense, mixture(config, shared), listed_layers(config))


def spec_qwen3(config: ConfigReader) -> ModelSpec:
    dense = decoder_spec(config, parts_qwen3(config, "qwen3_moe"))
    return with_experts(dense, mixture(config, None), listed_layers(config))


QWEN2_MOE = register(
    Family(
        name="qwen2_moe",
        architectures=("Qwen2MoeForCausalLM",),
        spec=spec_qwen2,
        names=NAMES,
        spelling={"num_local_experts": "num_experts"},
        defaults={
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
        },
        ignored=IGNORED,
    )
)
QWEN3_MOE = register(
    Family(
        name="qwen3_moe",
        architectures=("Qwen3MoeForCausalLM",),
        spec=spec_qwen3,
        names=NAMES,
        spelling={"num_local_experts": "num_experts"},
        defaults={
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        ignored=IGNORED,
    )
)
