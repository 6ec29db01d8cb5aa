"""Mixtures and latent attention on top of the shared decoder: what several families read alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

from msgspec import structs

from compiler.checkpoint import ConfigReader
from compiler.errors import CompileError, DamagedCheckpoint
from compiler.families.rope import rope_spec
from compiler.families.spec import (
    Attention,
    ExpertAct,
    GatedFfn,
    Mla,
    ModelSpec,
    MoeFfn,
    RmsNorm,
    RopeSpec,
    Router,
    SharedExperts,
)

LATENT_EPS = 1e-6  # of the norms inside latent attention, whatever rms_norm_eps says


def with_experts(spec: ModelSpec, moe: MoeFfn, sparse: Callable[[int], bool]) -> ModelSpec:
    """The layers that `sparse` names get the mixture, the others keep their ffn."""
    layers = (
        structs.replace(layer, ffn=moe) if sparse(i) else layer
        for i, layer in enumerate(spec.layers)
    )
    return structs.replace(spec, layers=tuple(layers))


def with_mixer(spec: ModelSpec, change: Callable[[int, Attention], Attention | Mla]) -> ModelSpec:
    """Every layer's attention replaced by `change(layer, attention)`."""
    layers = []
    for i, layer in enumerate(spec.layers):
        assert isinstance(layer.mixer, Attention)
        layers.append(structs.replace(layer, mixer=change(i, layer.mixer)))
    return structs.replace(spec, layers=tuple(layers))


def in_form(spec: ModelSpec, form: Literal["absorbed", "plain"], where: str) -> ModelSpec:
    """Every layer's latent attention in one form; CompileError where there is none."""
    if not any(isinstance(layer.mixer, Mla) for layer in spec.layers):
        raise CompileError(
            f"model.mla={form}: {where} has no latent attention to choose a form of; leave it out"
        )
    layers = []
    for layer in spec.layers:
        if isinstance(mixer := layer.mixer, Mla):
            layer = structs.replace(layer, mixer=structs.replace(mixer, form=form))
        layers.append(layer)
    return structs.replace(spec, layers=tuple(layers))


def count_of_experts(config: ConfigReader, experts: int, chosen: int) -> tuple[int, int]:
    """Both, after a check that a token can choose so many."""
    if chosen > experts:
        raise DamagedCheckpoint(
            f"{config.where}: a token chooses {chosen} of {experts} experts; "
            "num_experts_per_tok must not exceed the number of experts"
        )
    return experts, chosen


def all_experts(
    config: ConfigReader, dense: ModelSpec, router: Router, act: ExpertAct = "silu"
) -> ModelSpec:
    """A mixture in every layer, its experts as wide as the dense ffn they replace."""
    experts, chosen = count_of_experts(
        config, config.integer("num_experts"), config.integer("num_experts_per_tok")
    )
    width = gated_ffn(dense).width
    moe = MoeFfn(experts=experts, top_k=chosen, width=width, router=router, act=act)
    return with_experts(dense, moe, lambda layer: True)


def listed_layers(config: ConfigReader) -> Callable[[int], bool]:
    """Qwen's rule: every `decoder_sparse_step`th layer that is not in `mlp_only_layers`."""
    step = config.integer("decoder_sparse_step", 1)
    dense = frozenset(config.value("mlp_only_layers", list, []))
    return lambda layer: layer not in dense and (layer + 1) % step == 0


def layers_after(config: ConfigReader) -> Callable[[int], bool]:
    """DeepSeek's rule: from `first_k_dense_replace` on, every `moe_layer_freq`th layer."""
    first = config.value("first_k_dense_replace", int, 0)
    step = config.integer("moe_layer_freq", 1)
    return lambda layer: layer >= first and layer % step == 0


def shared_experts(config: ConfigReader, each: int) -> SharedExperts | None:
    """`n_shared_experts` experts of width `each` that every token goes through, as one."""
    count = config.value("n_shared_experts", int, 0)
    return SharedExperts(width=count * each) if count else None


def gated_ffn(spec: ModelSpec) -> GatedFfn:
    """The ffn the shared decoder gave every layer."""
    ffn = spec.layers[0].ffn
    assert isinstance(ffn, GatedFfn)
    return ffn


def latent_rope(config: ConfigReader, context: int, *, interleaved: bool) -> RopeSpec:
    return rope_spec(config, config.integer("qk_rope_head_dim"), context, interleaved=interleaved)


def latent_attention(config: ConfigReader, heads: int, rope: RopeSpec, scale: float = 1.0) -> Mla:
    """The keys of DeepSeek-V2; `scale` multiplies the usual 1 / sqrt(head dim)."""
    nope, rotary = config.integer("qk_nope_head_dim"), rope.rotary_dim
    config.require("qk_head_dim", (nope + rotary,), nope + rotary)
    kv_heads = config.integer("num_key_value_heads", heads)
    if kv_heads != heads:
        raise DamagedCheckpoint(
            f"{config.where}: {kv_heads} kv heads for {heads} heads; latent attention expands its "
            "latent for every head, so both must be equal"
        )
    return Mla(
        heads=heads,
        latent=config.integer("kv_lora_rank"),
        nope=nope,
        value=config.integer("v_head_dim"),
        rope=rope,
        scale=(nope + rotary) ** -0.5 * scale,
        norm=RmsNorm(eps=LATENT_EPS),
        q_latent=config.value("q_lora_rank", int, None),
        bias=config.flag("attention_bias", False),
    )


def yarn_attention(config: ConfigReader) -> float:
    """What DeepSeek multiplies attention scores by when yarn stretches the context: the square of
    0.1 mscale_all_dim ln(factor) + 1."""
    for key in ("rope_parameters", "rope_scaling"):
        if config.has(key):
            scaling = config.section(key)
            mscale = scaling.number("mscale_all_dim", 0.0)
            factor = scaling.number("factor", 1.0)
            if mscale and factor > 1:
                return (0.1 * mscale * math.log(factor) + 1) ** 2
            return 1.0
    return 1.0
