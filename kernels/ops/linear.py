"""Matrix product with the prologues and epilogues fusion may add:

    out = softcap(act(norm(x)[rows] W^T + bias) * scale) + residual[residual_rows]

R rows (tokens or logit rows), K inputs, N outputs, O columns of the result. `act` is "" or a name
of `kernels.ops.mlp`; with a gated one the weight is cat(gate, up) [2F, K] and the output [R, F],
otherwise O = N. `scale` 1 and `softcap` 0 leave the product alone; softcap(y) = c tanh(y / c).

`x_format`: "" multiplies norm(x)[rows] as it is; "fp8" multiplies what `e4m3_rows` leaves of it:
the product is one of e4m3 codes, times a scale per row. A norm's factor is common to a row, so it
cancels out of the codes: they are those of x * norm, and the scale is rsqrt(mean x^2 + eps) times
theirs, in float32. `x_amax`, `out_amax`, `amax_norm`: kernels/ops/amax.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kernels.op import Arg, Cost, Op, Sample, register
from kernels.ops.amax import X_AMAX, amax_norm, out_amax, part_maxima
from kernels.ops.embed import LIVE, live_rows
from kernels.ops.mlp import ACTIVATIONS, GATED
from kernels.ops.norm import normalized
from kernels.ops.samples import floats, generator, live, padded

LARGEST = 448.0  # of e4m3
LEAST = 2.0**-100  # rows smaller than this have no codes: their scale would not be a number


def e4m3_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (float8_e4m3fn, [R, K]) and scales (float32, [R]) of rows, as torchao chooses them for
    dynamic quantization per row: the scale brings a row's largest number to 448, and codes are
    rounded to nearest even. A row's codes depend on nothing but the row."""
    scale = x.float().abs().amax(1).clamp(min=LEAST) / LARGEST
    codes = (x.float() / scale[:, None]).clamp(-LARGEST, LARGEST)
    return codes.to(torch.float8_e4m3fn), scale


def linear_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    n = live_rows(args, attrs)
    rows = args.get("rows")
    x = args["x"][rows[:n].long()] if rows is not None else args["x"][:n]
    x = x.float()
    if args.get("norm") is not None:
        x = normalized(x, args["norm"], attrs["eps"])
    if attrs.get("x_format") == "fp8":
        codes, scales = e4m3_rows(x)
        x = codes.float() * scales[:, None]
    y = x @ args["w"].float().T
    if args.get("bias") is not None:
        y = y + args["bias"]
    act = attrs.get("act", "")
    if act in GATED:
        gate, up = y.chunk(2, dim=1)
        y = ACTIVATIONS[GATED[act]](gate) * up
    elif act:
        y = ACTIVATIONS[act](y)
    y = y * attrs["scale"]
    if cap := attrs["softcap"]:
        y = cap * torch.tanh(y / cap)
    if args.get("residual") is not None:
        chosen = args.get("residual_rows")
        y = y + (args["residual"][:n] if chosen is None else args["residual"][chosen[:n].long()])
    out = torch.zeros(len(rows) if rows is not None else len(args["x"]), y.shape[1])
    out[:n] = y
    return {"out": out, "out_amax": part_maxima(out, args)}


def _cost(shapes: dict[str, tuple[int, ...]], attrs: dict[str, Any]) -> Cost:
    rows = shapes["rows"][0] if "rows" in shapes else shapes["x"][0]
    n, k = shapes["w"]
    outputs = n // 2 if attrs.get("act", "") in GATED else n
    extra = rows * outputs * 4 if "residual" in shapes else 0
    amax = {name: 4 * math.prod(shapes.get(name, (0,))) for name in ("x_amax", "out_amax")}
    return Cost(
        read=rows * k * 4 + extra + amax["x_amax"],
        written=rows * outputs * 4 + amax["out_amax"],
        flops=2 * rows * n * k,
    )


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
    scale: float = 1.0,
    softcap: float = 0.0,
    x_format: str = "",
    amax: bool = False,
) -> Sample:
    g = generator(seed)
    x_rows = rows + 3 if gather else rows
    args: dict[str, Any] = {
        "live": live(x_rows if gather else used, used, used),
        "x": floats(g, x_rows, k, used=None if gather else used),
        "w": floats(g, n, k, scale=k**-0.5),
    }
    attrs: dict[str, Any] = {
        "act": act,
        "live_index": 2 if gather else 0,
        "eps": 1e-5,
        "scale": scale,
        "softcap": softcap,
        "x_format": x_format,
    }
    if bias:
        args["bias"] = floats(g, n)
    if norm:
        args["norm"] = floats(g, k)
    if residual:
        args["residual"] = floats(g, x_rows, n, used=None if gather else used)
    if gather:
        args["rows"] = padded([(i * 3 + 1) % x_rows for i in range(used)], rows)
    if gather and residual:
        args["residual_rows"] = args["rows"].flip(0) if used == rows else args["rows"].clone()
    if amax and act not in GATED:
        args["amax_norm"] = floats(g, n)
    return Sample(label=label, args=args, attrs=attrs, wanted=("out_amax",) if amax else ())


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
        _sample(20, "chosen rows", used=3, rows=5, k=96, n=50, residual=True, gather=True),
        _sample(21, "two choices", used=13, rows=13, k=64, n=48, residual=True, gather=True),
        *(
            _sample(200 + i, act, used=5, rows=6, k=64, n=2 * 40 if act in GATED else 77, act=act)
            for i, act in enumerate((*GATED, *ACTIVATIONS))
            if act != "swiglu"
        ),
        _sample(110, "gated scale", used=3, rows=3, k=64, n=2 * 32, act="geglu_tanh", scale=0.4),
        _sample(
            111,
            "act bias residual",
            used=9,
            rows=9,
            k=64,
            n=48,
            act="gelu",
            bias=True,
            residual=True,
        ),
        _sample(
            112, "residual scale", used=9, rows=9, k=96, n=64, bias=True, residual=True, scale=0.3
        ),
        _sample(
            113,
            "softcap",
            used=3,
            rows=4,
            k=128,
            n=77,
            norm=True,
            gather=True,
            softcap=0.7,
            scale=2.5,
            bias=True,
        ),
        *_fp8_samples(),
    ]


def _fp8_samples() -> list[Sample]:
    """Every way into and out of a product of codes; a row of zeros and one with an outlier. With
    maxima rows are such that bfloat16 has them: maxima are of what is stored."""

    def fp8(seed: int, label: str, **sizes: Any) -> Sample:
        made = _sample(seed, f"fp8 {label}", x_format="fp8", **sizes)
        x = made.args["x"]
        if len(x) > 2:
            x[1] = 0
            x[2, 5] = 300
        if sizes.get("amax"):
            # Largest numbers with a prime mantissa: no other one lies between two codes.
            x[:, 5] = x[:, 5].sign() * 251 / 32
            made.args["x"] = x.bfloat16().float()
            made.args["x_amax"] = row_maxima(made.args)
        return made

    return [
        fp8(120, "decode", used=1, rows=1, k=64, n=48),
        fp8(121, "empty", used=0, rows=2, k=64, n=32),
        fp8(122, "odd outputs", used=3, rows=4, k=160, n=77, bias=True),
        fp8(123, "norm qkv", used=3, rows=3, k=256, n=96, bias=True, norm=True),
        fp8(124, "residual", used=9, rows=12, k=160, n=64, residual=True),
        fp8(125, "swiglu", used=5, rows=8, k=128, n=2 * 80, norm=True, act="swiglu"),
        fp8(126, "head", used=3, rows=4, k=128, n=200, norm=True, gather=True, softcap=0.7),
        fp8(127, "two choices", used=13, rows=13, k=64, n=48, residual=True, gather=True),
        fp8(128, "chunk", used=70, rows=72, k=128, n=144, norm=True, scale=0.5),
        fp8(129, "long rows", used=2, rows=2, k=4352, n=32, norm=True),
        fp8(130, "maxima", used=9, rows=12, k=160, n=64, residual=True, amax=True),
        fp8(
            131,
            "maxima, swiglu",
            used=5,
            rows=8,
            k=128,
            n=2 * 80,
            norm=True,
            act="swiglu",
            amax=True,
        ),
        fp8(
            132,
            "maxima, two choices",
            used=13,
            rows=13,
            k=64,
            n=144,
            residual=True,
            gather=True,
            amax=True,
        ),
        fp8(133, "maxima, one", used=1, rows=1, k=192, n=96, norm=True, bias=True, amax=True),
        fp8(134, "maxima, chunk", used=70, rows=72, k=256, n=128, norm=True, amax=True),
    ]


def row_maxima(args: dict[str, Any]) -> Tensor:
    """`x_amax` of a linear's x."""
    return part_maxima(args["x"], {"amax_norm": args.get("norm")})


LINEAR = register(
    Op(
        name="linear",
        args=(
            LIVE,
            Arg(name="x", role="input", dims=("x_rows", "K"), dtypes=("float",)),
            Arg(name="w", role="weight", dims=("N", "K"), dtypes=("float",)),
            Arg(name="bias", role="weight", dims=("N",), dtypes=("float",), optional=True),
            Arg(name="norm", role="weight", dims=("K",), dtypes=("float",), optional=True),
            X_AMAX,
            Arg(
                name="residual",
                role="input",
                dims=("y_rows", "O"),
                dtypes=("float",),
                optional=True,
            ),
            Arg(name="rows", role="input", dims=("seqs",), dtypes=("int32",), optional=True),
            Arg(
                name="residual_rows",
                role="input",
                dims=("seqs",),
                dtypes=("int32",),
                optional=True,
            ),
            Arg(name="out", role="output", dims=("R", "O"), dtypes=("float",)),
            amax_norm("O"),
            out_amax("R"),
        ),
        attrs={
            "eps": float,
            "act": str,
            "live_index": int,
            "scale": float,
            "softcap": float,
            "x_format": str,
        },
        reference=linear_reference,
        cost=_cost,
        samples=_samples,
        tolerance={"float32": 5e-5, "bfloat16": 2e-2},
    )
)
