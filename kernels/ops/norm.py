"""Norms: over a whole row, and per attention head.

RMS norm: x / sqrt(mean x^2 + eps) * w. LayerNorm ("centred"): the same of x - mean x, plus an
optional bias. R rows (tokens or logit rows), D model, H heads, E head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.op import Arg, Cost, Op, Sample, register
from kernels.ops.embed import LIVE, live_count, live_rows
from kernels.ops.samples import floats, generator, live, with_logit_rows


def normalized(x: Tensor, weight: Tensor, eps: float, centre: bool = False) -> Tensor:
    """(x - m) * rsqrt(mean (x - m)^2 + eps) * weight over the last axis; m is the mean of x with
    `centre`, else 0."""
    if centre:
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rms_norm_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    n = live_rows(args, attrs)
    out = torch.zeros_like(args["x"])
    out[:n] = normalized(args["x"][:n], args["w"], attrs["eps"])
    if args.get("residual") is not None:
        out[:n] += args["residual"][:n]
    return {"out": out}


def layer_norm_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    n = live_rows(args, attrs)
    out = torch.zeros_like(args["x"])
    out[:n] = normalized(args["x"][:n], args["w"], attrs["eps"], centre=True)
    if args.get("bias") is not None:
        out[:n] += args["bias"]
    return {"out": out}


def head_norm_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    n = live_count(args, 0)
    x, heads = args["x"], attrs["heads"]
    weight = args["w"].view(-1, x.shape[1] // heads)  # [1, E] or [H, E]
    out = torch.zeros_like(x)
    out[:n] = normalized(
        x[:n].unflatten(1, (heads, -1)), weight, attrs["eps"], attrs["centre"]
    ).flatten(1)
    return {"out": out}


def _cost(shapes: dict[str, tuple[int, ...]], attrs: dict[str, Any]) -> Cost:
    rows, dim = shapes["x"]
    extra = rows * dim * 4 if "residual" in shapes else 0
    return Cost(read=rows * dim * 4 + extra, written=rows * dim * 4, flops=4 * rows * dim)


SHAPES = (("partial", 3, 5, 576, 1e-5), ("odd", 2, 2, 37, 1e-6), ("empty", 0, 2, 8, 1e-5))


def _rms_norm_samples() -> list[Sample]:
    g = generator(3)
    out = []
    for label, used, rows, dim, eps in SHAPES:
        x = floats(g, rows, dim, used=used, scale=3.0)
        out.append(
            Sample(
                label=label,
                args={"live": live(used), "x": x, "w": floats(g, dim)},
                attrs={"eps": eps},
            )
        )
    tiny = {"live": live(1), "x": torch.full((1, 48), 1e-4), "w": floats(g, 48)}
    out.append(Sample(label="eps dominates", args=tiny, attrs={"eps": 1e-5}))
    for label, dim in (("residual", 96), ("odd residual", 37)):
        args = {"live": live(3), "x": floats(g, 4, dim, used=3), "w": floats(g, dim)}
        args["residual"] = floats(g, 4, dim, used=3)
        out.append(Sample(label=label, args=args, attrs={"eps": 1e-6}))
    return out


RMS_NORM = register(
    Op(
        name="rms_norm",
        args=(
            LIVE,
            Arg(name="x", role="input", dims=("R", "D"), dtypes=("float",)),
            Arg(name="w", role="weight", dims=("D",), dtypes=("float",)),
            Arg(
                name="residual",
                role="input",
                dims=("R", "D"),
                dtypes=("float",),
                optional=True,
            ),
            Arg(name="out", role="output", dims=("R", "D"), dtypes=("float",)),
        ),
        attrs={"eps": float, "live_index": int},
        reference=rms_norm_reference,
        cost=_cost,
        samples=with_logit_rows(_rms_norm_samples),
    )
)


def _layer_norm_samples() -> list[Sample]:
    g = generator(6)
    out = []
    for label, used, rows, dim, eps in SHAPES:
        # A mean far from zero: the two passes of a LayerNorm must not cancel.
        args = {"live": live(used), "x": floats(g, rows, dim, used=used) + 5.0}
        args["w"] = floats(g, dim)
        if label != "odd":
            args["bias"] = floats(g, dim)
        out.append(Sample(label=label, args=args, attrs={"eps": eps}))
    return out


LAYER_NORM = register(
    Op(
        name="layer_norm",
        args=(
            LIVE,
            Arg(name="x", role="input", dims=("R", "D"), dtypes=("float",)),
            Arg(name="w", role="weight", dims=("D",), dtypes=("float",)),
            Arg(name="bias", role="weight", dims=("D",), dtypes=("float",), optional=True),
            Arg(name="out", role="output", dims=("R", "D"), dtypes=("float",)),
        ),
        attrs={"eps": float, "live_index": int},
        reference=layer_norm_reference,
        cost=_cost,
        samples=with_logit_rows(_layer_norm_samples),
    )
)


def _head_norm_samples() -> list[Sample]:
    g = generator(4)
    out = []
    for label, used, rows, heads, dim, own, centre in (
        ("partial", 3, 4, 3, 48, False, False),
        ("one head", 2, 2, 1, 16, False, False),
        ("own weights", 3, 3, 3, 32, True, False),
        ("layer norms", 3, 4, 5, 48, True, True),
    ):
        x = floats(g, rows, heads * dim, used=used)
        args = {"live": live(used), "x": x, "w": floats(g, heads * dim if own else dim)}
        attrs = {"eps": 1e-6, "heads": heads, "centre": centre}
        out.append(Sample(label=label, args=args, attrs=attrs))
    return out


HEAD_NORM = register(
    Op(
        name="head_norm",
        args=(
            LIVE,
            Arg(name="x", role="input", dims=("tokens", "H*E"), dtypes=("float",)),
            # [E], shared by the heads, or [H*E], each head its own
            Arg(name="w", role="weight", dims=("W",), dtypes=("float",)),
            Arg(name="out", role="output", dims=("tokens", "H*E"), dtypes=("float",)),
        ),
        attrs={"eps": float, "heads": int, "centre": bool},
        reference=head_norm_reference,
        cost=_cost,
        samples=_head_norm_samples,
    )
)
