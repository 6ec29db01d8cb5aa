"""Attention over paged keys and values, and the write that fills the pages.

A step is one flat batch: sequence s owns tokens seq_start[s] .. seq_start[s+1], the last of which
sees seq_len[s] keys. T tokens, S sequences, P pages of a sequence, H heads, K KV heads, E head dim
of queries and keys, V of values, R key dims that are the same in every head.
The score of the query at position i for the key at position j, per head h:

    s = q . k * scale * logn(i)          logn(i) = max(1, ln(i + 1) / ln(logn)), 1 when logn is 0
    s = softcap * tanh(s / softcap)      unless softcap is 0
    s = s + alibi[h] * (j - i)           where the call has slopes
    visible: j <= i, and j > i - window unless window is 0; every j where the call is not causal
             (then window is 0, and the step holds the whole sequence)

and the weights are e^s / (sum e^s + e^sinks[h]), the last term where the call has sinks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kernels.op import Arg, Cost, Op, Sample, register
from kernels.ops.amax import out_amax, part_maxima
from kernels.ops.embed import LIVE, live_count
from kernels.ops.kv import KV_ATTRS, KvState, layer_bytes, stored
from kernels.ops.samples import (
    EMPTY,
    LONG_DECODE,
    MIXED,
    ONE_TOKEN,
    WHOLE,
    Ragged,
    floats,
    generator,
)

KV_ARG = Arg(name="kv", role="state", dims=("kv_bytes",), dtypes=("uint8",))
SEQ_ARGS = (
    Arg(name="seq_start", role="input", dims=("seqs+1",), dtypes=("int32",)),
    Arg(name="seq_len", role="input", dims=("seqs",), dtypes=("int32",)),
    Arg(name="pages", role="input", dims=("seqs", "pages"), dtypes=("int32",)),
)


def kv_write_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    """A key is a head's own dims, then those of `k_shared`, where the call has them. Without `v`
    the values of all heads follow the keys of all heads in `k`."""
    n, width = live_count(args, 0), attrs["kv_heads"] * attrs["v_head_dim"]
    slots = args["kv_slots"][:n].long()
    page, offset = slots // attrs["page_size"], slots % attrs["page_size"]
    k, v = args["k"][:n], args.get("v")
    k, v = k.tensor_split([-width], dim=1) if v is None else (k, v[:n])
    k, v = (x.unflatten(1, (attrs["kv_heads"], -1)) for x in (k, v))
    if args.get("k_shared") is not None:
        k = torch.cat((k, args["k_shared"][:n, None].expand(-1, attrs["kv_heads"], -1)), dim=2)
    for layer, new in zip(args["kv"].keys_and_values(attrs), (k, v), strict=True):
        layer[page, :, offset] = stored(new, attrs["kv_dtype"])
    return {}


def _kv_write_cost(shapes: dict[str, tuple[int, ...]], attrs: dict[str, Any]) -> Cost:
    tokens = shapes["k"][0]
    width = sum(shapes[name][1] for name in ("k", "v", "k_shared") if name in shapes)
    return Cost(
        read=tokens * width * 4,
        written=tokens * layer_bytes(attrs) // attrs["page_size"],
        flops=0,
    )


# Of e4m3 and e5m2: ties between neighbours, subnormal ones too, the ends of both ranges, beyond.
HARD: tuple[float, ...] = (
    17.0,
    19.0,
    -1.0625,
    2**-9,
    1.5 * 2**-9,
    2**-10,
    -(2**-17),
    1.5 * 2**-16,
    2**-20,
    0.0,
)
HARD += (447.0, 463.9, -464.0, 480.0, 1e6, 57344.0, 61439.0, -61440.0, 3e38, -math.inf, math.nan)


def _kv_write_samples() -> list[Sample]:
    out = []
    for label, ragged, kv_heads, dim, values, shared, dtype in (
        ("mixed", MIXED, 2, 32, 32, 0, "float32"),
        ("bf16", MIXED, 3, 16, 16, 0, "bfloat16"),
        ("one", ONE_TOKEN, 1, 48, 48, 0, "float32"),
        ("e4m3", MIXED, 2, 48, 48, 0, "fp8_e4m3"),
        ("e5m2", MIXED, 1, 32, 32, 0, "fp8_e5m2"),
        ("shared", MIXED, 3, 48, 32, 16, "float32"),
        ("one array", ONE_TOKEN, 2, 16, 32, 0, "float32"),
        ("one array, shared, bf16", MIXED, 2, 96, 16, 32, "bfloat16"),
        ("one array, shared, e4m3", MIXED, 2, 48, 16, 16, "fp8_e4m3"),
    ):
        g = generator(40)
        steps = ragged.arrays(ragged.page_tables(g, 16), 16)
        n = int(steps["live"][0])
        attrs = _attrs(kv_heads, dim, values, dtype)
        args: dict[str, Any] = {
            "live": steps["live"],
            "k": floats(g, ragged.tokens, kv_heads * (dim - shared), used=n),
            "v": floats(g, ragged.tokens, kv_heads * values, used=n),
            "kv_slots": steps["kv_slots"],
            "kv": KvState(ragged.pool_pages),
        }
        if dtype.startswith("fp8"):
            args["k"].view(-1)[: len(HARD)] = torch.tensor(HARD)
        if label.startswith("one array"):
            args["k"] = torch.cat((args["k"], args.pop("v")), dim=1)
        if shared:
            args["k_shared"] = floats(g, ragged.tokens, shared, used=n)
        out.append(Sample(label=label, args=args, attrs=attrs))
    return out


def _attrs(kv_heads: int, dim: int, values: int, dtype: str) -> dict[str, Any]:
    """Attributes of the middle one of three layers."""
    attrs: dict[str, Any] = {
        "kv_heads": kv_heads,
        "head_dim": dim,
        "v_head_dim": values,
        "page_size": 16,
        "kv_dtype": dtype,
    }
    layer = layer_bytes(attrs)
    return {**attrs, "layer_offset": layer, "page_bytes": 3 * layer}


KV_WRITE = register(
    Op(
        name="kv_write",
        args=(
            LIVE,
            Arg(name="k", role="input", dims=("tokens", "K*(E-R)[+K*V]"), dtypes=("float",)),
            Arg(name="v", role="input", dims=("tokens", "K*V"), dtypes=("float",), optional=True),
            Arg(
                name="k_shared",
                role="input",
                dims=("tokens", "R"),
                dtypes=("float",),
                optional=True,
            ),
            Arg(name="kv_slots", role="input", dims=("tokens",), dtypes=("int32",)),
            KV_ARG,
        ),
        attrs=dict(KV_ATTRS),
        reference=kv_write_reference,
        cost=_kv_write_cost,
        samples=_kv_write_samples,
    )
)


def attention_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    q = args["q"]
    layers = args["kv"].keys_and_values(attrs)
    group = attrs["heads"] // attrs["kv_heads"]
    out = torch.zeros(len(q), attrs["heads"] * attrs["v_head_dim"])
    for s in range(live_count(args, 1)):
        first, last, length = (
            int(args["seq_start"][s]),
            int(args["seq_start"][s + 1]),
            int(args["seq_len"][s]),
        )
        pages = args["pages"][s, : -(-length // attrs["page_size"])].long()
        # [pages, K, page_size, E] -> [K, keys, E], one copy per query head
        k, v = (
            layer[pages]
            .transpose(0, 1)
            .flatten(1, 2)[:, :length]
            .float()
            .repeat_interleave(group, 0)
            for layer in layers
        )
        q_HTE = q[first:last].unflatten(1, (attrs["heads"], -1)).transpose(0, 1)
        position = torch.arange(length - (last - first), length)[:, None]
        key = torch.arange(length)[None, :]
        visible = key <= position if attrs["causal"] else torch.ones_like(key <= position)
        if attrs["window"]:
            visible &= key > position - attrs["window"]
        scores = (q_HTE @ k.transpose(1, 2)) * attrs["scale"]
        if attrs["logn"]:
            scores = scores * ((position + 1).log() / math.log(attrs["logn"])).clamp(min=1)
        if cap := attrs["softcap"]:
            scores = cap * torch.tanh(scores / cap)
        if args.get("alibi") is not None:
            scores = scores + args["alibi"][:, None, None] * (key - position)
        scores = scores.masked_fill(~visible, float("-inf"))
        if args.get("sinks") is not None:  # one more key per head, without a value
            sink = args["sinks"][:, None, None].expand(-1, last - first, 1)
            scores = torch.cat((scores, sink), dim=-1)
        weights = scores.softmax(-1)[..., :length]
        out[first:last] = (weights @ v).transpose(0, 1).flatten(1)
    return {"out": out, "out_amax": part_maxima(out, args, attrs["v_head_dim"])}


def _attention_cost(shapes: dict[str, tuple[int, ...]], attrs: dict[str, Any]) -> Cost:
    """An upper bound: every sequence at the bucket's full length, every token one query of it."""
    tokens, width = shapes["q"]
    out = attrs["heads"] * attrs["v_head_dim"]
    seqs, pages = shapes["pages"]
    keys = min(pages * attrs["page_size"], attrs["window"] or pages * attrs["page_size"])
    kv = min(tokens, seqs) * keys * layer_bytes(attrs) // attrs["page_size"]
    return Cost(
        read=kv + tokens * width * 4,
        written=tokens * out * 4 + 4 * math.prod(shapes.get("out_amax", (0,))),
        flops=2 * tokens * (width + out) * keys,
    )


def attention_sample(
    seed: int,
    label: str,
    ragged: Ragged,
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    values: int = 0,
    window: int = 0,
    causal: bool = True,
    dtype: str = "float32",
    softcap: float = 0.0,
    logn: int = 0,
    sinks: bool = False,
    alibi: bool = False,
    amax: bool = False,
) -> Sample:
    """`values`: dims of a value head (0: `dim`)."""
    g = generator(seed)
    tables = ragged.page_tables(g, 16)
    steps = ragged.arrays(tables, 16)
    attrs = {
        **_attrs(kv_heads, dim, values or dim, dtype),
        "heads": heads,
        "scale": dim**-0.5 * 1.5,
        "causal": causal,
        "window": window,
        "softcap": softcap,
        "logn": logn,
    }
    kv = KvState(ragged.pool_pages)
    layers = kv.keys_and_values(attrs)
    for (before, new), table in zip(ragged.lengths, tables, strict=True):
        for p in range(before + new):
            for layer in layers:
                new_row = floats(g, kv_heads, layer.shape[-1])
                layer[table[p // 16], :, p % 16] = stored(new_row, dtype)
    args = {
        "live": steps["live"],
        "q": floats(g, ragged.tokens, heads * dim, used=int(steps["live"][0])),
        "kv": kv,
        "seq_start": steps["seq_start"],
        "seq_len": steps["seq_len"],
        "pages": steps["pages"],
    }
    if sinks:
        args["sinks"] = floats(g, heads, scale=2.0)
    if alibi:
        args["alibi"] = 2.0 ** -torch.linspace(1, 8, heads)
    wanted = ("out_amax",) if amax else ()
    return Sample(label=label, args=args, attrs=attrs, wanted=wanted)


def _attention_samples() -> list[Sample]:
    return [
        attention_sample(50, "gqa", MIXED, heads=6, kv_heads=2, dim=64),
        attention_sample(51, "mha", MIXED, heads=2, kv_heads=2, dim=48),
        attention_sample(52, "mqa", MIXED, heads=30, kv_heads=1, dim=16),
        attention_sample(53, "bf16", MIXED, heads=8, kv_heads=2, dim=80, dtype="bfloat16"),
        attention_sample(54, "window", MIXED, heads=3, kv_heads=1, dim=32, window=21),
        attention_sample(55, "long decode", LONG_DECODE, heads=9, kv_heads=3, dim=64),
        attention_sample(
            56,
            "long window",
            LONG_DECODE,
            heads=2,
            kv_heads=1,
            dim=128,
            window=300,
            dtype="bfloat16",
        ),
        attention_sample(57, "one", ONE_TOKEN, heads=1, kv_heads=1, dim=256),
        attention_sample(58, "empty", EMPTY, heads=2, kv_heads=1, dim=16),
        attention_sample(59, "softcap", MIXED, heads=4, kv_heads=2, dim=32, softcap=1.5),
        attention_sample(
            70, "softcap window", LONG_DECODE, heads=4, kv_heads=2, dim=64, softcap=2.0, window=300
        ),
        attention_sample(71, "sinks", MIXED, heads=6, kv_heads=2, dim=32, sinks=True),
        attention_sample(
            72,
            "sinks window",
            LONG_DECODE,
            heads=4,
            kv_heads=1,
            dim=64,
            sinks=True,
            window=140,
            dtype="bfloat16",
        ),
        attention_sample(73, "alibi", MIXED, heads=5, kv_heads=5, dim=48, alibi=True),
        attention_sample(
            74, "long alibi", LONG_DECODE, heads=6, kv_heads=2, dim=32, alibi=True, dtype="bfloat16"
        ),
        attention_sample(77, "both ways", WHOLE, heads=4, kv_heads=4, dim=48, causal=False),
        attention_sample(
            78,
            "both ways bf16",
            WHOLE,
            heads=6,
            kv_heads=2,
            dim=32,
            causal=False,
            dtype="bfloat16",
            alibi=True,
        ),
        attention_sample(79, "e4m3", MIXED, heads=8, kv_heads=2, dim=80, dtype="fp8_e4m3"),
        attention_sample(
            80,
            "e4m3 window",
            LONG_DECODE,
            heads=4,
            kv_heads=1,
            dim=64,
            window=300,
            dtype="fp8_e4m3",
        ),
        attention_sample(81, "e5m2", LONG_DECODE, heads=6, kv_heads=2, dim=32, dtype="fp8_e5m2"),
        attention_sample(82, "narrow values", MIXED, heads=4, kv_heads=4, dim=48, values=32),
        attention_sample(
            83,
            "narrow values bf16",
            LONG_DECODE,
            heads=6,
            kv_heads=3,
            dim=96,
            values=64,
            dtype="bfloat16",
        ),
        attention_sample(
            84,
            "narrow values e4m3",
            MIXED,
            heads=4,
            kv_heads=2,
            dim=64,
            values=32,
            dtype="fp8_e4m3",
        ),
        attention_sample(85, "maxima", MIXED, heads=6, kv_heads=2, dim=48, values=32, amax=True),
        attention_sample(
            86,
            "maxima of a long decode",
            LONG_DECODE,
            heads=8,
            kv_heads=2,
            dim=64,
            dtype="bfloat16",
            amax=True,
        ),
        attention_sample(
            87, "maxima, both ways", WHOLE, heads=2, kv_heads=1, dim=32, causal=False, amax=True
        ),
        attention_sample(75, "logn", MIXED, heads=2, kv_heads=2, dim=32, logn=19),
        attention_sample(
            76,
            "everything",
            LONG_DECODE,
            heads=4,
            kv_heads=2,
            dim=16,
            alibi=True,
            sinks=True,
            softcap=3.0,
            logn=40,
            window=201,
        ),
    ]


ATTENTION = register(
    Op(
        name="attention",
        args=(
            LIVE,
            Arg(name="q", role="input", dims=("tokens", "H*E"), dtypes=("float",)),
            KV_ARG,
            *SEQ_ARGS,
            Arg(name="sinks", role="weight", dims=("H",), dtypes=("float",), optional=True),
            Arg(name="alibi", role="weight", dims=("H",), dtypes=("float",), optional=True),
            Arg(name="out", role="output", dims=("tokens", "H*V"), dtypes=("float",)),
            out_amax("tokens", "H"),
        ),
        attrs={
            "heads": int,
            "scale": float,
            "causal": bool,
            "window": int,
            "softcap": float,
            "logn": int,
            **KV_ATTRS,
        },
        reference=attention_reference,
        cost=_attention_cost,
        samples=_attention_samples,
    )
)
