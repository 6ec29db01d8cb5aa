"""The keys all decoders share, read once: families add what is theirs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from compiler.checkpoint import ConfigReader
from compiler.errors import CompileError, DamagedCheckpoint
from compiler.families.rope import rope_spec
from compiler.families.spec import (
    Attention,
    DynamicNtk,
    GatedFfn,
    HeadSpec,
    LayerNorm,
    LayerSpec,
    ModelSpec,
    NormSpec,
    PlainFfn,
    QkNorm,
    RmsNorm,
    RopeSpec,
)
from compiler.prequantized import check_method

FULL, SLIDING = "full_attention", "sliding_attention"
Part = Literal["q", "k", "v", "o"]
QKV: tuple[Part, ...] = ("q", "k", "v")
QKVO: tuple[Part, ...] = (*QKV, "o")
Window = Callable[[int], int | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a family decides about the shared decoder; the fields are those of `Attention`,
    `LayerSpec`, `HeadSpec` and `ModelSpec`. By layer: `window`, `rope` (None: the file's rope on
    every layer). `norm` None: RMS norms with `rms_norm_eps`. `act` None: the file must say silu.
    """

    name: str
    norm: NormSpec | None = None
    placement: Literal["pre", "sandwich", "parallel"] = "pre"
    biases: tuple[Part, ...] = ()
    qk_norm: Literal["head", "heads", "row"] | None = None
    rope: Callable[[int], RopeSpec | None] | None = None
    window: Window = lambda layer: None
    scale: float | None = None
    softcap: float | None = None
    clip: float | None = None
    alibi: tuple[float, ...] | None = None
    logn: int | None = None
    ffn: Literal["gated", "plain"] = "gated"
    ffn_bias: bool = False
    width: int | None = None  # of the ffn; None: intermediate_size
    context: int | None = None  # None: max_position_embeddings
    act: Literal["silu", "gelu", "gelu_tanh"] | None = None
    residual_scale: float = 1.0
    embed_scale: float = 1.0
    head_bias: bool = False
    head_scale: float = 1.0
    head_softcap: float | None = None


def head_dim(config: ConfigReader) -> int:
    """`head_dim`, or what is left of the model's width for each head."""
    dim, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    if not config.has("head_dim") and dim % heads:
        raise DamagedCheckpoint(
            f"{config.where}: hidden_size {dim} is no multiple of {heads} heads"
        )
    return config.integer("head_dim", dim // heads)


def context(config: ConfigReader) -> int:
    return config.integer("max_position_embeddings")


def decoder_spec(config: ConfigReader, parts: Parts) -> ModelSpec:
    dim, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads, each = config.integer("num_key_value_heads", heads), head_dim(config)
    if each % 2:
        raise DamagedCheckpoint(f"{config.where}: head_dim {each} is odd; rope turns pairs")
    if heads % kv_heads:
        raise DamagedCheckpoint(
            f"{config.where}: {heads} heads are no multiple of {kv_heads} kv heads"
        )
    if config.has("quantization_config"):
        check_method(config.value("quantization_config", dict), config.where)
    if parts.act is None:
        config.require("hidden_act", ("silu",), "silu")
    norm = parts.norm or RmsNorm(eps=config.number("rms_norm_eps", 1e-6))
    if parts.rope is None:
        shared = rope_spec(config, each, context(config))
    width, act = parts.width or config.integer("intermediate_size"), parts.act or "silu"
    ffn: GatedFfn | PlainFfn = GatedFfn(width=width, act=act, bias=parts.ffn_bias)
    if parts.ffn == "plain":
        ffn = PlainFfn(width=width, act=act, bias=parts.ffn_bias)
    layers = tuple(
        LayerSpec(
            mixer=Attention(
                heads=heads,
                kv_heads=kv_heads,
                head_dim=each,
                rope=shared if parts.rope is None else parts.rope(i),
                scale=parts.scale or each**-0.5,
                biases=parts.biases,
                qk_norm=QkNorm(norm=_unbiased(norm), over=parts.qk_norm) if parts.qk_norm else None,
                window=parts.window(i),
                softcap=parts.softcap,
                clip=parts.clip,
                alibi=parts.alibi,
                logn=parts.logn,
            ),
            ffn=ffn,
            norm=norm,
            placement=parts.placement,
            residual_scale=parts.residual_scale,
        )
        for i in range(config.integer("num_hidden_layers"))
    )
    return ModelSpec(
        family=parts.name,
        dim=dim,
        vocab=config.integer("vocab_size"),
        context=max(_reach(layer, parts.context or context(config)) for layer in layers),
        layers=layers,
        final_norm=norm,
        head=HeadSpec(
            tied=config.flag("tie_word_embeddings", False),
            bias=parts.head_bias,
            scale=parts.head_scale,
            softcap=parts.head_softcap,
        ),
        embed_scale=parts.embed_scale,
    )


def _reach(layer: LayerSpec, context: int) -> int:
    """Dynamic NTK scaling stretches what the file calls the longest sequence."""
    rule = layer.mixer.rope.by_length if layer.mixer.rope is not None else None
    return int(context * rule.factor) if isinstance(rule, DynamicNtk) else context


def _unbiased(norm: NormSpec) -> NormSpec:
    return norm if isinstance(norm, RmsNorm) else LayerNorm(eps=norm.eps)


def layer_types(config: ConfigReader) -> list[str] | None:
    """The explicit per-layer list of newer files, checked."""
    types: list[str] | None = config.value("layer_types", list, None)
    if types is not None:
        if len(types) != config.integer("num_hidden_layers"):
            raise DamagedCheckpoint(
                f"{config.where}: layer_types has {len(types)} entries for "
                f"{config.integer('num_hidden_layers')} layers"
            )
        for kind in types:
            if kind not in (FULL, SLIDING):
                raise CompileError(f"{config.where}: layer type {kind!r} is not supported")
    return types


def alternating(config: ConfigReader, pattern: int, window: int | None = 4096) -> Window:
    """Layers slide as `layer_types` lists them; without it all but every `pattern`th do (or every
    `sliding_window_pattern`th, where the file has it)."""
    size = config.value("sliding_window", int, window) or None
    pattern = config.value("sliding_window_pattern", int, pattern)
    types = layer_types(config)

    def window_of(layer: int) -> int | None:
        full = (layer + 1) % pattern == 0 if types is None else types[layer] == FULL
        return None if full else size

    return window_of


def rounded_to_dtype(config: ConfigReader, x: float) -> float:
    """A factor that a model keeps in the dtype of its weights."""
    name = config.text("torch_dtype", config.text("dtype", "float32"))
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)
    return float(torch.tensor(x, dtype=dtype))


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """Geometric slopes of `heads` heads (Press et al. 2022, and the authors' rule for counts that
    are no power of two)."""
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-4.0 * (i + 1) / power) for i in range(0, 2 * power, 2)]
    return tuple(slopes + between[: heads - power])
