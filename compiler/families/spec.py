"""What a model is, as a frozen tree: the only thing `compiler.model.build` reads.

Structure comes from the family, sizes from the checkpoint. A new structural part is a variant
here, not a flag. Every class is tagged, so the tree survives the manifest.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec


class LongRope(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """LongRoPE: a sequence of more than `original` tokens uses `long_freq` for all of them."""

    original: int
    long_freq: tuple[float, ...]


class DynamicNtk(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A token computed when its sequence had n > `original` tokens uses the base
    theta * (factor n / original - (factor - 1))^(R / (R - 2))."""

    theta: float
    factor: float
    original: int


class QwenNtk(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A sequence whose prompt has n tokens uses the base theta * alpha^(R / (R - 2)) with
    alpha = 2^ceil(log2(n / original) + 1) - 1, at least 1."""

    theta: float
    original: int


ByLength = LongRope | DynamicNtk | QwenNtk


class RopeSpec(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Rotary embedding of the first `rotary_dim` dims of a head. `inv_freq` are the rotary_dim/2
    final frequencies (any scaling applied); `scale` multiplies cos and sin; `interleaved` pairs
    (2i, 2i+1) instead of (i, i + rotary_dim/2). `by_length`: how the frequencies change for a
    request whose length is beyond what `inv_freq` is for.
    """

    rotary_dim: int
    inv_freq: tuple[float, ...]
    scale: float = 1.0
    interleaved: bool = False
    by_length: ByLength | None = None


class RmsNorm(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """x * rsqrt(mean x^2 + eps) * w. (Weights stored as w - 1 are imported as w.)"""

    eps: float


class LayerNorm(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """(x - mean x) * rsqrt(var x + eps) * w, + b with `bias`."""

    eps: float
    bias: bool = False


NormSpec = RmsNorm | LayerNorm


class QkNorm(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Norm of q and k before rope. `over`: "head" (every head, one weight [E] for all), "heads"
    (every head, its own weight: [H, E] and [K, E]) or "row" (the whole projection at once: weights
    [H*E] and [K*E])."""

    norm: NormSpec
    over: Literal["head", "heads", "row"] = "head"


class Attention(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Softmax attention with grouped keys; formulas in `kernels.ops.attention`.

    `causal`: a query sees no later key; otherwise every key of its sequence. `biases`: which of q,
    k, v, o have one. `window`: keys visible to a query, itself included (None: all). `softcap`:
    scores become softcap * tanh(score / softcap). `clip`: q, k and v are clamped to +-clip before
    rope. `alibi`: one slope per head. `sinks`: one learned logit per head joins the softmax.
    `logn`: queries beyond that many tokens are scaled by ln(n) / ln(logn).
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeSpec | None
    scale: float
    biases: tuple[Literal["q", "k", "v", "o"], ...] = ()
    qk_norm: QkNorm | None = None
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    clip: float | None = None
    alibi: tuple[float, ...] | None = None
    sinks: bool = False
    logn: int | None = None


class Mla(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Multi-head latent attention; formulas in `kernels.ops.mla`.

    A query head is `nope` plain dims, then the rotary ones; a value head has `value` dims.
    `q_latent`: queries too go through a latent (None: not). `norm`: of both latents. `bias`: of the
    projections to the latents and of the output. `form`: in the absorbed form a token stores
    `latent` + rope.rotary_dim numbers for all heads, in the plain form every head's key and value.
    """

    heads: int
    latent: int
    nope: int
    value: int
    rope: RopeSpec
    scale: float
    norm: RmsNorm
    q_latent: int | None = None
    bias: bool = False
    form: Literal["absorbed", "plain"] = "absorbed"

    @property
    def head_dim(self) -> int:
        """Of queries and keys."""
        return self.nope + self.rope.rotary_dim


class GatedFfn(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """down(act(gate x) * up x); `act`: the activation of the gate, as in `kernels.ops.mlp`."""

    width: int
    act: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    bias: bool = False


class PlainFfn(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """down(act(up x))."""

    width: int
    act: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
    bias: bool = False


class Router(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Which experts a token goes to and with what weights; the rules of `score`, groups and
    `renormalise` stand in `kernels.ops.route`. `scale` multiplies the weights; `bias`: of the
    router's linear; `correction`: a learned bias that moves the choice, not the weights.
    """

    score: Literal["softmax", "sigmoid", "chosen"]
    renormalise: bool = False
    scale: float = 1.0
    bias: bool = False
    correction: bool = False
    groups: int = 1
    kept_groups: int = 1
    group_best: int = 1


class SharedExperts(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A gated ffn every token goes through beside its experts; with `gated` its output is
    multiplied by sigmoid(w x)."""

    width: int
    gated: bool = False


ExpertAct = Literal["silu", "gelu", "gelu_tanh", "silu_clamped"]


class MoeFfn(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """sum of weight_e down_e(act(gate_e x) * up_e x) over the `top_k` of `experts` that the router
    chooses, + the shared experts. "silu_clamped" is gpt-oss's, in `kernels.ops.moe`.
    """

    experts: int
    top_k: int
    width: int
    router: Router
    act: ExpertAct = "silu"
    bias: bool = False
    shared: SharedExperts | None = None


class LayerSpec(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A residual layer; every norm n of it is `norm`, r is `residual_scale`.

    placement "pre":       h += r mixer(n(h));        h += r ffn(n(h))
    placement "sandwich":  h += r n(mixer(n(h)));     h += r n(ffn(n(h)))
    placement "parallel":  h += r mixer(n(h)) + r ffn(n(h)), one norm for both
    placement "post":      h = n(h + r mixer(h));     h = n(h + r ffn(h))
    """

    mixer: Attention | Mla
    ffn: GatedFfn | PlainFfn | MoeFfn
    norm: NormSpec
    placement: Literal["pre", "sandwich", "parallel", "post"] = "pre"
    residual_scale: float = 1.0


class HeadSpec(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """logits = softcap(scale * (W n(h) + b)). `tied`: W is the embedding."""

    tied: bool
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None


class PoolSpec(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One vector per sequence instead of logits: the hidden state of its last token, of its first
    ("cls"), or the mean over its tokens; with `normalise` divided by its length."""

    pooling: Literal["last", "cls", "mean"]
    normalise: bool


class PositionSpec(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What an encoder adds to the embedding of the token at position p: row p + `offset` of a table
    of `rows`, and row 0 of a table of `types` token types; then `norm`."""

    rows: int
    offset: int
    types: int
    norm: NormSpec


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A decoder, or an encoder. `vocab`: rows of the embedding; `context`: the longest sequence the
    checkpoint is made for, in tokens; `embed_scale` multiplies the embeddings.
    """

    family: str
    dim: int
    vocab: int
    context: int
    layers: tuple[LayerSpec, ...]
    final_norm: NormSpec | None
    head: HeadSpec | PoolSpec
    embed_scale: float = 1.0
    positions: PositionSpec | None = None

    @property
    def whole(self) -> bool:
        """A sequence must be computed in one step: later tokens change what earlier ones hold, or
        all of them are pooled."""
        mean = isinstance(self.head, PoolSpec) and self.head.pooling != "last"
        mixers = [layer.mixer for layer in self.layers]
        return mean or not all(isinstance(mixer, Mla) or mixer.causal for mixer in mixers)

    @property
    def tied(self) -> bool:
        """The embedding is the head too."""
        return isinstance(self.head, HeadSpec) and self.head.tied

    def parameters(self) -> int:
        """Number of weight elements (a tied head counted once)."""
        from compiler.families.names import logical_weights

        return sum(math.prod(shape) for shape in logical_weights(self).values())
