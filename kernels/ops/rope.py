"""Rotary position embedding: the angle table of a step, the rotation, and both with head norms and
the KV write in one pass.

T tokens, R rotary dims (of a head R dims from `start` on are rotated; in rope_kv the first R),
H heads, K KV heads, E head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.op import Arg, Cost, Op, Sample, register
from kernels.ops.attention import KV_ARG, kv_write_reference
from kernels.ops.embed import LIVE, live_count
from kernels.ops.kv import KV_ATTRS, KvState, layer_bytes
from kernels.ops.norm import head_norm_reference
from kernels.ops.samples import MIXED, ONE_TOKEN, Ragged, floats, generator, live, padded

POSITIONS = Arg(name="positions", role="input", dims=("tokens",), dtypes=("int32",))
KV_SLOTS = Arg(name="kv_slots", role="input", dims=("tokens",), dtypes=("int32",))


def rope_table_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    """cos then sin of position * frequency. The product is rounded to float32, as every
    published implementation does. Where the frequencies depend on the length of the request,
    `inv_freq` holds `variants` rows of R/2, and `variant` names the row of each token."""
    n = live_count(args, 0)
    positions, freq = args["positions"], args["inv_freq"].float().view(attrs["variants"], -1)
    row = args["variant"][:n].long() if args.get("variant") is not None else [0]
    angle = positions[:n].float()[:, None] * freq[row]
    out = torch.zeros(len(positions), 2 * freq.shape[1])
    out[:n] = torch.cat((angle.cos(), angle.sin()), dim=1) * attrs["scale"]
    return {"out": out}


def _table_cost(shapes: dict[str, tuple[int, ...]], attrs: dict[str, Any]) -> Cost:
    tokens, half = shapes["positions"][0], shapes["inv_freq"][0] // attrs["variants"]
    return Cost(read=tokens * 4, written=tokens * half * 8, flops=tokens * half * 40)


def _table_samples() -> list[Sample]:
    out = []
    for label, positions, size, rotary in (
        ("partial", [0, 1, 17, 131071], 6, 64),
        ("odd", [5, 4095], 2, 6),
    ):
        freq = 10000.0 ** (-torch.arange(0, rotary, 2).float() / rotary)
        args = {
            "live": live(len(positions)),
            "positions": padded(positions, size),
            "inv_freq": freq,
        }
        out.append(
            Sample(
                label=label,
                args=args,
                attrs={"scale": 1.0 if label == "partial" else 1.25, "variants": 1},
            )
        )
    freq = torch.cat([b ** (-torch.arange(0, 16, 2).float() / 16) for b in (1e4, 3e4, 7e5)])
    args = {
        "live": live(4),
        "positions": padded([3, 77, 5000, 2], 6),
        "inv_freq": freq,
        "variant": padded([0, 2, 1, 2], 6),
    }
    return [*out, Sample(label="variants", args=args, attrs={"scale": 1.1, "variants": 3})]


ROPE_TABLE = register(
    Op(
        name="rope_table",
        args=(
            LIVE,
            POSITIONS,
            Arg(name="inv_freq", role="weight", dims=("variants*R/2",), dtypes=("float",)),
            Arg(name="variant", role="input", dims=("tokens",), dtypes=("int32",), optional=True),
            Arg(name="out", role="output", dims=("tokens", "R"), dtypes=("float32",)),
        ),
        attrs={"scale": float, "variants": int},
        reference=rope_table_reference,
        cost=_table_cost,
        samples=_table_samples,
    )
)


def rotated(x_THE: Tensor, table_TR: Tensor, interleaved: bool, start: int = 0) -> Tensor:
    rotary = table_TR.shape[1]
    cos, sin = (t[:, None, :] for t in table_TR.chunk(2, dim=1))
    before, x, rest = x_THE.tensor_split([start, start + rotary], dim=-1)
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = x.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((before, turned, rest), dim=-1)


def rope_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    n = live_count(args, 0)
    x = args["x"]
    out = torch.zeros_like(x)
    heads = x[:n].unflatten(1, (attrs["heads"], attrs["head_dim"]))
    turned = rotated(heads, args["table"][:n], attrs["interleaved"], attrs["start"])
    out[:n] = turned.flatten(1)
    return {"out": out}


def _rope_cost(shapes: dict[str, tuple[int, ...]], attrs: dict[str, Any]) -> Cost:
    tokens, width = shapes["x"]
    return Cost(read=tokens * width * 4, written=tokens * width * 4, flops=tokens * width * 3)


def _rope_samples() -> list[Sample]:
    g = generator(20)
    out = []
    for label, rotary, start, interleaved in (
        ("half", 32, 0, False),
        ("interleaved", 32, 0, True),
        ("partial rotary", 24, 0, False),
        ("last dims", 12, 20, True),
        ("middle dims", 8, 16, False),
    ):
        args = {
            "live": live(3),
            "x": floats(g, 5, 3 * 32, used=3),
            "table": floats(g, 5, rotary, used=3),
        }
        out.append(
            Sample(
                label=label,
                args=args,
                attrs={"heads": 3, "head_dim": 32, "start": start, "interleaved": interleaved},
            )
        )
    return out


ROPE = register(
    Op(
        name="rope",
        args=(
            LIVE,
            Arg(name="x", role="input", dims=("tokens", "H*E"), dtypes=("float",)),
            Arg(name="table", role="input", dims=("tokens", "R"), dtypes=("float32",)),
            Arg(name="out", role="output", dims=("tokens", "H*E"), dtypes=("float",)),
        ),
        attrs={"heads": int, "head_dim": int, "start": int, "interleaved": bool},
        reference=rope_reference,
        cost=_rope_cost,
        samples=_rope_samples,
    )
)


def rope_kv_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    """Composed of head_norm, clip, rope and kv_write."""
    attrs = {**attrs, "start": 0}
    heads, kv_heads, dim = attrs["heads"], attrs["kv_heads"], attrs["head_dim"]
    q, k, v = args["qkv"].split((heads * dim, kv_heads * dim, kv_heads * dim), dim=1)
    if args.get("q_norm") is not None:
        q = head_norm_reference({**args, "x": q, "w": args["q_norm"]}, attrs)["out"]
    if args.get("k_norm") is not None:
        k = head_norm_reference(
            {**args, "x": k, "w": args["k_norm"]}, {**attrs, "heads": kv_heads}
        )["out"]
    if limit := attrs["clip"]:
        q, k, v = (t.clamp(-limit, limit) for t in (q, k, v))
    if args.get("table") is not None:
        q = rope_reference({**args, "x": q}, attrs)["out"]
        k = rope_reference({**args, "x": k}, {**attrs, "heads": kv_heads})["out"]
    kv_write_reference({**args, "k": k, "v": v}, attrs)
    return {"q": q.contiguous()}


def _rope_kv_cost(shapes: dict[str, tuple[int, ...]], attrs: dict[str, Any]) -> Cost:
    tokens, width = shapes["qkv"]
    written = tokens * (
        attrs["heads"] * attrs["head_dim"] * 4 + layer_bytes(attrs) // attrs["page_size"]
    )
    return Cost(read=tokens * width * 4, written=written, flops=tokens * width * 6)


def rope_kv_sample(
    seed: int,
    label: str,
    ragged: Ragged,
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    rotary: int,
    norms: bool = False,
    own: bool = False,
    centre: bool = False,
    clip: float = 0.0,
    interleaved: bool = False,
    dtype: str = "float32",
) -> Sample:
    """`dtype` of the pages; the layer is the middle one of three."""
    g = generator(seed)
    steps = ragged.arrays(ragged.page_tables(g, 16), 16)
    n = int(steps["live"][0])
    attrs: dict[str, Any] = {
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": dim,
        "v_head_dim": dim,
        "eps": 1e-6,
        "interleaved": interleaved,
        "centre": centre,
        "clip": clip,
        "page_size": 16,
        "kv_dtype": dtype,
    }
    layer = layer_bytes(attrs)
    attrs |= {"layer_offset": layer, "page_bytes": 3 * layer}
    args: dict[str, Any] = {
        "live": steps["live"],
        "qkv": floats(g, ragged.tokens, (heads + 2 * kv_heads) * dim, used=n),
        "kv_slots": steps["kv_slots"],
        "kv": KvState(ragged.pool_pages),
    }
    if rotary:
        args["table"] = floats(g, ragged.tokens, rotary, used=n)
    if norms:
        for name, count in (("q_norm", heads), ("k_norm", kv_heads)):
            args[name] = floats(g, count * dim if own else dim)
    return Sample(label=label, args=args, attrs=attrs)


def _rope_kv_samples() -> list[Sample]:
    return [
        rope_kv_sample(30, "gqa", MIXED, heads=6, kv_heads=2, dim=32, rotary=32),
        rope_kv_sample(31, "norms", MIXED, heads=2, kv_heads=2, dim=48, rotary=48, norms=True),
        rope_kv_sample(32, "bf16", MIXED, heads=4, kv_heads=1, dim=64, rotary=64, dtype="bfloat16"),
        rope_kv_sample(
            33, "interleaved", ONE_TOKEN, heads=2, kv_heads=1, dim=16, rotary=12, interleaved=True
        ),
        rope_kv_sample(34, "no rope", ONE_TOKEN, heads=3, kv_heads=3, dim=16, rotary=0),
        rope_kv_sample(
            35,
            "layer norms",
            MIXED,
            heads=4,
            kv_heads=2,
            dim=32,
            rotary=8,
            norms=True,
            own=True,
            centre=True,
        ),
        rope_kv_sample(
            36,
            "clip",
            MIXED,
            heads=2,
            kv_heads=1,
            dim=48,
            rotary=48,
            norms=True,
            own=True,
            clip=0.8,
        ),
        rope_kv_sample(
            38,
            "e4m3",
            MIXED,
            heads=2,
            kv_heads=2,
            dim=48,
            rotary=16,
            norms=True,
            interleaved=True,
            dtype="fp8_e4m3",
        ),
        rope_kv_sample(39, "e5m2", MIXED, heads=2, kv_heads=1, dim=32, rotary=32, dtype="fp8_e5m2"),
        rope_kv_sample(37, "clip alone", MIXED, heads=2, kv_heads=1, dim=16, rotary=8, clip=0.5),
    ]


ROPE_KV = register(
    Op(
        name="rope_kv",
        args=(
            LIVE,
            Arg(name="qkv", role="input", dims=("tokens", "(H+2K)*E"), dtypes=("float",)),
            Arg(
                name="table", role="input", dims=("tokens", "R"), dtypes=("float32",), optional=True
            ),
            # [E], shared by the heads, or [H*E] and [K*E], each head its own
            Arg(name="q_norm", role="weight", dims=("QW",), dtypes=("float",), optional=True),
            Arg(name="k_norm", role="weight", dims=("KW",), dtypes=("float",), optional=True),
            KV_SLOTS,
            KV_ARG,
            Arg(name="q", role="output", dims=("tokens", "H*E"), dtypes=("float",)),
        ),
        attrs={
            "heads": int,
            "eps": float,
            "centre": bool,
            "clip": float,
            "interleaved": bool,
            **KV_ATTRS,
        },
        reference=rope_kv_reference,
        cost=_rope_kv_cost,
        samples=_rope_kv_samples,
    )
)
