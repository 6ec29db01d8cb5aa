"""gpt-oss: sinks, every other layer slides, packed experts with biases and a clamped SwiGLU."""

from __future__ import annotations

from msgspec import structs

from compiler.checkpoint import ConfigReader
from compiler.families.decoder import QKVO, Parts, alternating, decoder_spec
from compiler.families.family import Family, register
from compiler.families.layers import count_of_experts, gated_ffn, with_experts, with_mixer
from compiler.families.names import LLAMA_NAMES, Source, named
from compiler.families.spec import ModelSpec, MoeFfn, Router

YARN = {  # what its class assumes
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}


def spec(config: ConfigReader) -> ModelSpec:
    bias = config.flag("attention_bias", True)
    config.require("swiglu_limit", (7.0,), 7.0)
    config.require("swiglu_alpha", (1.702,), 1.702)
    window = alternating(config, 2, window=128)
    plain = decoder_spec(config, Parts(name="gpt_oss", biases=QKVO if bias else (), window=window))
    plain = with_mixer(plain, lambda layer, attention: structs.replace(attention, sinks=True))
    experts, chosen = count_of_experts(
        config, config.integer("num_experts"), config.integer("num_experts_per_tok")
    )
    moe = MoeFfn(
        experts=experts,
        top_k=chosen,
        width=gated_ffn(plain).width,
        router=Router(score="chosen", bias=True),
        act="silu_clamped",
        bias=True,
    )
    return with_experts(plain, moe, lambda layer: True)


def packing(spec: ModelSpec, layer: int, part: str) -> tuple[Source, ...] | None:
    """Matrices lie [E, inputs, outputs]; gate and up take turns among the outputs."""
    f, dim = spec.layers[layer].ffn, spec.dim
    if part == "sinks":
        return (Source(tensor="self_attn.sinks"),)
    if not isinstance(f, MoeFfn) or not part.startswith("experts_"):
        return None
    e, width = f.experts, f.width
    gate_up, down = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
    return {
        "experts_gate_up": (Source(tensor=gate_up, view=(e, dim, width, 2), order=(0, 3, 2, 1)),),
        "experts_gate_up_bias": (
            Source(tensor=f"{gate_up}_bias", view=(e, width, 2), order=(0, 2, 1)),
        ),
        "experts_down": (Source(tensor=down, view=(e, width, dim), order=(0, 2, 1)),),
        "experts_down_bias": (Source(tensor=f"{down}_bias", view=(e, dim)),),
    }[part]


GPT_OSS = register(
    Family(
        name="gpt_oss",
        architectures=("GptOssForCausalLM",),
        spec=spec,
        names=named(LLAMA_NAMES | {"router": "mlp.router"}, packing),
        spelling={"num_local_experts": "num_experts", "experts_per_token": "num_experts_per_tok"},
        defaults={
            "head_dim": 64,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0,
            "rope_scaling": YARN,
            "num_experts": 128,
            "num_experts_per_tok": 4,
        },
        ignored="output_router_logits router_aux_loss_coef initial_context_length",
    )
)
