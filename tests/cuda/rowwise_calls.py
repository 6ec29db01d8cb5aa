"""Calls of the row-wise ops at the sizes of served models, for compile-only tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from kernels.kernel import CallShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    head_norms: bool = False


MODELS = {
    "llama3-8b": Model(width=4096, ffn=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256),
    "llama3.2-1b": Model(width=2048, ffn=8192, heads=32, kv_heads=8, head_dim=64, vocab=128256),
    "qwen3-0.6b": Model(
        width=1024, ffn=3072, heads=16, kv_heads=8, head_dim=128, vocab=151936, head_norms=True
    ),
}
# Kind of a bucket, its tokens and its sequences.
BUCKETS = (
    ("decode", 1, 1),
    ("decode", 8, 8),
    ("decode", 64, 64),
    ("decode", 256, 256),
    ("mixed", 512, 64),
    ("mixed", 4096, 256),
)
SLOTS = 256
CONTEXT = 8192


def calls(model: Model, kind: str, tokens: int, seqs: int) -> Iterator[CallShape]:
    m = model
    bf16, f32, i32 = "bfloat16", "float32", "int32"
    layer = 2 * m.kv_heads * 16 * m.head_dim * 2
    pages: dict[str, Any] = {
        "kv_heads": m.kv_heads,
        "head_dim": m.head_dim,
        "v_head_dim": m.head_dim,
        "page_size": 16,
        "kv_dtype": bf16,
        "layer_offset": 3 * layer,
        "page_bytes": 16 * layer,
    }
    x, ffn = ((tokens, m.width), bf16), ((tokens, m.ffn), bf16)
    q = ((tokens, m.heads * m.head_dim), bf16)
    kv = ((tokens, m.kv_heads * m.head_dim), bf16)
    table = ((tokens, m.head_dim), f32)
    weight, head_weight = ((m.width,), f32), ((m.head_dim,), f32)
    per_token, per_row = ((tokens,), i32), ((seqs,), i32)
    pool = ((pages["page_bytes"],), "uint8")
    state = {"counts": ((SLOTS, m.vocab), i32), "bias": ((SLOTS, m.vocab), f32)}
    last = {"last_token": ((SLOTS,), i32)}

    def call(
        op: str,
        attrs: dict[str, Any],
        args: dict[str, tuple[tuple[int, ...], str]],
        formats: dict[str, str] | None = None,
    ) -> CallShape:
        args = {"live": ((8,), i32), **args}
        return CallShape(
            op=op,
            shapes={name: shape for name, (shape, _) in args.items()},
            dtypes={name: dtype for name, (_, dtype) in args.items()},
            formats=formats or {},
            attrs=attrs,
            kind=kind,
        )

    embed = {"tokens": per_token, **last, "table": ((m.vocab, m.width), bf16), "out": x}
    for stored in (bf16, "int8g128", "int4g128"):
        yield call("embed", {"scale": 1.0}, embed, {"table": stored})
    amax = {"out_amax": ((tokens, m.width // 64), f32), "amax_norm": ((m.width,), f32)}
    yield call("embed", {"scale": 1.0}, embed | amax, {"table": bf16, "amax_norm": f32})
    learned = {"x": x, "positions": per_token, "table": ((512, m.width), bf16)}
    learned |= {"types": ((2, m.width), bf16), "out": x}
    formats = {"table": bf16, "types": bf16}
    yield call("embed_positions", {"offset": 2}, learned, formats)
    yield call("gather", {}, {"x": x, "rows": per_row, "out": ((seqs, m.width), bf16)})
    yield call("add", {}, {"a": x, "b": x, "out": x})
    yield call("clip", {"limit": 8.0}, {"x": x, "out": x})
    yield call("gated", {"act": "swiglu"}, {"gate": ffn, "up": ffn, "out": ffn})
    yield call("activation", {"act": "gelu"}, {"x": ffn, "out": ffn})
    yield call("rms_norm", {"eps": 1e-5}, {"x": x, "w": weight, "out": x})
    yield call("rms_norm", {"eps": 1e-5}, {"x": x, "w": weight, "residual": x, "out": x})
    yield call("layer_norm", {"eps": 1e-5}, {"x": x, "w": weight, "bias": weight, "out": x})
    heads = {"eps": 1e-6, "heads": m.heads, "centre": False}
    yield call("head_norm", heads, {"x": q, "w": head_weight, "out": q})
    angles = {"positions": per_token, "inv_freq": ((m.head_dim // 2,), f32), "out": table}
    yield call("rope_table", {"scale": 1.0, "variants": 1}, angles)
    for interleaved in (False, True):
        turn = {"heads": m.heads, "head_dim": m.head_dim, "interleaved": interleaved}
        yield call("rope", {"start": 0, **turn}, {"x": q, "table": table, "out": q})
        merged = {"qkv": ((tokens, (m.heads + 2 * m.kv_heads) * m.head_dim), bf16)}
        merged |= {"table": table, "kv_slots": per_token, "kv": pool, "q": q}
        if m.head_norms:
            merged |= {"q_norm": head_weight, "k_norm": head_weight}
        attrs = {"eps": 1e-6, "centre": False, "clip": 0.0, **turn, **pages}
        yield call("rope_kv", attrs, merged)
    yield call("kv_write", pages, {"k": kv, "v": kv, "kv_slots": per_token, "kv": pool})
    # DeepSeek-V2-Lite in the plain form.
    up = ((tokens, 16 * (128 + 128)), bf16)
    expanded = {**pages, "kv_heads": 16, "head_dim": 192, "v_head_dim": 128}
    expanded |= {"layer_offset": 0, "page_bytes": 16 * 16 * 320 * 2}
    shared = {"k": up, "k_shared": ((tokens, 64), bf16)}
    yield call("kv_write", expanded, shared | {"kv_slots": per_token, "kv": pool})
    turn = {"heads": 16, "head_dim": 192, "start": 128, "interleaved": True}
    q = ((tokens, 16 * 192), bf16)
    yield call("rope", turn, {"x": q, "table": ((tokens, 64), f32), "out": q})
    latent = {"latent": 512, "rotary": 64, "page_size": 16, "kv_dtype": bf16}
    latent |= {"layer_offset": 0, "page_bytes": 16 * 576 * 2, "eps": 1e-6, "interleaved": True}
    args = {"x": ((tokens, 576), bf16), "norm": ((512,), f32), "table": ((tokens, 64), f32)}
    yield call("mla_kv_write", latent, args | {"kv_slots": per_token, "kv": pool})
    embedding = {"embedding": ((seqs, m.width), f32), "status": per_row}
    pooled = {"x": x, "seq_start": ((seqs + 1,), i32), **embedding}
    for pooling in ("last", "mean"):
        yield call("pool", {"pooling": pooling, "normalise": True}, pooled)
    yield call("edit", {}, {"edits": ((CONTEXT, 4), i32), **state})
    rows = ("row_token", "row_slot", "row_target", "row_flags", "row_top", "row_mask", "top_k")
    reals = ("temperature", "top_p", "min_p", "frequency", "presence", "repetition")
    sample = {"logits": ((seqs, m.vocab), f32), "seed": ((seqs,), "int64"), **last, **state}
    sample |= dict.fromkeys((*rows, "token", "status"), per_row)
    sample |= dict.fromkeys((*reals, "logprob"), ((seqs,), f32))
    sample |= {"positions": per_token, "masks": ((seqs, -(-m.vocab // 32)), i32)}
    sample |= {"top_ids": ((seqs, 20), i32), "top_logprobs": ((seqs, 20), f32)}
    yield call("sample", {"vocab": m.vocab}, sample)
