"""Multi-head latent attention (DeepSeek-V2) in its absorbed form: a page holds per token one
normalised latent and one rotated key that all heads share, and queries are brought into the latent
space before they meet them.

T tokens, H heads, C latent width, R rotary width, X = non-rotary width of a query head, V width
of a value head. Per head h, with W_k [C, X] and W_v [V, C] the two halves of the up-projection:
q~ = (W_k q_nope, rope(q_rope)), s = q~ . (c, k_rope) * scale, out = W_v (sum of softmax(s) c). The
plain form, k = (W_k^T c, k_rope) and v = W_v c per head, is made of the ordinary ops of attention
(`compiler.model`). A compile chooses one: a choice by length would make a row's result depend on
the chunk it is computed in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.op import Arg, Cost, Op, Sample, register
from kernels.ops.attention import KV_ARG, SEQ_ARGS
from kernels.ops.embed import LIVE, live_count
from kernels.ops.kv import LATENT_ATTRS, KvState, layer_bytes, stored
from kernels.ops.norm import normalized
from kernels.ops.rope import KV_SLOTS, rotated
from kernels.ops.samples import (
    EMPTY,
    LONG_DECODE,
    MIXED,
    ONE_TOKEN,
    Ragged,
    floats,
    generator,
    live,
)


def head_linear_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    """Every head's own matrix: head h of x is K inputs of w[h], then (with a table) R dims that
    are rotated and follow the N outputs unchanged otherwise."""
    n, heads = live_count(args, 0), attrs["heads"]
    w_HNK = args["w"].float()
    x_THI = args["x"][:n].unflatten(1, (heads, -1))
    inputs = w_HNK.shape[2]
    y = torch.einsum("thk,hnk->thn", x_THI[..., :inputs], w_HNK)
    if args.get("table") is not None:
        rest = rotated(x_THI[..., inputs:], args["table"][:n], attrs["interleaved"])
        y = torch.cat((y, rest), dim=-1)
    out = torch.zeros(len(args["x"]), heads * y.shape[2])
    out[:n] = y.flatten(1)
    return {"out": out}


def _head_linear_cost(shapes: dict[str, tuple[int, ...]], attrs: dict[str, Any]) -> Cost:
    tokens, width = shapes["x"]
    heads, n, k = shapes["w"]
    return Cost(
        read=tokens * width * 4,
        written=tokens * shapes["out"][1] * 4,
        flops=2 * tokens * heads * n * k,
    )


def _head_linear_samples() -> list[Sample]:
    out = []
    for seed, label, used, tokens, heads, n, k, rotary, interleaved in (
        (100, "query", 5, 8, 3, 48, 32, 16, True),
        (101, "query halves", 1, 1, 2, 64, 64, 8, False),
        (102, "value", 20, 24, 4, 32, 96, 0, False),
        (103, "odd outputs", 9, 9, 2, 20, 64, 0, False),
        (104, "empty", 0, 2, 2, 16, 32, 8, True),
    ):
        g = generator(seed)
        args: dict[str, Any] = {
            "live": live(used),
            "x": floats(g, tokens, heads * (k + rotary), used=used),
            "w": floats(g, heads, n, k, scale=k**-0.5),
        }
        if rotary:
            args["table"] = floats(g, tokens, rotary, used=used)
        attrs = {"heads": heads, "interleaved": interleaved}
        out.append(Sample(label=label, args=args, attrs=attrs))
    return out


HEAD_LINEAR = register(
    Op(
        name="head_linear",
        args=(
            LIVE,
            Arg(name="x", role="input", dims=("tokens", "H*(K+R)"), dtypes=("float",)),
            Arg(name="w", role="weight", dims=("H", "N", "K"), dtypes=("float",)),
            Arg(
                name="table", role="input", dims=("tokens", "R"), dtypes=("float32",), optional=True
            ),
            Arg(name="out", role="output", dims=("tokens", "H*(N+R)"), dtypes=("float",)),
        ),
        attrs={"heads": int, "interleaved": bool},
        reference=head_linear_reference,
        cost=_head_linear_cost,
        samples=_head_linear_samples,
        tolerance={"float32": 5e-5, "bfloat16": 2e-2},
    )
)


def mla_kv_write_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    """kv is (latent C, rope key R) of every token: the latent is normalised, the key rotated."""
    n, latent = live_count(args, 0), attrs["latent"]
    layer = args["kv"].layer(attrs)
    slots = args["kv_slots"][:n].long()
    x = args["x"][:n]
    c = normalized(x[:, :latent], args["norm"], attrs["eps"])
    key = rotated(x[:, None, latent:], args["table"][:n], attrs["interleaved"])[:, 0]
    page, offset = slots // attrs["page_size"], slots % attrs["page_size"]
    layer[page, offset] = stored(torch.cat((c, key), dim=1), attrs["kv_dtype"])
    return {}


def _attrs(latent: int, rotary: int, dtype: str) -> dict[str, Any]:
    """Attributes of the middle one of three layers."""
    attrs: dict[str, Any] = {
        "latent": latent,
        "rotary": rotary,
        "page_size": 16,
        "kv_dtype": dtype,
    }
    layer = layer_bytes(attrs)
    return {**attrs, "layer_offset": layer, "page_bytes": 3 * layer}


def _mla_kv_write_samples() -> list[Sample]:
    out = []
    for seed, label, ragged, latent, rotary, interleaved, dtype in (
        (110, "mixed", MIXED, 32, 16, True, "float32"),
        (111, "bf16", MIXED, 64, 8, False, "bfloat16"),
        (112, "one", ONE_TOKEN, 512, 64, True, "float32"),
        (113, "e4m3", MIXED, 48, 16, True, "fp8_e4m3"),
        (114, "e5m2", ONE_TOKEN, 64, 8, False, "fp8_e5m2"),
    ):
        g = generator(seed)
        steps = ragged.arrays(ragged.page_tables(g, 16), 16)
        n = int(steps["live"][0])
        args = {
            "live": steps["live"],
            "x": floats(g, ragged.tokens, latent + rotary, used=n),
            "norm": floats(g, latent),
            "table": floats(g, ragged.tokens, rotary, used=n),
            "kv_slots": steps["kv_slots"],
            "kv": KvState(ragged.pool_pages),
        }
        attrs = {**_attrs(latent, rotary, dtype), "eps": 1e-6, "interleaved": interleaved}
        out.append(Sample(label=label, args=args, attrs=attrs))
    return out


MLA_KV_WRITE = register(
    Op(
        name="mla_kv_write",
        args=(
            LIVE,
            Arg(name="x", role="input", dims=("tokens", "C+R"), dtypes=("float",)),
            Arg(name="norm", role="weight", dims=("C",), dtypes=("float",)),
            Arg(name="table", role="input", dims=("tokens", "R"), dtypes=("float32",)),
            KV_SLOTS,
            KV_ARG,
        ),
        attrs={"eps": float, "interleaved": bool, **LATENT_ATTRS},
        reference=mla_kv_write_reference,
        cost=lambda shapes, attrs: Cost(
            read=shapes["x"][0] * shapes["x"][1] * 4,
            written=shapes["x"][0] * layer_bytes(attrs) // attrs["page_size"],
            flops=6 * shapes["x"][0] * shapes["x"][1],
        ),
        samples=_mla_kv_write_samples,
    )
)


def mla_attention_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    """softmax(q~ . (c, k_rope) * scale) over the latents, per head; causal."""
    q, heads, latent = args["q"], attrs["heads"], attrs["latent"]
    layer = args["kv"].layer(attrs)
    out = torch.zeros(len(q), heads * latent)
    for s in range(live_count(args, 1)):
        first, last = (int(x) for x in args["seq_start"][s : s + 2])
        length = int(args["seq_len"][s])
        pages = args["pages"][s, : -(-length // attrs["page_size"])].long()
        keys = layer[pages].flatten(0, 1)[:length].float()
        q_HTE = q[first:last].unflatten(1, (heads, -1)).transpose(0, 1)
        position = torch.arange(length - (last - first), length)[:, None]
        visible = torch.arange(length)[None, :] <= position
        scores = (q_HTE @ keys.T) * attrs["scale"]
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        out[first:last] = (weights @ keys[:, :latent]).transpose(0, 1).flatten(1)
    return {"out": out}


def _mla_attention_cost(shapes: dict[str, tuple[int, ...]], attrs: dict[str, Any]) -> Cost:
    """An upper bound: every sequence at the bucket's full length, every token one query of it."""
    tokens, width = shapes["q"]
    seqs, pages = shapes["pages"]
    keys, out = pages * attrs["page_size"], attrs["heads"] * attrs["latent"]
    return Cost(
        read=min(tokens, seqs) * pages * layer_bytes(attrs) + tokens * width * 4,
        written=tokens * out * 4,
        flops=2 * tokens * keys * (width + out),
    )


def mla_attention_sample(
    seed: int,
    label: str,
    ragged: Ragged,
    *,
    heads: int,
    latent: int,
    rotary: int,
    dtype: str = "float32",
) -> Sample:
    g = generator(seed)
    tables = ragged.page_tables(g, 16)
    steps = ragged.arrays(tables, 16)
    attrs = {
        **_attrs(latent, rotary, dtype),
        "heads": heads,
        "scale": (latent + rotary) ** -0.5 * 1.5,
    }
    kv = KvState(ragged.pool_pages)
    layer = kv.layer(attrs)
    for (before, new), table in zip(ragged.lengths, tables, strict=True):
        for p in range(before + new):
            layer[table[p // 16], p % 16] = stored(floats(g, latent + rotary), dtype)
    args = {
        "live": steps["live"],
        "q": floats(g, ragged.tokens, heads * (latent + rotary), used=int(steps["live"][0])),
        "kv": kv,
        **{name: steps[name] for name in ("seq_start", "seq_len", "pages")},
    }
    return Sample(label=label, args=args, attrs=attrs)


def _mla_attention_samples() -> list[Sample]:
    return [
        mla_attention_sample(120, "few heads", MIXED, heads=3, latent=32, rotary=8),
        mla_attention_sample(121, "many heads", MIXED, heads=40, latent=48, rotary=16),
        mla_attention_sample(122, "bf16", MIXED, heads=16, latent=64, rotary=16, dtype="bfloat16"),
        mla_attention_sample(123, "long decode", LONG_DECODE, heads=16, latent=512, rotary=64),
        mla_attention_sample(
            124, "long bf16", LONG_DECODE, heads=8, latent=256, rotary=32, dtype="bfloat16"
        ),
        mla_attention_sample(127, "e4m3", MIXED, heads=5, latent=48, rotary=16, dtype="fp8_e4m3"),
        mla_attention_sample(
            128, "e5m2", LONG_DECODE, heads=16, latent=64, rotary=32, dtype="fp8_e5m2"
        ),
        mla_attention_sample(125, "one", ONE_TOKEN, heads=1, latent=16, rotary=2),
        mla_attention_sample(126, "empty", EMPTY, heads=2, latent=16, rotary=8),
    ]


MLA_ATTENTION = register(
    Op(
        name="mla_attention",
        args=(
            LIVE,
            Arg(name="q", role="input", dims=("tokens", "H*(C+R)"), dtypes=("float",)),
            KV_ARG,
            *SEQ_ARGS,
            Arg(name="out", role="output", dims=("tokens", "H*C"), dtypes=("float",)),
        ),
        attrs={"heads": int, "scale": float, **LATENT_ATTRS},
        reference=mla_attention_reference,
        cost=_mla_attention_cost,
        samples=_mla_attention_samples,
    )
)
