"""Elementwise ops of a layer: SwiGLU and the residual add. Fusion moves both into the linears
around them.

T tokens, F ffn width, D model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.op import Arg, Cost, Op, Sample, register
from kernels.ops.embed import LIVE, live_count
from kernels.ops.samples import floats, generator, live


def swiglu_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    n = live_count(args, 0)
    out = torch.zeros_like(args["gate"])
    out[:n] = torch.nn.functional.silu(args["gate"][:n]) * args["up"][:n]
    return {"out": out}


def add_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    n = live_count(args, 0)
    out = torch.zeros_like(args["a"])
    out[:n] = args["a"][:n] + args["b"][:n]
    return {"out": out}


def _cost(name: str, flops: int) -> Any:
    def cost(shapes: dict[str, tuple[int, ...]], attrs: dict[str, Any]) -> Cost:
        rows, dim = shapes[name]
        return Cost(read=2 * rows * dim * 4, written=rows * dim * 4, flops=flops * rows * dim)

    return cost


def _samples(first: str, second: str, scale: float) -> Any:
    def samples() -> list[Sample]:
        g = generator(5)
        out = []
        for label, used, rows, dim in (
            ("partial", 3, 5, 96),
            ("odd", 2, 2, 37),
            ("empty", 0, 1, 16),
        ):
            a, b = floats(g, rows, dim, used=used, scale=scale), floats(g, rows, dim, used=used)
            out.append(
                Sample(label=label, args={"live": live(used), first: a, second: b}, attrs={})
            )
        return out

    return samples


SWIGLU = register(
    Op(
        name="swiglu",
        args=(
            LIVE,
            Arg(name="gate", role="input", dims=("tokens", "F"), dtypes=("float",)),
            Arg(name="up", role="input", dims=("tokens", "F"), dtypes=("float",)),
            Arg(name="out", role="output", dims=("tokens", "F"), dtypes=("float",)),
        ),
        reference=swiglu_reference,
        cost=_cost("gate", 6),
        samples=_samples("gate", "up", 30.0),  # far into both tails of the sigmoid
    )
)

ADD = register(
    Op(
        name="add",
        args=(
            LIVE,
            Arg(name="a", role="input", dims=("tokens", "D"), dtypes=("float",)),
            Arg(name="b", role="input", dims=("tokens", "D"), dtypes=("float",)),
            Arg(name="out", role="output", dims=("tokens", "D"), dtypes=("float",)),
        ),
        reference=add_reference,
        cost=_cost("a", 1),
        samples=_samples("a", "b", 1.0),
    )
)
