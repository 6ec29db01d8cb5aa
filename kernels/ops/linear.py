"""Matrix product with the prologues and epilogues fusion may add: row gather, RMS norm, bias,
SwiGLU, residual.

R rows (tokens or logit rows), K inputs, N outputs. With act=swiglu the weight is cat(gate, up) [2F,
K] and the output [R, F].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.op import Arg, Cost, Op, Sample, register
from kernels.ops.embed import LIVE, live_count
from kernels.ops.norm import normalized
from kernels.ops.samples import floats, generator, live, padded


def linear_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    n = live_count(args, attrs.get("live_index", 0))
    rows = args.get("rows")
    x = args["x"][rows[:n].long()] if rows is not None else args["x"][:n]
    x = x.float()
    if args.get("norm") is not None:
        x = normalized(x, args["norm"], attrs["eps"])
    y = x @ args["w"].float().T
    if args.get("bias") is not None:
        y = y + args["bias"]
    if attrs.get("act", "") == "swiglu":
        gate, up = y.chunk(2, dim=1)
        y = torch.nn.functional.silu(gate) * up
    if args.get("residual") is not None:
        y = y + args["residual"][:n]
    out = torch.zeros(len(rows) if rows is not None else len(args["x"]), y.shape[1])
    out[:n] = y
    return {"out": out}


def _cost(shapes: dict[str, tuple[int, ...]], attrs: dict[str, Any]) -> Cost:
    rows = shapes["rows"][0] if "rows" in shapes else shapes["x"][0]
    n, k = shapes["w"]
    outputs = n // 2 if attrs.get("act", "") == "swiglu" else n
    extra = rows * outputs * 4 if "residual" in shapes else 0
    return Cost(read=rows * k * 4 + extra, written=rows * outputs * 4, flops=2 * rows * n * k)


def _sample(
    seed: int,
    label: str,
    *,
    used: int,
    rows: int,
    k: int,
    n: int,
    bias: bool = False,
    norm: bool = False,
    residual: bool = False,
    act: str = "",
    gather: bool = False,
) -> Sample:
    g = generator(seed)
    x_rows = rows + 3 if gather else rows
    args: dict[str, Any] = {
        "live": live(x_rows if gather else used, used, used),
        "x": floats(g, x_rows, k, used=None if gather else used),
        "w": floats(g, n, k, scale=k**-0.5),
    }
    attrs: dict[str, Any] = {"act": act, "live_index": 2 if gather else 0, "eps": 1e-5}
    if bias:
        args["bias"] = floats(g, n)
    if norm:
        args["norm"] = floats(g, k)
    if residual:
        args["residual"] = floats(g, rows, n, used=used)
    if gather:
        args["rows"] = padded([(i * 3 + 1) % x_rows for i in range(used)], rows)
    return Sample(label=label, args=args, attrs=attrs)


def _samples() -> list[Sample]:
    return [
        _sample(10, "decode", used=1, rows=1, k=64, n=48),
        _sample(11, "empty", used=0, rows=2, k=64, n=32),
        _sample(12, "odd outputs", used=3, rows=4, k=128, n=77, bias=True),
        _sample(13, "odd rows", used=13, rows=16, k=192, n=160),
        _sample(14, "norm qkv", used=2, rows=3, k=256, n=96, bias=True, norm=True),
        _sample(15, "residual", used=9, rows=12, k=160, n=64, residual=True),
        _sample(16, "swiglu", used=5, rows=8, k=128, n=2 * 80, norm=True, act="swiglu"),
        _sample(17, "swiglu odd", used=2, rows=2, k=64, n=2 * 24, bias=True, act="swiglu"),
        _sample(18, "head", used=3, rows=4, k=128, n=200, norm=True, gather=True),
        _sample(19, "chunk", used=70, rows=72, k=128, n=144, norm=True),
    ]


LINEAR = register(
    Op(
        name="linear",
        args=(
            LIVE,
            Arg(name="x", role="input", dims=("x_rows", "K"), dtypes=("float",)),
            Arg(name="w", role="weight", dims=("N", "K"), dtypes=("float",)),
            Arg(name="bias", role="weight", dims=("N",), dtypes=("float",), optional=True),
            Arg(name="norm", role="weight", dims=("K",), dtypes=("float",), optional=True),
            Arg(name="residual", role="input", dims=("R", "O"), dtypes=("float",), optional=True),
            Arg(name="rows", role="input", dims=("seqs",), dtypes=("int32",), optional=True),
            Arg(name="out", role="output", dims=("R", "O"), dtypes=("float",)),
        ),
        attrs={"eps": float, "act": str, "live_index": int},
        reference=linear_reference,
        cost=_cost,
        samples=_samples,
        tolerance={"float32": 5e-5, "bfloat16": 2e-2},
    )
)
