"""OLMoE: norms over the whole q and k projections, experts in every layer."""

from __future__ import annotations

from compiler.checkpoint import ConfigReader
from compiler.families.decoder import QKVO, Parts, decoder_spec
from compiler.families.family import Family, register
from compiler.families.layers import all_experts
from compiler.families.names import LLAMA_NAMES, expert_modules, named
from compiler.families.spec import ModelSpec, Router


def spec(config: ConfigReader) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    parts = Parts(
        name="olmoe",
        biases=QKVO if bias else (),
        qk_norm="row",
        clip=config.number("clip_qkv", None),
    )
    dense = decoder_spec(config, parts)
    return all_experts(
        config, dense, Router(score="softmax", renormalise=config.flag("norm_topk_prob", False))
    )


OLMOE = register(
    Family(
        name="olmoe",
        architectures=("OlmoeForCausalLM",),
        spec=spec,
        names=named(
            LLAMA_NAMES | {"router": "mlp.gate"},
            expert_modules(*(f"mlp.experts.{{e}}.{n}_proj" for n in ("gate", "up", "down"))),
        ),
        spelling={"num_local_experts": "num_experts"},
        defaults={"rms_norm_eps": 1e-5, "num_experts": 64, "num_experts_per_tok": 8},
        ignored="output_router_logits router_aux_loss_coef",
    )
)
