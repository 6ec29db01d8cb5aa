"""StableLM: LayerNorms with biases, a quarter of each head rotates; the 12B has parallel branches
and a LayerNorm of its own for every head of q and k.
"""

from __future__ import annotations

from compiler.checkpoint import ConfigReader
from compiler.families.decoder import QKV, Parts, context, decoder_spec, head_dim
from compiler.families.family import Family, register
from compiler.families.names import LLAMA_NAMES, Source, named
from compiler.families.rope import rope_spec
from compiler.families.spec import Attention, LayerNorm, ModelSpec


def spec(config: ConfigReader) -> ModelSpec:
    config.require("rotary_scaling_factor", (None, 1.0), None)
    rope = rope_spec(config, head_dim(config), context(config), partial=0.25)
    return decoder_spec(
        config,
        Parts(
            name="stablelm",
            norm=LayerNorm(eps=config.number("layer_norm_eps", 1e-5), bias=True),
            placement="parallel" if config.flag("use_parallel_residual", False) else "pre",
            biases=QKV if config.flag("use_qkv_bias", False) else (),
            qk_norm="heads" if config.flag("qk_layernorm", False) else None,
            rope=lambda layer: rope,
        ),
    )


def norms_by_head(spec: ModelSpec, layer: int, part: str) -> tuple[Source, ...] | None:
    if part not in ("q_norm", "k_norm"):
        return None
    a = spec.layers[layer].mixer
    assert isinstance(a, Attention)
    name = f"self_attn.{part[0]}_layernorm.norms.{{}}.weight"
    heads = a.heads if part == "q_norm" else a.kv_heads
    return tuple(Source(tensor=name.format(head)) for head in range(heads))


STABLELM = register(
    Family(
        name="stablelm",
        architectures=("StableLmForCausalLM", "StableLMEpochForCausalLM"),
        spec=spec,
        names=named(LLAMA_NAMES, norms_by_head),
        spelling={"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"},
    )
)
