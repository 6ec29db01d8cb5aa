"""A model as a program: `build(spec, …)` writes one decoder step as calls, `constants(spec, …)`
computes the tables it reads.

The only modelling code. Comes in: a ModelSpec. Goes out: an unfused Program over one ragged batch
of tokens (decode rows and prefill chunks together). Called by the pipeline, by `verify` and by
`inspect`.

T tokens, S sequences (and logit rows), P pages, D model, H heads, K kv heads, E head dim, F ffn, V
vocabulary, R rotary dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from compiler.errors import CompileError
from compiler.families.by_length import frequencies, length_rule, variants
from compiler.families.spec import (
    Attention,
    HeadSpec,
    Mla,
    ModelSpec,
    MoeFfn,
    NormSpec,
    PlainFfn,
    PoolSpec,
    RmsNorm,
    RopeSpec,
)
from compiler.program import Builder, Dim, Program
from kernels.ops import register  # noqa: F401  (fills OPS)
from kernels.ops.kv import KV_DTYPES
from kernels.ops.mlp import GATED
from kernels.ops.moe import CLAMPED

GATED_ACT = {act: gated for gated, act in GATED.items()} | {"silu_clamped": CLAMPED}
PAGE_ALIGN = 64

# Every io input and output of a step in upload order, as in runtime.device.base.StepInput and
# StepOutput. The upload is one piece that takes only what is used of its two ends: before these
# inputs come `masks` (filled from the end), behind them `edits`. `rope_variant` is there only where
# rope depends on the request's length; a pooled model has neither rows, masks nor edits.
INPUTS: dict[str, tuple[str, tuple[Dim, ...]]] = {
    "live": ("int32", (8,)),
    "tokens": ("int32", ("tokens",)),
    "positions": ("int32", ("tokens",)),
    "kv_slots": ("int32", ("tokens",)),
    "rope_variant": ("int32", ("tokens",)),
    "seq_start": ("int32", ("seqs+1",)),
    "seq_len": ("int32", ("seqs",)),
    "pages": ("int32", ("seqs", "pages")),
    "row_token": ("int32", ("seqs",)),
    "row_slot": ("int32", ("seqs",)),
    "row_target": ("int32", ("seqs",)),
    "row_flags": ("int32", ("seqs",)),
    "row_top": ("int32", ("seqs",)),
    "row_mask": ("int32", ("seqs",)),
    "top_k": ("int32", ("seqs",)),
    "temperature": ("float32", ("seqs",)),
    "top_p": ("float32", ("seqs",)),
    "min_p": ("float32", ("seqs",)),
    "frequency": ("float32", ("seqs",)),
    "presence": ("float32", ("seqs",)),
    "repetition": ("float32", ("seqs",)),
    "seed": ("int64", ("seqs",)),
}
OUTPUTS: dict[str, tuple[str, tuple[Dim, ...]]] = {
    "token": ("int32", ("seqs",)),
    "logprob": ("float32", ("seqs",)),
    "top_ids": ("int32", ("seqs", 20)),
    "top_logprobs": ("float32", ("seqs", 20)),
    "embedding": ("float32", ("seqs", "dim")),
    "status": ("int32", ("seqs",)),
}
SAMPLED = ("token", "logprob", "top_ids", "top_logprobs", "status")
POOLED = ("embedding", "status")
SAMPLE_INPUTS = (
    "row_token",
    "row_slot",
    "row_target",
    "row_flags",
    "row_top",
    "row_mask",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "frequency",
    "presence",
    "repetition",
    "seed",
    "positions",
)
ROW_INPUTS = frozenset(SAMPLE_INPUTS) - {"positions"}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What a step is built for besides the model: sizes of the token state and of a KV page, and
    the longest sequence that is served."""

    slots: int
    edits: int
    page_size: int
    kv_dtype: str
    context: int


def build(spec: ModelSpec, shape: StepShape) -> Program:
    """embed, the layers; then the head on the wanted rows, the state edits and the sampler, or the
    pooling of each sequence."""
    step = _Step(spec, shape)
    h = step.embed()
    for index in range(len(spec.layers)):
        h = step.layer(index, h)
    if spec.final_norm is not None:
        h = step.norm(h, spec.final_norm, "final_norm", "final")
    if isinstance(spec.head, PoolSpec):
        step.pool(h, spec.head)
    else:
        step.sample(step.logits(h, spec.head))
    return step.b.build()


def ropes(spec: ModelSpec) -> list[RopeSpec]:
    """The distinct rotary embeddings, in order of first use; `rope.<n>` numbers follow."""
    return list(
        dict.fromkeys(layer.mixer.rope for layer in spec.layers if layer.mixer.rope is not None)
    )


def slopes(spec: ModelSpec) -> list[tuple[float, ...]]:
    """The distinct alibi slopes, likewise for `alibi.<n>`."""
    mixers = (layer.mixer for layer in spec.layers)
    found = (m.alibi for m in mixers if isinstance(m, Attention) and m.alibi is not None)
    return list(dict.fromkeys(found))


def constants(spec: ModelSpec, context: int) -> dict[str, npt.NDArray[np.float32]]:
    """Weights that come from the spec instead of the checkpoint, for sequences up to `context`."""
    tables = {
        f"rope.{n}.inv_freq": frequencies(rope, context).reshape(-1)
        for n, rope in enumerate(ropes(spec))
    }
    return tables | {
        f"alibi.{n}": np.asarray(values, np.float32) for n, values in enumerate(slopes(spec))
    }


def layer_page_bytes(mixer: Attention | Mla, shape: StepShape) -> int:
    """What one layer keeps in one page: keys and values, or latents with their rope keys."""
    if isinstance(mixer, Attention):
        width = 2 * mixer.kv_heads * mixer.head_dim
    elif mixer.form == "plain":
        width = mixer.heads * (mixer.head_dim + mixer.value)
    else:
        width = mixer.latent + mixer.rope.rotary_dim
    size = shape.page_size * width * KV_DTYPES[shape.kv_dtype].itemsize
    return -(-size // PAGE_ALIGN) * PAGE_ALIGN


def page_bytes(spec: ModelSpec, shape: StepShape) -> int:
    return sum(layer_page_bytes(layer.mixer, shape) for layer in spec.layers)


class _Step:
    """The parts of a decoder step; each method adds calls and returns the name of what it
    computed."""

    def __init__(self, spec: ModelSpec, shape: StepShape) -> None:
        if shape.kv_dtype not in KV_DTYPES:
            choices = ", ".join(KV_DTYPES)
            raise CompileError(
                f"kv dtype {shape.kv_dtype!r} is not supported; choose one of {choices}"
            )
        self.spec, self.shape, self.b = spec, shape, Builder()
        self.page_bytes, self.layer_offset = page_bytes(spec, shape), 0
        self.tables: dict[RopeSpec, str] = {}
        sampled = isinstance(spec.head, HeadSpec)
        absent = set() if sampled else set(ROW_INPUTS)
        if length_rule(spec, shape.context) is None:
            absent.add("rope_variant")
        for name, (dtype, dims) in INPUTS.items():
            if name not in absent:
                self.b.value(name, dtype, dims, "input")
        if sampled:
            self.b.value("masks", "int32", ("seqs", -(-spec.vocab // 32)), "input")
            self.b.value("edits", "int32", (shape.edits, 4), "input")
        for name in SAMPLED if sampled else POOLED:
            dtype, dims = OUTPUTS[name]
            sizes = tuple(spec.dim if d == "dim" else d for d in dims)
            self.b.value(name, dtype, sizes, "output")
        self.b.value("last_token", "int32", (shape.slots,), "state")
        if sampled:
            self.b.value("counts", "int32", (shape.slots, spec.vocab), "state")
            self.b.value("bias", "float32", (shape.slots, spec.vocab), "state")
        self.b.value("kv", "uint8", (self.page_bytes,), "state")

    def embed(self) -> str:
        b, table = self.b, self.b.weight("embed", self.spec.vocab, self.spec.dim)
        for n, rope in enumerate(ropes(self.spec)):
            rows = variants(rope, self.shape.context)
            freq = b.weight(f"rope.{n}.inv_freq", rows * rope.rotary_dim // 2)
            out = b.temp(f"rope.{n}.table", "tokens", rope.rotary_dim)
            self.tables[rope] = b.call(
                "rope_table",
                {
                    "live": "live",
                    "positions": "positions",
                    "inv_freq": freq,
                    "variant": "rope_variant" if rows > 1 else None,
                },
                out,
                scale=rope.scale,
                variants=rows,
            )
        ins = {"live": "live", "tokens": "tokens", "last_token": "last_token", "table": table}
        h = b.call("embed", ins, b.temp("h", "tokens", self.spec.dim), scale=self.spec.embed_scale)
        if (p := self.spec.positions) is None:
            return h
        h = b.call(
            "embed_positions",
            {
                "live": "live",
                "x": h,
                "positions": "positions",
                "table": b.weight("position_table", p.rows, self.spec.dim),
                "types": b.weight("token_types", p.types, self.spec.dim),
            },
            b.temp("h_placed", "tokens", self.spec.dim),
            offset=p.offset,
        )
        return self.norm(h, p.norm, "embed_norm", "h_normed")

    def norm(self, x: str, norm: NormSpec, weight: str, out: str) -> str:
        """Over the whole row."""
        dims = self.b.values[x].dims
        width = dims[-1]
        ins: dict[str, str | None] = {"live": "live", "x": x, "w": self.b.weight(weight, width)}
        if isinstance(norm, RmsNorm):
            return self.b.call("rms_norm", ins, self.b.temp(out, *dims), eps=norm.eps)
        ins["bias"] = self.b.weight(f"{weight}_bias", width) if norm.bias else None
        return self.b.call("layer_norm", ins, self.b.temp(out, *dims), eps=norm.eps)

    def linear(
        self,
        x: str,
        weight: str,
        width: int,
        out: str,
        bias: bool = False,
        live_index: int = 0,
        scale: float = 1.0,
        softcap: float | None = None,
        matrix: str | None = None,
    ) -> str:
        """`matrix`: the name of the matrix where it is not the weight's own (a tied head)."""
        rows, k = self.b.values[x].dims
        ins = {
            "live": "live",
            "x": x,
            "w": self.b.weight(matrix or weight, width, k),
            "bias": self.b.weight(f"{weight}_bias", width) if bias else None,
        }
        return self.b.call(
            "linear",
            ins,
            self.b.temp(out, rows, width),
            eps=0.0,
            act="",
            live_index=live_index,
            scale=scale,
            softcap=softcap or 0.0,
            x_format="",
        )

    def add(self, a: str, b: str, out: str) -> str:
        return self.b.call(
            "add", {"live": "live", "a": a, "b": b}, self.b.temp(out, "tokens", self.spec.dim)
        )

    def layer(self, index: int, h: str) -> str:
        layer, name, t = self.spec.layers[index], f"layers.{index}", f"{index}"
        norm = layer.norm
        if layer.placement == "post":
            h = self.add(h, self.mixer(index, h), f"{t}.h")
            h = self.norm(h, norm, f"{name}.attn_norm", f"{t}.h_normed")
            h = self.add(h, self.ffn(index, h), f"{t}.out")
            return self.norm(h, norm, f"{name}.ffn_norm", f"{t}.out_normed")
        n = self.norm(h, norm, f"{name}.attn_norm", f"{t}.attn_in")
        a = self.mixer(index, n)
        if layer.placement == "parallel":
            return self.add(self.add(h, a, f"{t}.h"), self.ffn(index, n), f"{t}.out")
        if layer.placement == "sandwich":
            a = self.norm(a, norm, f"{name}.attn_post_norm", f"{t}.attn_normed")
        h = self.add(h, a, f"{t}.h")
        n = self.norm(h, norm, f"{name}.ffn_norm", f"{t}.ffn_in")
        f = self.ffn(index, n)
        if layer.placement == "sandwich":
            f = self.norm(f, norm, f"{name}.ffn_post_norm", f"{t}.ffn_normed")
        return self.add(h, f, f"{t}.out")

    def mixer(self, index: int, x: str) -> str:
        """What attention adds to the residual stream."""
        layer, name, t = self.spec.layers[index], f"layers.{index}", f"{index}"
        m = layer.mixer
        if isinstance(m, Attention):
            a, bias = self.attention(index, m, x), "o" in m.biases
        else:
            part = self.expanded if m.form == "plain" else self.absorbed
            a, bias = part(index, m, x), m.bias
        return self.linear(
            a, f"{name}.o", self.spec.dim, f"{t}.o", bias, scale=layer.residual_scale
        )

    def page(self, mixer: Attention | Mla) -> dict[str, Any]:
        """Where the next layer's part of a page lies."""
        offset = self.layer_offset
        self.layer_offset += layer_page_bytes(mixer, self.shape)
        return {
            "page_size": self.shape.page_size,
            "layer_offset": offset,
            "page_bytes": self.page_bytes,
            "kv_dtype": self.shape.kv_dtype,
        }

    def latent_query(self, index: int, m: Mla, x: str) -> str:
        """Queries of latent attention, not yet rotated."""
        name, t, width = f"layers.{index}", f"{index}", m.heads * m.head_dim
        if m.q_latent is None:
            return self.linear(x, f"{name}.q", width, f"{t}.q")
        x = self.linear(x, f"{name}.q_a", m.q_latent, f"{t}.q_a", m.bias)
        x = self.norm(x, m.norm, f"{name}.q_a_norm", f"{t}.q_latent")
        return self.linear(x, f"{name}.q_b", width, f"{t}.q")

    def expanded(self, index: int, m: Mla, x: str) -> str:
        """Latent attention in its plain form: every head's own keys and values, made from the
        latent, with the rotary key behind each head's own dims."""
        name, t, rotary = f"layers.{index}", f"{index}", m.rope.rotary_dim
        q = self.rope(self.latent_query(index, m, x), m.heads, m.rope, start=m.nope)
        c = self.linear(x, f"{name}.kv_a", m.latent, f"{t}.kv_a", m.bias)
        c = self.norm(c, m.norm, f"{name}.kv_a_norm", f"{t}.kv_latent")
        k_rope = self.linear(x, f"{name}.k_rope", rotary, f"{t}.k_rope", m.bias)
        up = self.linear(c, f"{name}.kv_b", m.heads * (m.nope + m.value), f"{t}.kv")
        sizes = {"kv_heads": m.heads, "head_dim": m.head_dim, "v_head_dim": m.value}
        page = sizes | self.page(m)
        self.b.call(
            "kv_write",
            {
                "live": "live",
                "k": up,
                "v": None,
                "k_shared": self.rope(k_rope, 1, m.rope),
                "kv_slots": "kv_slots",
                "kv": "kv",
            },
            **page,
        )
        every_head = Attention(
            heads=m.heads, kv_heads=m.heads, head_dim=m.head_dim, rope=m.rope, scale=m.scale
        )
        return self.attend(index, every_head, q, page)

    def absorbed(self, index: int, m: Mla, x: str) -> str:
        """Queries go into the latent space, one key and value per token for all heads."""
        name, t = f"layers.{index}", f"{index}"
        rotary, table = m.rope.rotary_dim, self.tables[m.rope]
        q = self.latent_query(index, m, x)
        kv = self.linear(x, f"{name}.kv_a", m.latent + rotary, f"{t}.kv", m.bias)
        page = {"latent": m.latent, "rotary": rotary, **self.page(m)}
        turned: dict[str, Any] = {"interleaved": m.rope.interleaved}
        self.b.call(
            "mla_kv_write",
            {
                "live": "live",
                "x": kv,
                "norm": self.b.weight(f"{name}.kv_a_norm", m.latent),
                "table": table,
                "kv_slots": "kv_slots",
                "kv": "kv",
            },
            eps=m.norm.eps,
            **turned,
            **page,
        )
        up = self.b.weight(f"{name}.k_up", m.heads, m.latent, m.nope)
        q = self.b.call(
            "head_linear",
            {"live": "live", "x": q, "w": up, "table": table},
            self.b.temp(f"{t}.q_absorbed", "tokens", m.heads * (m.latent + rotary)),
            heads=m.heads,
            **turned,
        )
        a = self.b.call(
            "mla_attention",
            {
                "live": "live",
                "q": q,
                "kv": "kv",
                **{n: n for n in ("seq_start", "seq_len", "pages")},
            },
            self.b.temp(f"{t}.attn_latent", "tokens", m.heads * m.latent),
            heads=m.heads,
            scale=m.scale,
            **page,
        )
        up = self.b.weight(f"{name}.v_up", m.heads, m.value, m.latent)
        return self.b.call(
            "head_linear",
            {"live": "live", "x": a, "w": up},
            self.b.temp(f"{t}.attn", "tokens", m.heads * m.value),
            heads=m.heads,
            **turned,
        )

    def attention(self, index: int, m: Attention, x: str) -> str:
        name, t = f"layers.{index}", f"{index}"
        q, k, v = (
            self.linear(x, f"{name}.{part}", heads * m.head_dim, f"{t}.{part}", part in m.biases)
            for part, heads in (("q", m.heads), ("k", m.kv_heads), ("v", m.kv_heads))
        )
        q = self.rotate(q, m.heads, f"{name}.q_norm", m)
        k = self.rotate(k, m.kv_heads, f"{name}.k_norm", m)
        v = self.clip(v, m)
        sizes = {"kv_heads": m.kv_heads, "head_dim": m.head_dim, "v_head_dim": m.head_dim}
        page = sizes | self.page(m)
        self.b.call(
            "kv_write", {"live": "live", "k": k, "v": v, "kv_slots": "kv_slots", "kv": "kv"}, **page
        )
        return self.attend(index, m, q, page)

    def attend(self, index: int, m: Attention, q: str, page: dict[str, Any]) -> str:
        """Of rotated queries, over the keys and values of `page`."""
        ins: dict[str, str | None] = {
            "live": "live",
            "q": q,
            "kv": "kv",
            "seq_start": "seq_start",
            "seq_len": "seq_len",
            "pages": "pages",
            "sinks": self.b.weight(f"layers.{index}.sinks", m.heads) if m.sinks else None,
            "alibi": None,
        }
        if m.alibi is not None:
            ins["alibi"] = self.b.weight(f"alibi.{slopes(self.spec).index(m.alibi)}", m.heads)
        return self.b.call(
            "attention",
            ins,
            self.b.temp(f"{index}.attn", "tokens", m.heads * page["v_head_dim"]),
            heads=m.heads,
            scale=m.scale,
            causal=m.causal,
            window=m.window or 0,
            softcap=m.softcap or 0.0,
            logn=m.logn or 0,
            **page,
        )

    def rotate(self, x: str, heads: int, norm_weight: str, m: Attention) -> str:
        """Norm, clip and rotary embedding of q or k, where the layer has them."""
        dims = self.b.values[x].dims
        if m.qk_norm is not None and m.qk_norm.over == "row":
            x = self.norm(x, m.qk_norm.norm, norm_weight, f"{x}_normed")
        elif m.qk_norm is not None:
            own = heads if m.qk_norm.over == "heads" else 1
            norm = m.qk_norm.norm
            ins = {"live": "live", "x": x, "w": self.b.weight(norm_weight, own * m.head_dim)}
            x = self.b.call(
                "head_norm",
                ins,
                self.b.temp(f"{x}_normed", *dims),
                eps=norm.eps,
                heads=heads,
                centre=not isinstance(norm, RmsNorm),
            )
        x = self.clip(x, m)
        return x if m.rope is None else self.rope(x, heads, m.rope)

    def rope(self, x: str, heads: int, rope: RopeSpec, start: int = 0) -> str:
        """Rotary embedding of every head's dims from `start` on."""
        rows, width = self.b.values[x].dims
        assert isinstance(width, int)
        return self.b.call(
            "rope",
            {"live": "live", "x": x, "table": self.tables[rope]},
            self.b.temp(f"{x}_rotated", rows, width),
            heads=heads,
            head_dim=width // heads,
            start=start,
            interleaved=rope.interleaved,
        )

    def clip(self, x: str, m: Attention) -> str:
        if m.clip is None:
            return x
        out = self.b.temp(f"{x}_clipped", *self.b.values[x].dims)
        return self.b.call("clip", {"live": "live", "x": x}, out, limit=m.clip)

    def ffn(self, index: int, x: str) -> str:
        """What the feed-forward part adds to the residual stream."""
        layer = self.spec.layers[index]
        f, name, t = layer.ffn, f"layers.{index}", f"{index}"
        if isinstance(f, MoeFfn):
            return self.experts(index, f, x)
        if isinstance(f, PlainFfn):
            up = self.linear(x, f"{name}.up", f.width, f"{t}.up", f.bias)
            out = self.b.temp(f"{t}.act", "tokens", f.width)
            act = self.b.call("activation", {"live": "live", "x": up}, out, act=f.act)
        else:
            act = self.gated(index, x, "", f.width, f.act, f.bias)
        return self.linear(
            act, f"{name}.down", self.spec.dim, f"{t}.down", f.bias, scale=layer.residual_scale
        )

    def experts(self, index: int, f: MoeFfn, x: str) -> str:
        """Every token through its experts, and through the shared ones. The layer's residual scale
        is part of the routing weights."""
        b, layer, name, t = self.b, self.spec.layers[index], f"layers.{index}", f"{index}"
        r, k, dim = f.router, f.top_k, self.spec.dim
        logits = self.linear(x, f"{name}.router", f.experts, f"{t}.router", r.bias)
        correction = b.weight(f"{name}.router_correction", f.experts) if r.correction else None
        ids = b.value(f"{t}.ids", "int32", ("tokens", k), "temp")
        weights = b.temp(f"{t}.weights", "tokens", k)
        b.call(
            "route",
            {"live": "live", "logits": logits, "bias": correction},
            {"ids": ids, "weights": weights},
            k=k,
            score=r.score,
            groups=r.groups,
            kept_groups=r.kept_groups,
            group_best=r.group_best,
            renormalise=r.renormalise,
            scale=r.scale * layer.residual_scale,
        )
        places = {
            "order": b.value(f"{t}.order", "int32", ("tokens", k), "temp"),
            "starts": b.value(f"{t}.starts", "int32", (f.experts + 1,), "temp"),
        }
        b.call("expert_order", {"live": "live", "ids": ids}, places, experts=f.experts)

        def grouped(op: str, x: str, weight: str, rows: int, width: int, **attrs: str) -> str:
            own = f"{name}.experts_{weight}"
            ins = {
                "live": "live",
                "x": x,
                **places,
                "w": b.weight(own, f.experts, rows, self.b.values[x].dims[-1]),
                "bias": b.weight(f"{own}_bias", f.experts * rows) if f.bias else None,
            }
            return b.call(op, ins, b.temp(f"{t}.experts_{weight}", "tokens", k, width), **attrs)

        act = grouped("moe_gate_up", x, "gate_up", 2 * f.width, f.width, act=GATED_ACT[f.act])
        ins: dict[str, str | None] = {
            "live": "live",
            "y": grouped("moe_down", act, "down", dim, dim),
            "weights": weights,
        }
        if f.shared is not None:
            act = self.gated(index, x, "shared_", f.shared.width, f.act)
            ins["shared"] = self.linear(
                act, f"{name}.shared_down", dim, f"{t}.shared_down", scale=layer.residual_scale
            )
            if f.shared.gated:
                ins["gate"] = self.linear(x, f"{name}.shared_router", 1, f"{t}.shared_router")
        return b.call("moe_combine", ins, b.temp(f"{t}.moe", "tokens", dim))

    def gated(
        self, index: int, x: str, prefix: str, width: int, act: str, bias: bool = False
    ) -> str:
        """act(gate x) * up x."""
        name, t = f"layers.{index}.{prefix}", f"{index}.{prefix}"
        up = self.linear(x, f"{name}up", width, f"{t}up", bias)
        gate = self.linear(x, f"{name}gate", width, f"{t}gate", bias)
        ins = {"live": "live", "gate": gate, "up": up}
        return self.b.call(
            "gated", ins, self.b.temp(f"{t}act", "tokens", width), act=GATED_ACT[act]
        )

    def logits(self, h: str, head: HeadSpec) -> str:
        rows = self.b.call(
            "gather",
            {"live": "live", "x": h, "rows": "row_token"},
            self.b.temp("rows", "seqs", self.spec.dim),
        )
        return self.linear(
            rows,
            "head",
            self.spec.vocab,
            "logits",
            head.bias,
            matrix="embed" if head.tied else None,
            live_index=2,
            scale=head.scale,
            softcap=head.softcap,
        )

    def sample(self, logits: str) -> None:
        b = self.b
        b.call("edit", {"live": "live", "edits": "edits", "counts": "counts", "bias": "bias"})
        ins = {"live": "live", "logits": logits, **{name: name for name in SAMPLE_INPUTS}}
        ins |= {n: n for n in ("masks", "counts", "bias", "last_token")}
        b.call("sample", ins, {name: name for name in SAMPLED}, vocab=self.spec.vocab)

    def pool(self, h: str, head: PoolSpec) -> None:
        self.b.call(
            "pool",
            {"live": "live", "x": h, "seq_start": "seq_start"},
            {name: name for name in POOLED},
            pooling=head.pooling,
            normalise=head.normalise,
        )
