"""A model as a program: `build(spec, …)` writes one decoder step as calls, `constants(spec)`
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
from compiler.families.spec import Attention, GatedFfn, ModelSpec, RopeSpec
from compiler.program import Builder, Dim, Program
from kernels.ops import register  # noqa: F401  (fills OPS)

KV_BYTES = {"float32": 4, "bfloat16": 2}
PAGE_ALIGN = 64

# Every io input and output of a step in upload order, as in runtime.device.base.StepInput and
# StepOutput. `edits` is last: its unused tail is not uploaded.
INPUTS: dict[str, tuple[str, tuple[Dim, ...]]] = {
    "live": ("int32", (8,)),
    "tokens": ("int32", ("tokens",)),
    "positions": ("int32", ("tokens",)),
    "kv_slots": ("int32", ("tokens",)),
    "seq_start": ("int32", ("seqs+1",)),
    "seq_len": ("int32", ("seqs",)),
    "pages": ("int32", ("seqs", "pages")),
    "row_token": ("int32", ("seqs",)),
    "row_slot": ("int32", ("seqs",)),
    "row_target": ("int32", ("seqs",)),
    "row_flags": ("int32", ("seqs",)),
    "row_top": ("int32", ("seqs",)),
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
    "status": ("int32", ("seqs",)),
}
SAMPLE_INPUTS = (
    "row_token",
    "row_slot",
    "row_target",
    "row_flags",
    "row_top",
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


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What a step is built for besides the model: sizes of the token state and of a KV page."""

    slots: int
    edits: int
    page_size: int
    kv_dtype: str


def build(spec: ModelSpec, shape: StepShape) -> Program:
    """embed, the layers, the head on the wanted rows, the state edits, the sampler."""
    step = _Step(spec, shape)
    h = step.embed()
    for index in range(len(spec.layers)):
        h = step.attention(index, h)
        h = step.ffn(index, h)
    step.sample(step.head(h))
    return step.b.build()


def ropes(spec: ModelSpec) -> list[RopeSpec]:
    """The distinct rotary embeddings, in order of first use; `rope.<n>` numbers follow."""
    return list(
        dict.fromkeys(layer.mixer.rope for layer in spec.layers if layer.mixer.rope is not None)
    )


def constants(spec: ModelSpec) -> dict[str, npt.NDArray[np.float32]]:
    """Weights that come from the spec instead of the checkpoint."""
    return {
        f"rope.{n}.inv_freq": np.asarray(rope.inv_freq, np.float32)
        for n, rope in enumerate(ropes(spec))
    }


def layer_page_bytes(mixer: Attention, shape: StepShape) -> int:
    """Keys and values of one layer in one page."""
    size = 2 * mixer.kv_heads * shape.page_size * mixer.head_dim * KV_BYTES[shape.kv_dtype]
    return -(-size // PAGE_ALIGN) * PAGE_ALIGN


def page_bytes(spec: ModelSpec, shape: StepShape) -> int:
    return sum(layer_page_bytes(layer.mixer, shape) for layer in spec.layers)


class _Step:
    """The parts of a decoder step; each method adds calls and returns the name of what it
    computed."""

    def __init__(self, spec: ModelSpec, shape: StepShape) -> None:
        if shape.kv_dtype not in KV_BYTES:
            raise CompileError(
                f"kv dtype {shape.kv_dtype!r} is not supported; choose one of {', '.join(KV_BYTES)}"
            )
        self.spec, self.shape, self.b = spec, shape, Builder()
        self.page_bytes, self.layer_offset = page_bytes(spec, shape), 0
        self.tables: dict[RopeSpec, str] = {}
        for name, (dtype, dims) in INPUTS.items():
            self.b.value(name, dtype, dims, "input")
        self.b.value("edits", "int32", (shape.edits, 4), "input")
        for name, (dtype, dims) in OUTPUTS.items():
            self.b.value(name, dtype, dims, "output")
        self.b.value("last_token", "int32", (shape.slots,), "state")
        self.b.value("counts", "int32", (shape.slots, spec.vocab), "state")
        self.b.value("bias", "float32", (shape.slots, spec.vocab), "state")
        self.b.value("kv", "uint8", (self.page_bytes,), "state")

    def embed(self) -> str:
        b, table = self.b, self.b.weight("embed", self.spec.vocab, self.spec.dim)
        for n, rope in enumerate(ropes(self.spec)):
            freq = b.weight(f"rope.{n}.inv_freq", rope.rotary_dim // 2)
            out = b.temp(f"rope.{n}.table", "tokens", rope.rotary_dim)
            self.tables[rope] = b.call(
                "rope_table",
                {"live": "live", "positions": "positions", "inv_freq": freq},
                out,
                scale=float(rope.scale),
            )
        ins = {"live": "live", "tokens": "tokens", "last_token": "last_token", "table": table}
        return b.call("embed", ins, b.temp("h", "tokens", self.spec.dim), scale=1.0)

    def norm(self, x: str, weight: str, eps: float, out: str) -> str:
        dims = self.b.values[x].dims
        ins = {"live": "live", "x": x, "w": self.b.weight(weight, self.spec.dim)}
        return self.b.call("rms_norm", ins, self.b.temp(out, *dims), eps=eps)

    def linear(
        self, x: str, weight: str, width: int, out: str, bias: bool = False, live_index: int = 0
    ) -> str:
        rows, k = self.b.values[x].dims
        ins = {
            "live": "live",
            "x": x,
            "w": self.b.weight(weight, width, k),
            "bias": self.b.weight(f"{weight}_bias", width) if bias else None,
        }
        return self.b.call(
            "linear", ins, self.b.temp(out, rows, width), eps=0.0, act="", live_index=live_index
        )

    def add(self, a: str, b: str, out: str) -> str:
        return self.b.call(
            "add", {"live": "live", "a": a, "b": b}, self.b.temp(out, "tokens", self.spec.dim)
        )

    def attention(self, index: int, h: str) -> str:
        layer = self.spec.layers[index]
        m, name, t = layer.mixer, f"layers.{index}", f"{index}"
        n = self.norm(h, f"{name}.attn_norm", layer.norm.eps, f"{t}.attn_in")
        q = self.linear(n, f"{name}.q", m.heads * m.head_dim, f"{t}.q", m.qkv_bias)
        k = self.linear(n, f"{name}.k", m.kv_heads * m.head_dim, f"{t}.k", m.qkv_bias)
        v = self.linear(n, f"{name}.v", m.kv_heads * m.head_dim, f"{t}.v", m.qkv_bias)
        q = self.rotate(q, m.heads, f"{name}.q_norm", m)
        k = self.rotate(k, m.kv_heads, f"{name}.k_norm", m)
        page: dict[str, Any] = {
            "kv_heads": m.kv_heads,
            "head_dim": m.head_dim,
            "page_size": self.shape.page_size,
            "layer_offset": self.layer_offset,
            "page_bytes": self.page_bytes,
            "kv_dtype": self.shape.kv_dtype,
        }
        self.layer_offset += layer_page_bytes(m, self.shape)
        self.b.call(
            "kv_write", {"live": "live", "k": k, "v": v, "kv_slots": "kv_slots", "kv": "kv"}, **page
        )
        ins = {
            "live": "live",
            "q": q,
            "kv": "kv",
            "seq_start": "seq_start",
            "seq_len": "seq_len",
            "pages": "pages",
        }
        a = self.b.call(
            "attention",
            ins,
            self.b.temp(f"{t}.attn", "tokens", m.heads * m.head_dim),
            heads=m.heads,
            scale=m.scale,
            window=m.window or 0,
            **page,
        )
        return self.add(
            h, self.linear(a, f"{name}.o", self.spec.dim, f"{t}.o", m.out_bias), f"{t}.h"
        )

    def rotate(self, x: str, heads: int, norm_weight: str, m: Attention) -> str:
        """Per-head norm, then rotary embedding, where the layer has them."""
        dims = self.b.values[x].dims
        if m.head_norm is not None:
            ins = {"live": "live", "x": x, "w": self.b.weight(norm_weight, m.head_dim)}
            x = self.b.call(
                "head_norm",
                ins,
                self.b.temp(f"{x}_normed", *dims),
                eps=m.head_norm.eps,
                heads=heads,
            )
        if m.rope is not None:
            ins = {"live": "live", "x": x, "table": self.tables[m.rope]}
            x = self.b.call(
                "rope",
                ins,
                self.b.temp(f"{x}_rotated", *dims),
                heads=heads,
                head_dim=m.head_dim,
                interleaved=m.rope.interleaved,
            )
        return x

    def ffn(self, index: int, h: str) -> str:
        layer = self.spec.layers[index]
        f, name, t = layer.ffn, f"layers.{index}", f"{index}"
        _check_ffn(f)
        n = self.norm(h, f"{name}.ffn_norm", layer.norm.eps, f"{t}.ffn_in")
        gate = self.linear(n, f"{name}.gate", f.width, f"{t}.gate", f.bias)
        up = self.linear(n, f"{name}.up", f.width, f"{t}.up", f.bias)
        act = self.b.call(
            "swiglu",
            {"live": "live", "gate": gate, "up": up},
            self.b.temp(f"{t}.act", "tokens", f.width),
        )
        return self.add(
            h, self.linear(act, f"{name}.down", self.spec.dim, f"{t}.down", f.bias), f"{t}.out"
        )

    def head(self, h: str) -> str:
        spec = self.spec
        n = self.norm(h, "final_norm", spec.final_norm.eps, "final")
        rows = self.b.call(
            "gather",
            {"live": "live", "x": n, "rows": "row_token"},
            self.b.temp("rows", "seqs", spec.dim),
        )
        return self.linear(
            rows, "embed" if spec.tied_head else "head", spec.vocab, "logits", live_index=2
        )

    def sample(self, logits: str) -> None:
        b = self.b
        b.call("edit", {"live": "live", "edits": "edits", "counts": "counts", "bias": "bias"})
        ins = {"live": "live", "logits": logits, **{name: name for name in SAMPLE_INPUTS}}
        ins |= {"counts": "counts", "bias": "bias", "last_token": "last_token"}
        b.call("sample", ins, {name: name for name in OUTPUTS}, vocab=self.spec.vocab)


def _check_ffn(ffn: GatedFfn) -> None:
    if ffn.act != "silu":
        raise CompileError(
            f"the gated ffn has the activation {ffn.act!r}, only 'silu' is implemented; "
            "choose another model"
        )
