"""The experts of a mixture: one linear per expert over the pairs routed to it, and the weighted sum
of what they give.

T tokens, k experts of a token, E experts, D model, F expert width, K inputs, N outputs. Pair
t * k + j is choice j of token t; `order` and `starts` come from `expert_order`. Experts without a
pair are not read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.op import Arg, Cost, Op, Sample, register
from kernels.ops.embed import LIVE, live_rows
from kernels.ops.mlp import ACTIVATIONS, GATED
from kernels.ops.route import expert_order_reference
from kernels.ops.samples import POISON, floats, generator, live, with_logit_rows

CLAMPED = "swiglu_clamped"


def gated(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """A gated act of `kernels.ops.mlp`, or swiglu_clamped (gpt-oss): with g = min(gate, 7) and u =
    up within -7..7, (u + 1) * g * sigmoid(1.702 g)."""
    if act != CLAMPED:
        return ACTIVATIONS[GATED[act]](gate) * up
    g = gate.clamp(max=7.0)
    return (up.clamp(-7.0, 7.0) + 1) * g * torch.sigmoid(1.702 * g)


def _expert_linear(args: dict[str, Any], x_pK: Tensor, act: str) -> Tensor:
    """[T, k, O] from inputs by pair [T * k, K]."""
    order, starts = args["order"], args["starts"].tolist()
    w_ENK, bias = args["w"], args.get("bias")
    experts, n = w_ENK.shape[:2]
    out = torch.zeros(order.numel(), n // 2 if act else n)
    for e in range(experts):
        pairs = order.flatten()[starts[e] : starts[e + 1]].long()
        if len(pairs) == 0:
            continue
        y = x_pK[pairs].float() @ w_ENK[e].float().T
        if bias is not None:
            y = y + bias[e * n : (e + 1) * n]
        if act:
            gate, up = y.chunk(2, dim=1)
            y = gated(gate, up, act)
        out[pairs] = y
    return out.unflatten(0, tuple(order.shape))


def moe_gate_up_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    """act(gate x, up x) of every pair; the rows of an expert are cat(gate, up) [2F, K]."""
    x = args["x"].repeat_interleave(args["order"].shape[1], 0)
    return {"out": _expert_linear(args, x, attrs["act"])}


def moe_down_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    """W x + bias of every pair; the routing weight is applied by `moe_combine`."""
    return {"out": _expert_linear(args, args["x"].flatten(0, 1), "")}


def _experts_cost(shapes: dict[str, tuple[int, ...]], attrs: dict[str, Any]) -> Cost:
    tokens, k, width = shapes["out"]
    _, n, inputs = shapes["w"]
    rows = shapes["x"][0] if len(shapes["x"]) == 2 else tokens * k
    return Cost(
        read=(rows * inputs + tokens * k) * 4,
        written=tokens * k * width * 4,
        flops=2 * tokens * k * n * inputs,
    )


def _experts_sample(
    seed: int,
    label: str,
    *,
    used: int,
    tokens: int,
    k: int,
    experts: int,
    inputs: int,
    n: int,
    act: str = "",
    bias: bool = False,
    skew: bool = False,
) -> Sample:
    """`skew`: every token chooses expert 1 first; the last expert is never chosen."""
    g = generator(seed)
    ids = torch.full((tokens, k), POISON, dtype=torch.int32)
    for t in range(used):
        ids[t] = torch.randperm(experts - 1, generator=g)[:k].int()
        if skew and 1 not in ids[t]:
            ids[t, 0] = 1
    placed = expert_order_reference({"live": live(used), "ids": ids}, {"experts": experts})
    placed["order"].view(-1)[used * k :] = POISON
    args: dict[str, Any] = {
        "live": live(used),
        "x": floats(g, tokens, inputs, used=used)
        if act
        else floats(g, tokens, k, inputs, used=used),
        **placed,
        "w": floats(g, experts, n, inputs, scale=inputs**-0.5),
    }
    if bias:
        args["bias"] = floats(g, experts * n)
    return Sample(label=label, args=args, attrs={"act": act} if act else {})


def _gate_up_samples() -> list[Sample]:
    return [
        _experts_sample(
            80, "decode", used=1, tokens=1, k=2, experts=5, inputs=64, n=2 * 48, act="swiglu"
        ),
        _experts_sample(
            81, "mixed", used=6, tokens=8, k=2, experts=4, inputs=96, n=2 * 40, act="swiglu"
        ),
        _experts_sample(
            82,
            "crowded",
            used=50,
            tokens=52,
            k=3,
            experts=6,
            inputs=128,
            n=2 * 72,
            act="swiglu",
            skew=True,
        ),
        _experts_sample(
            83,
            "clamped",
            used=7,
            tokens=9,
            k=2,
            experts=4,
            inputs=64,
            n=2 * 24,
            act="swiglu_clamped",
            bias=True,
        ),
        _experts_sample(
            84, "geglu", used=3, tokens=4, k=2, experts=4, inputs=64, n=2 * 32, act="geglu_tanh"
        ),
        _experts_sample(
            85, "empty", used=0, tokens=2, k=2, experts=4, inputs=32, n=2 * 16, act="swiglu"
        ),
    ]


def _down_samples() -> list[Sample]:
    return [
        _experts_sample(86, "decode", used=1, tokens=1, k=2, experts=5, inputs=64, n=48),
        _experts_sample(87, "bias", used=6, tokens=8, k=2, experts=4, inputs=96, n=77, bias=True),
        _experts_sample(
            88, "crowded", used=50, tokens=52, k=3, experts=6, inputs=160, n=64, skew=True
        ),
        _experts_sample(89, "empty", used=0, tokens=2, k=2, experts=4, inputs=32, n=16),
    ]


def _experts_args(x_dims: tuple[str, ...]) -> tuple[Arg, ...]:
    return (
        LIVE,
        Arg(name="x", role="input", dims=x_dims, dtypes=("float",)),
        Arg(name="order", role="input", dims=("R", "k"), dtypes=("int32",)),
        Arg(name="starts", role="input", dims=("E+1",), dtypes=("int32",)),
        Arg(name="w", role="weight", dims=("E", "N", "K"), dtypes=("float",)),
        Arg(name="bias", role="weight", dims=("E*N",), dtypes=("float",), optional=True),
        Arg(name="out", role="output", dims=("R", "k", "O"), dtypes=("float",)),
    )


MOE_GATE_UP = register(
    Op(
        name="moe_gate_up",
        args=_experts_args(("R", "K")),
        attrs={"act": str},
        reference=moe_gate_up_reference,
        cost=_experts_cost,
        samples=_gate_up_samples,
        tolerance={"float32": 5e-5, "bfloat16": 2e-2},
    )
)

MOE_DOWN = register(
    Op(
        name="moe_down",
        args=_experts_args(("R", "k", "K")),
        reference=moe_down_reference,
        cost=_experts_cost,
        samples=_down_samples,
        tolerance={"float32": 5e-5, "bfloat16": 2e-2},
    )
)


def moe_combine_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    """sum over j of weights[t, j] * y[t, j], j ascending; then the shared experts' output, times
    sigmoid(gate) where there is one; then the residual."""
    n = live_rows(args, attrs)
    y_TkD, weights = args["y"][:n], args["weights"][:n]
    total = torch.zeros(n, y_TkD.shape[2])
    for j in range(y_TkD.shape[1]):
        total = total + weights[:, j : j + 1] * y_TkD[:, j]
    if args.get("shared") is not None:
        shared = args["shared"][:n]
        total = total + (
            shared if args.get("gate") is None else shared * args["gate"][:n].sigmoid()
        )
    if args.get("residual") is not None:
        total = total + args["residual"][:n]
    out = torch.zeros(len(args["y"]), y_TkD.shape[2])
    out[:n] = total
    return {"out": out}


def _combine_cost(shapes: dict[str, tuple[int, ...]], attrs: dict[str, Any]) -> Cost:
    tokens, k, dim = shapes["y"]
    rows = k + ("shared" in shapes) + ("residual" in shapes)
    return Cost(
        read=tokens * (rows * dim + k) * 4,
        written=tokens * dim * 4,
        flops=2 * tokens * rows * dim,
    )


def _combine_samples() -> list[Sample]:
    out = []
    for seed, label, used, tokens, k, dim, extra in (
        (90, "plain", 3, 5, 2, 96, ()),
        (91, "shared", 2, 2, 4, 37, ("shared",)),
        (92, "gated shared", 4, 6, 3, 64, ("shared", "gate")),
        (93, "residual", 3, 4, 2, 48, ("residual",)),
        (94, "everything", 1, 1, 8, 80, ("shared", "gate", "residual")),
        (95, "empty", 0, 2, 2, 16, ()),
    ):
        g = generator(seed)
        args = {
            "live": live(used),
            "y": floats(g, tokens, k, dim, used=used),
            "weights": floats(g, tokens, k, used=used),
        }
        for name in extra:
            args[name] = floats(g, tokens, 1 if name == "gate" else dim, used=used)
        out.append(Sample(label=label, args=args, attrs={}))
    return out


def _optional(name: str, width: str) -> Arg:
    return Arg(name=name, role="input", dims=("R", width), dtypes=("float",), optional=True)


MOE_COMBINE = register(
    Op(
        name="moe_combine",
        args=(
            LIVE,
            Arg(name="y", role="input", dims=("R", "k", "D"), dtypes=("float",)),
            Arg(name="weights", role="input", dims=("R", "k"), dtypes=("float32",)),
            _optional("shared", "D"),
            _optional("gate", "1"),
            _optional("residual", "D"),
            Arg(name="out", role="output", dims=("R", "D"), dtypes=("float",)),
        ),
        attrs={"live_index": int},
        reference=moe_combine_reference,
        cost=_combine_cost,
        samples=with_logit_rows(_combine_samples),
    )
)
