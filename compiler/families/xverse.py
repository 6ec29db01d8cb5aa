"""XVERSE: Llama under its own name; with `num_experts` a mixture with shared experts (the smaller
one declares the same architecture as the dense models).
"""

from __future__ import annotations

from compiler.checkpoint import ConfigReader
from compiler.families.decoder import Parts, decoder_spec
from compiler.families.family import Family, register
from compiler.families.layers import (
    count_of_experts,
    gated_ffn,
    shared_experts,
    with_experts,
)
from compiler.families.names import LLAMA_NAMES, expert_modules, named
from compiler.families.spec import ModelSpec, MoeFfn, Router


def spec(config: ConfigReader) -> ModelSpec:
    dense = decoder_spec(config, Parts(name="xverse"))
    if not config.has("num_experts"):
        return dense
    experts, chosen = count_of_experts(
        config, config.integer("num_experts"), config.integer("num_experts_per_tok")
    )
    width = gated_ffn(dense).width  # intermediate_size is an expert's
    moe = MoeFfn(
        experts=experts,
        top_k=chosen,
        width=width,
        # No released file has the key; the authors' code renormalises.
        router=Router(score="softmax", renormalise=config.flag("norm_topk_prob", True)),
        shared=shared_experts(config, width),
    )
    return with_experts(dense, moe, lambda layer: True)


XVERSE = register(
    Family(
        name="xverse",
        architectures=("XverseForCausalLM", "XverseMoeForCausalLM"),
        spec=spec,
        names=named(
            LLAMA_NAMES
            | {"router": "mlp.router"}
            | {f"shared_{n}": f"mlp.shared_experts.{n}_proj" for n in ("gate", "up", "down")},
            expert_modules(*(f"mlp.experts.{{e}}.{n}_proj" for n in ("gate", "up", "down"))),
        ),
        spelling={"moe_top_k": "num_experts_per_tok", "num_shared_experts": "n_shared_experts"},
        ignored="max_tokenizer_truncation output_router_logits router_aux_loss_coef",
    )
)
