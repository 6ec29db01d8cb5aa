"""The QKV projection up to the cache, because a launch or a barrier of its own costs more than the
work: `linear`, then `rope_kv`, without the projection's result between two calls.

T tokens, D inputs, H heads, K KV heads, E head dim, R rotary dims. Attributes are those of `linear`
and of `rope_kv`; the epsilon of the heads' norms is `head_eps`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.op import Cost, Op, Sample, register
from kernels.ops.linear import LINEAR, linear_reference, row_maxima
from kernels.ops.rope import ROPE_KV, rope_kv_reference, rope_kv_sample
from kernels.ops.samples import ONE_TOKEN, Ragged, floats, generator

FEW = Ragged(lengths=((3, 1), (40, 1), (15, 2)), tokens=6, seqs=4, pages=4, pool_pages=12)
MORE = Ragged(lengths=((0, 1), (15, 1), (0, 9), (13, 7)), tokens=20, seqs=5, pages=3, pool_pages=12)


def rope_kv_attrs(attrs: dict[str, Any]) -> dict[str, Any]:
    """Attributes of the `rope_kv` part."""
    return {**attrs, "eps": attrs["head_eps"]}


def linear_rope_kv_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    qkv = linear_reference(args, attrs)["out"]
    return rope_kv_reference({**args, "qkv": qkv}, rope_kv_attrs(attrs))


def _cost(shapes: dict[str, tuple[int, ...]], attrs: dict[str, Any]) -> Cost:
    """Both parts without what passes between them."""
    between = (shapes["x"][0], shapes["w"][0])
    linear = LINEAR.cost({**shapes, "out": between}, attrs)
    rope = ROPE_KV.cost({**shapes, "qkv": between}, rope_kv_attrs(attrs))
    size = between[0] * between[1] * 4
    return Cost(
        read=linear.read + rope.read - size,
        written=linear.written + rope.written - size,
        flops=linear.flops + rope.flops,
    )


def linear_rope_kv_sample(
    seed: int,
    label: str,
    ragged: Ragged,
    *,
    inputs: int,
    bias: bool = False,
    norm: bool = False,
    x_format: str = "",
    amax: bool = False,
    **heads: Any,
) -> Sample:
    made = rope_kv_sample(seed, label, ragged, **heads)
    g = generator(seed + 100)
    qkv = made.args.pop("qkv")
    args: dict[str, Any] = {
        "x": floats(g, len(qkv), inputs, used=int(made.args["live"][0])),
        "w": floats(g, qkv.shape[1], inputs, scale=inputs**-0.5),
        **made.args,
    }
    if "table" in args:  # turns, which keep the size of the product's errors
        angles = floats(g, len(qkv), heads["rotary"] // 2)
        args["table"] = torch.cat((angles.cos(), angles.sin()), dim=1)
    if bias:
        args["bias"] = floats(g, qkv.shape[1])
    if norm:
        args["norm"] = floats(g, inputs)
    if amax:
        args["x"] = args["x"].bfloat16().float()
        args["x_amax"] = row_maxima(args)
    attrs = {
        **{name: kind() for name, kind in LINEAR.attrs.items()},
        **made.attrs,
        "head_eps": made.attrs["eps"],
        "eps": 1e-5,
        "scale": 1.0,
        "x_format": x_format,
    }
    return Sample(label=label, args=args, attrs=attrs)


def _samples() -> list[Sample]:
    """Every kind of heads, on few rows, many and one."""
    return [
        linear_rope_kv_sample(
            300, "gqa", MORE, inputs=64, norm=True, heads=6, kv_heads=2, dim=32, rotary=32
        ),
        linear_rope_kv_sample(
            301,
            "head norms",
            FEW,
            inputs=96,
            norm=True,
            heads=2,
            kv_heads=1,
            dim=64,
            rotary=64,
            norms=True,
            dtype="bfloat16",
        ),
        linear_rope_kv_sample(
            302,
            "interleaved, in part",
            ONE_TOKEN,
            inputs=64,
            bias=True,
            norm=True,
            heads=2,
            kv_heads=1,
            dim=32,
            rotary=12,
            interleaved=True,
        ),
        linear_rope_kv_sample(
            303, "no rope", FEW, inputs=64, bias=True, heads=3, kv_heads=3, dim=16, rotary=0
        ),
        linear_rope_kv_sample(
            304,
            "layer norms, clip",
            FEW,
            inputs=64,
            norm=True,
            heads=4,
            kv_heads=2,
            dim=32,
            rotary=32,
            norms=True,
            own=True,
            centre=True,
            clip=0.8,
        ),
        linear_rope_kv_sample(
            305, "odd heads", FEW, inputs=64, heads=2, kv_heads=1, dim=48, rotary=24, clip=0.5
        ),
        linear_rope_kv_sample(
            306,
            "interleaved",
            FEW,
            inputs=64,
            heads=1,
            kv_heads=1,
            dim=16,
            rotary=16,
            interleaved=True,
            dtype="fp8_e4m3",
        ),
        linear_rope_kv_sample(
            307,
            "one",
            ONE_TOKEN,
            inputs=128,
            norm=True,
            heads=4,
            kv_heads=2,
            dim=48,
            rotary=48,
            norms=True,
            dtype="bfloat16",
        ),
        linear_rope_kv_sample(
            308,
            "codes",
            FEW,
            inputs=64,
            norm=True,
            x_format="fp8",
            heads=2,
            kv_heads=1,
            dim=32,
            rotary=32,
        ),
        linear_rope_kv_sample(
            309,
            "codes by maxima",
            MORE,
            inputs=128,
            norm=True,
            x_format="fp8",
            amax=True,
            heads=2,
            kv_heads=1,
            dim=32,
            rotary=32,
        ),
    ]


LINEAR_ROPE_KV = register(
    Op(
        name="linear_rope_kv",
        args=(
            *(LINEAR.arg(name) for name in ("live", "x", "w", "bias", "norm", "x_amax")),
            *(arg for arg in ROPE_KV.args if arg.name not in ("live", "qkv")),
        ),
        attrs={**LINEAR.attrs, **ROPE_KV.attrs, "head_eps": float},
        reference=linear_rope_kv_reference,
        cost=_cost,
        samples=_samples,
        tolerance=LINEAR.tolerance,
    )
)
