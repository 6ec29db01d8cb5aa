"""DeepSeek MoE (v1), V2 and V3 / R1: fine-grained and shared experts, from V2 on with latent
attention.
"""

from __future__ import annotations

from compiler.checkpoint import ConfigReader
from compiler.errors import CompileError, DamagedCheckpoint
from compiler.families.decoder import QKVO, Parts, context, decoder_spec
from compiler.families.family import Family, register
from compiler.families.layers import (
    count_of_experts,
    latent_attention,
    latent_rope,
    layers_after,
    shared_experts,
    with_experts,
    with_mixer,
    yarn_attention,
)
from compiler.families.names import (
    LLAMA_NAMES,
    Source,
    expert_modules,
    first_of,
    latent_projections,
    named,
)
from compiler.families.spec import ModelSpec, MoeFfn, Router

LATENT_NAMES = {
    "q_a": "self_attn.q_a_proj",
    "q_a_norm": "self_attn.q_a_layernorm",
    "q_b": "self_attn.q_b_proj",
    "kv_a": "self_attn.kv_a_proj_with_mqa",
    "kv_a_norm": "self_attn.kv_a_layernorm",
}
MODULES = (
    LLAMA_NAMES
    | LATENT_NAMES
    | {"router": "mlp.gate"}
    | {f"shared_{n}": f"mlp.shared_experts.{n}_proj" for n in ("gate", "up", "down")}
)
EXPERTS = expert_modules(*(f"mlp.experts.{{e}}.{n}_proj" for n in ("gate", "up", "down")))
LATENT_PACKING = latent_projections(LATENT_NAMES["kv_a"], "self_attn.kv_b_proj")
IGNORED = "aux_loss_alpha seq_aux ep_size output_router_logits router_aux_loss_coef"


def correction(spec: ModelSpec, layer: int, part: str) -> tuple[Source, ...] | None:
    if part != "router_correction":
        return None
    return (Source(tensor="mlp.gate.e_score_correction_bias"),)


def mixture(config: ConfigReader, router: Router) -> MoeFfn:
    experts, chosen = count_of_experts(
        config, config.integer("n_routed_experts"), config.integer("num_experts_per_tok")
    )
    width = config.integer("moe_intermediate_size")
    if experts % router.groups or router.kept_groups > router.groups:
        raise DamagedCheckpoint(
            f"{config.where}: {experts} experts cannot be {router.groups} groups of which "
            f"{router.kept_groups} are kept (n_routed_experts, n_group, topk_group)"
        )
    return MoeFfn(
        experts=experts,
        top_k=chosen,
        width=width,
        router=router,
        shared=shared_experts(config, width),
    )


def spec_v1(config: ConfigReader) -> ModelSpec:
    bias = config.flag("attention_bias", False)
    dense = decoder_spec(config, Parts(name="deepseek", biases=QKVO if bias else ()))
    config.require("scoring_func", ("softmax",), "softmax")
    router = Router(score="softmax", renormalise=config.flag("norm_topk_prob", False))
    return with_experts(dense, mixture(config, router), layers_after(config))


def latent_decoder(config: ConfigReader, name: str, *, interleaved: bool = True) -> ModelSpec:
    config.require("mlp_bias", (False,), False)
    rotary = config.integer("qk_rope_head_dim")
    config.require("head_dim", (rotary,), rotary)  # what transformers calls it
    rope = latent_rope(config, context(config), interleaved=interleaved)
    dense = decoder_spec(config, Parts(name=name, rope=lambda layer: rope))
    heads = config.integer("num_attention_heads")
    mixer = latent_attention(config, heads, rope, yarn_attention(config))
    return with_mixer(dense, lambda layer, attention: mixer)


def spec_v2(config: ConfigReader) -> ModelSpec:
    dense = latent_decoder(config, "deepseek_v2")
    config.require("scoring_func", ("softmax",), "softmax")
    method = config.text("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise CompileError(
            f"{config.where}: topk_method {method!r} is not supported; supported: greedy, "
            "group_limited_greedy"
        )
    groups, kept = config.integer("n_group", 1), config.integer("topk_group", 1)
    limited = method == "group_limited_greedy"
    # The authors' code either renormalises or scales.
    renormalise = config.flag("norm_topk_prob", False)
    factor = config.number("routed_scaling_factor", 1.0)
    router = Router(
        score="softmax",
        renormalise=renormalise,
        scale=1.0 if renormalise else factor,
        groups=groups if limited else 1,
        kept_groups=kept if limited else 1,
    )
    return with_experts(dense, mixture(config, router), layers_after(config))


def spec_v3(config: ConfigReader) -> ModelSpec:
    dense = latent_decoder(config, "deepseek_v3", interleaved=config.flag("rope_interleave", True))
    config.require("scoring_func", ("sigmoid",), "sigmoid")
    config.require("topk_method", ("noaux_tc",), "noaux_tc")
    router = Router(
        score="sigmoid",
        renormalise=config.flag("norm_topk_prob", True),
        scale=config.number("routed_scaling_factor", 2.5),
        correction=True,
        groups=config.integer("n_group", 8),
        kept_groups=config.integer("topk_group", 4),
        group_best=2,
    )
    return with_experts(dense, mixture(config, router), layers_after(config))


DEEPSEEK = register(
    Family(
        name="deepseek",
        architectures=("DeepseekForCausalLM",),
        spec=spec_v1,
        names=named(MODULES, EXPERTS),
        ignored=IGNORED,
    )
)
DEEPSEEK_V2 = register(
    Family(
        name="deepseek_v2",
        architectures=("DeepseekV2ForCausalLM",),
        spec=spec_v2,
        names=named(MODULES, first_of(EXPERTS, LATENT_PACKING)),
        ignored=IGNORED,
    )
)
DEEPSEEK_V3 = register(
    Family(
        name="deepseek_v3",
        architectures=("DeepseekV3ForCausalLM",),
        spec=spec_v3,
        names=named(MODULES, first_of(EXPERTS, LATENT_PACKING, correction)),
        # The layers behind the last predict further tokens; rows of theirs stand in no index.
        unused=(r".*\.rotary_emb\.inv_freq", r"model\.layers\.{layers}\..*"),
        defaults={"first_k_dense_replace": 3},
        ignored=f"{IGNORED} num_nextn_predict_layers",
    )
)
