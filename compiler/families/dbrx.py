"""DBRX: LayerNorm without bias, clipped packed qkv, experts packed along their rows."""

from __future__ import annotations

from compiler.checkpoint import ConfigReader
from compiler.errors import CompileError, DamagedCheckpoint
from compiler.families.decoder import Parts, decoder_spec
from compiler.families.family import IGNORABLE_KEYS, Family, register
from compiler.families.layers import all_experts
from compiler.families.names import Source, first_of, named, packed
from compiler.families.spec import LayerNorm, ModelSpec, MoeFfn, Router

NAMES = {
    "embed": "transformer.wte",
    "layer": "transformer.blocks.{i}",
    "attn_norm": "norm_attn_norm.norm_1",
    "o": "norm_attn_norm.attn.out_proj",
    "ffn_norm": "norm_attn_norm.norm_2",
    "router": "ffn.router.layer",
    "final_norm": "transformer.norm_f",
    "head": "lm_head",
}

TRAINING_KEYS = {"attn_pdrop", "hidden_size", "moe_jitter_eps", "moe_loss_weight"}


def spec(config: ConfigReader) -> ModelSpec:
    attention, ffn = config.section("attn_config"), config.section("ffn_config")
    clip = attention.number("clip_qkv", None)
    ffn.require("ffn_act_fn", ({"name": "silu"},), {"name": "silu"})
    key = "moe_normalize_expert_weights"  # the power of a norm; null: off, absent: 1
    power = ffn.number(key, None if key in ffn else 1.0)
    if power not in (None, 1.0):
        raise CompileError(f"{ffn.where}: {key} {power} is not supported; supported: 1 or null")
    for section in (attention, ffn):
        section.finish(IGNORABLE_KEYS | TRAINING_KEYS)
    theta = config.number("rope_theta", 10000.0)
    if config.has("rope_parameters"):
        other = config.section("rope_parameters").number("rope_theta", theta)
        if other != theta:
            raise DamagedCheckpoint(
                f"{config.where}: rope_theta is {theta:g} in attn_config and {other:g} in "
                "rope_parameters; keep the one the model was trained with in both"
            )
    norm = LayerNorm(eps=1e-5)
    dense = decoder_spec(config, Parts(name="dbrx", norm=norm, clip=clip))
    return all_experts(config, dense, Router(score="softmax", renormalise=power is not None))


def packing(spec: ModelSpec, layer: int, part: str) -> tuple[Source, ...] | None:
    """Rows [E F, D] of all experts; the down matrix the other way round."""
    f, mlp = spec.layers[layer].ffn, "ffn.experts.mlp"
    if not isinstance(f, MoeFfn):
        return None
    if part == "experts_down":
        view = (f.experts, f.width, spec.dim)
        return (Source(tensor=f"{mlp}.w2", view=view, order=(0, 2, 1)),)
    if part == "experts_gate_up":
        return tuple(
            Source(tensor=f"{mlp}.{name}", rows=(e * f.width, (e + 1) * f.width))
            for e in range(f.experts)
            for name in ("w1", "v1")
        )
    return None


DBRX = register(
    Family(
        name="dbrx",
        architectures=("DbrxForCausalLM",),
        spec=spec,
        names=named(NAMES, first_of(packed(qkv="norm_attn_norm.attn.Wqkv"), packing)),
        spelling={
            "d_model": "hidden_size",
            "n_heads": "num_attention_heads",
            "n_layers": "num_hidden_layers",
            "max_seq_len": "max_position_embeddings",
            "attn_config.kv_n_heads": "num_key_value_heads",
            "attn_config.rope_theta": "rope_theta",
            "ffn_config.ffn_hidden_size": "intermediate_size",
            "ffn_config.moe_num_experts": "num_experts",
            "ffn_config.moe_top_k": "num_experts_per_tok",
        },
        ignored="emb_pdrop output_router_logits router_aux_loss_coef",
    )
)
