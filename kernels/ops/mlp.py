"""Elementwise ops of a layer: activations, gated or plain, the residual add, the clamp. Fusion
moves most of them into the linears around them.

T tokens, F ffn width, D model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.op import Arg, Cost, Op, Sample, register
from kernels.ops.embed import LIVE, live_count, live_rows
from kernels.ops.samples import floats, generator, live, with_logit_rows

# By the names used in attributes. gelu: x/2 (1 + erf(x/sqrt 2)); gelu_tanh: its tanh form
# (Hendrycks and Gimpel 2016); relu2: max(x, 0)^2.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
# act(gate) * up, and the activation of the gate.
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}


def gated_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    n = live_rows(args, attrs)
    out = torch.zeros_like(args["gate"])
    out[:n] = ACTIVATIONS[GATED[attrs["act"]]](args["gate"][:n]) * args["up"][:n]
    return {"out": out}


def activation_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    n = live_rows(args, attrs)
    out = torch.zeros_like(args["x"])
    out[:n] = ACTIVATIONS[attrs["act"]](args["x"][:n])
    return {"out": out}


def add_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    n = live_rows(args, attrs)
    out = torch.zeros_like(args["a"])
    out[:n] = args["a"][:n] + args["b"][:n]
    return {"out": out}


def clip_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    n = live_count(args, 0)
    out = torch.zeros_like(args["x"])
    out[:n] = args["x"][:n].clamp(-attrs["limit"], attrs["limit"])
    return {"out": out}


def _cost(names: tuple[str, ...], flops: int) -> Any:
    def cost(shapes: dict[str, tuple[int, ...]], attrs: dict[str, Any]) -> Cost:
        rows, dim = shapes[names[0]]
        size = rows * dim * 4
        return Cost(read=len(names) * size, written=size, flops=flops * rows * dim)

    return cost


def _samples(names: tuple[str, ...], scale: float, choices: tuple[dict[str, Any], ...]) -> Any:
    """Every choice of attributes on full, partial and odd rows."""

    def samples() -> list[Sample]:
        g = generator(5)
        out = []
        for attrs in choices:
            for label, used, rows, dim in (
                ("partial", 3, 5, 96),
                ("odd", 2, 2, 37),
                ("empty", 0, 1, 16),
            ):
                args = {
                    name: floats(g, rows, dim, used=used, scale=1.0 if i else scale)
                    for i, name in enumerate(names)
                }
                about = " ".join([label, *map(str, attrs.values())])
                out.append(Sample(label=about, args={"live": live(used), **args}, attrs=attrs))
        return out

    return samples


def _rows(name: str, role: str, axis: str) -> Arg:
    return Arg(name=name, role=role, dims=("R", axis), dtypes=("float",))


GATED_OP = register(
    Op(
        name="gated",
        args=(
            LIVE,
            _rows("gate", "input", "F"),
            _rows("up", "input", "F"),
            _rows("out", "output", "F"),
        ),
        attrs={"act": str, "live_index": int},
        reference=gated_reference,
        cost=_cost(("gate", "up"), 6),
        # far into both tails of the sigmoid
        samples=with_logit_rows(
            _samples(("gate", "up"), 30.0, tuple({"act": act} for act in GATED))
        ),
    )
)

ACTIVATION = register(
    Op(
        name="activation",
        args=(LIVE, _rows("x", "input", "F"), _rows("out", "output", "F")),
        attrs={"act": str, "live_index": int},
        reference=activation_reference,
        cost=_cost(("x",), 6),
        samples=with_logit_rows(_samples(("x",), 6.0, tuple({"act": act} for act in ACTIVATIONS))),
    )
)

ADD = register(
    Op(
        name="add",
        args=(
            LIVE,
            _rows("a", "input", "D"),
            _rows("b", "input", "D"),
            _rows("out", "output", "D"),
        ),
        attrs={"live_index": int},
        reference=add_reference,
        cost=_cost(("a", "b"), 1),
        samples=with_logit_rows(_samples(("a", "b"), 1.0, ({},))),
    )
)

CLIP = register(
    Op(
        name="clip",
        args=(LIVE, _rows("x", "input", "N"), _rows("out", "output", "N")),
        attrs={"limit": float},
        reference=clip_reference,
        cost=_cost(("x",), 2),
        samples=_samples(("x",), 3.0, ({"limit": 1.5},)),
    )
)
