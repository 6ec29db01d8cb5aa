"""RMS norms: over a whole row, and per attention head.

T tokens, D model, H heads, E head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.op import Arg, Cost, Op, Sample, register
from kernels.ops.embed import LIVE, live_count
from kernels.ops.samples import floats, generator, live


def normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean x^2 + eps) * weight over the last axis."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rms_norm_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    n = live_count(args, 0)
    out = torch.zeros_like(args["x"])
    out[:n] = normalized(args["x"][:n], args["w"], attrs["eps"])
    return {"out": out}


def head_norm_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    n = live_count(args, 0)
    x = args["x"]
    out = torch.zeros_like(x)
    out[:n] = normalized(x[:n].unflatten(1, (attrs["heads"], -1)), args["w"], attrs["eps"]).flatten(
        1
    )
    return {"out": out}


def _cost(shapes: dict[str, tuple[int, ...]], attrs: dict[str, Any]) -> Cost:
    rows, dim = shapes["x"]
    return Cost(read=rows * dim * 4, written=rows * dim * 4, flops=4 * rows * dim)


def _rms_norm_samples() -> list[Sample]:
    g = generator(3)
    out = []
    for label, used, rows, dim, eps in (
        ("partial", 3, 5, 576, 1e-5),
        ("odd", 2, 2, 37, 1e-6),
        ("empty", 0, 2, 8, 1e-5),
    ):
        x = floats(g, rows, dim, used=used, scale=3.0)
        out.append(
            Sample(
                label=label,
                args={"live": live(used), "x": x, "w": floats(g, dim)},
                attrs={"eps": eps},
            )
        )
    tiny = {"live": live(1), "x": torch.full((1, 48), 1e-4), "w": floats(g, 48)}
    return [*out, Sample(label="eps dominates", args=tiny, attrs={"eps": 1e-5})]


RMS_NORM = register(
    Op(
        name="rms_norm",
        args=(
            LIVE,
            Arg(name="x", role="input", dims=("tokens", "D"), dtypes=("float",)),
            Arg(name="w", role="weight", dims=("D",), dtypes=("float",)),
            Arg(name="out", role="output", dims=("tokens", "D"), dtypes=("float",)),
        ),
        attrs={"eps": float},
        reference=rms_norm_reference,
        cost=_cost,
        samples=_rms_norm_samples,
    )
)


def _head_norm_samples() -> list[Sample]:
    g = generator(4)
    out = []
    for label, used, rows, heads, dim in (("partial", 3, 4, 3, 48), ("one head", 2, 2, 1, 16)):
        x = floats(g, rows, heads * dim, used=used)
        args = {"live": live(used), "x": x, "w": floats(g, dim)}
        out.append(Sample(label=label, args=args, attrs={"eps": 1e-6, "heads": heads}))
    return out


HEAD_NORM = register(
    Op(
        name="head_norm",
        args=(
            LIVE,
            Arg(name="x", role="input", dims=("tokens", "H*E"), dtypes=("float",)),
            Arg(name="w", role="weight", dims=("E",), dtypes=("float",)),
            Arg(name="out", role="output", dims=("tokens", "H*E"), dtypes=("float",)),
        ),
        attrs={"eps": float, "heads": int},
        reference=head_norm_reference,
        cost=_cost,
        samples=_head_norm_samples,
    )
)
