"""The keys all Llama-like decoders share, read once: families add what is theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from compiler.checkpoint import ConfigReader
from compiler.errors import CompileError, DamagedCheckpoint
from compiler.families.rope import rope_spec
from compiler.families.spec import (
    Attention,
    GatedFfn,
    HeadSpec,
    LayerSpec,
    ModelSpec,
    QkNorm,
    RmsNorm,
)

FULL, SLIDING = "full_attention", "sliding_attention"
QKV: tuple[Literal["q", "k", "v"], ...] = ("q", "k", "v")
QKVO: tuple[Literal["q", "k", "v", "o"], ...] = (*QKV, "o")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a family decides about the shared decoder. `window(config, i)`: sliding window of layer
    i, None for all keys.
    """

    name: str
    biases: tuple[Literal["q", "k", "v", "o"], ...] = ()
    ffn_bias: bool = False
    head_norm: bool = False
    head_dim: int | None = None  # the class default when the file has none; None: dim / heads
    kv_heads: int | None = None  # likewise; None: heads
    window: Callable[[int], int | None] = lambda layer: None


def decoder_spec(config: ConfigReader, parts: Parts) -> ModelSpec:
    dim, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    kv_heads = config.integer("num_key_value_heads", parts.kv_heads or heads)
    if not config.has("head_dim") and parts.head_dim is None and dim % heads:
        raise DamagedCheckpoint(
            f"{config.where}: hidden_size {dim} is no multiple of {heads} heads"
        )
    head_dim = config.integer("head_dim", parts.head_dim or dim // heads)
    if head_dim % 2:
        raise DamagedCheckpoint(f"{config.where}: head_dim {head_dim} is odd; rope turns pairs")
    if heads % kv_heads:
        raise DamagedCheckpoint(
            f"{config.where}: {heads} heads are no multiple of {kv_heads} kv heads"
        )
    config.require("hidden_act", ("silu",), "silu")
    if config.has("quantization_config"):
        raise CompileError(
            f"{config.where}: quantized checkpoints are not supported yet; use the original"
        )
    norm = RmsNorm(eps=config.number("rms_norm_eps", 1e-6))
    context = config.integer("max_position_embeddings")
    rope = rope_spec(config, head_dim, context)
    ffn = GatedFfn(width=config.integer("intermediate_size"), bias=parts.ffn_bias)
    layers = tuple(
        LayerSpec(
            mixer=Attention(
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                rope=rope,
                scale=head_dim**-0.5,
                biases=parts.biases,
                qk_norm=QkNorm(norm=norm) if parts.head_norm else None,
                window=parts.window(i),
            ),
            ffn=ffn,
            norm=norm,
        )
        for i in range(config.integer("num_hidden_layers"))
    )
    return ModelSpec(
        family=parts.name,
        dim=dim,
        vocab=config.integer("vocab_size"),
        context=context,
        layers=layers,
        final_norm=norm,
        head=HeadSpec(tied=config.flag("tie_word_embeddings", False)),
    )


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
