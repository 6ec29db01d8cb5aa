"""What a model is, as a frozen tree: the only thing `compiler.model.build` reads.

Structure comes from the family, sizes from the checkpoint. A new structural part is a variant
here, not a flag.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary embedding of the first `rotary_dim` dims of a head. `inv_freq` are the rotary_dim/2
    final frequencies (any scaling applied); `scale` multiplies cos and sin; `interleaved` pairs
    (2i, 2i+1) instead of (i, i + rotary_dim/2).
    """

    rotary_dim: int
    inv_freq: tuple[float, ...]
    scale: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSpec:
    """RMS norm: x * rsqrt(mean x^2 + eps) * w."""

    eps: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Softmax attention with grouped keys. `window`: keys visible to a query, itself included
    (None: all).
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeSpec | None
    scale: float
    qkv_bias: bool = False
    out_bias: bool = False
    head_norm: NormSpec | None = None  # per-head RMS norm of q and k before rope
    window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedFfn:
    """down(act(gate x) * up x)."""

    width: int
    act: str = "silu"
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """Pre-norm residual layer: h += mixer(norm(h)); h += ffn(norm(h))."""

    mixer: Attention
    ffn: GatedFfn
    norm: NormSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A decoder. `context` is the longest sequence the checkpoint is made for, in tokens."""

    family: str
    dim: int
    vocab: int
    context: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec
    tied_head: bool

    def parameters(self) -> int:
        """Number of weight elements (a tied head counted once)."""
        from compiler.families.names import logical_weights

        total = 0
        for shape in logical_weights(self).values():
            n = 1
            for d in shape:
                n *= d
            total += n
        return total
