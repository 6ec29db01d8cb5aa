"""Which experts a token goes to: scores of all experts, the best k, their weights, and the order in
which expert kernels read the (token, choice) pairs.

T tokens, E experts, k experts of a token. Ties go to the lower expert. Sources of the rules:
Mixtral and Qwen-MoE (softmax), gpt-oss (softmax of the chosen), DeepSeek-V2 (group limit) and
DeepSeek-V3 (sigmoid, correction bias, group limit).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.op import Arg, Cost, Op, Sample, register
from kernels.ops.embed import LIVE, live_rows
from kernels.ops.samples import POISON, floats, generator, live, with_logit_rows

SCORES = ("softmax", "sigmoid", "chosen")


def best(x: Tensor, k: int) -> Tensor:
    """Indices [T, k] of the largest values of each row, largest first, ties to the lower index."""
    return torch.sort(x, dim=1, descending=True, stable=True).indices[:, :k]


def route_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    """`score`: "softmax" or "sigmoid" of all logits, or "chosen": the logits choose and the softmax
    runs over the chosen. `bias` moves the choice, never the weights. With `groups` > 1 only the
    `kept_groups` best groups of neighbouring experts take part; a group is worth the sum of its
    `group_best` largest (biased) scores. `renormalise` divides by the sum of the chosen + 1e-20.
    """
    n, k = live_rows(args, attrs), attrs["k"]
    logits_TE = args["logits"][:n].float()
    scores = logits_TE
    if attrs["score"] == "softmax":
        scores = logits_TE.softmax(1)
    elif attrs["score"] == "sigmoid":
        scores = logits_TE.sigmoid()
    choice = scores if args.get("bias") is None else scores + args["bias"]
    if attrs["groups"] > 1:
        grouped = choice.unflatten(1, (attrs["groups"], -1))
        worth = grouped.sort(dim=2, descending=True).values[..., : attrs["group_best"]].sum(2)
        kept = torch.zeros_like(worth, dtype=torch.bool)
        kept.scatter_(1, best(worth, attrs["kept_groups"]), True)
        choice = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(1)
    ids_Tk = best(choice, k)
    weights_Tk = scores.gather(1, ids_Tk)
    if attrs["score"] == "chosen":
        weights_Tk = weights_Tk.softmax(1)
    if attrs["renormalise"]:
        weights_Tk = weights_Tk / (weights_Tk.sum(1, keepdim=True) + 1e-20)
    ids = torch.zeros(len(args["logits"]), k, dtype=torch.int32)
    weights = torch.zeros(len(args["logits"]), k)
    ids[:n], weights[:n] = ids_Tk.int(), weights_Tk * attrs["scale"]
    return {"ids": ids, "weights": weights}


def _route_cost(shapes: dict[str, tuple[int, ...]], attrs: dict[str, Any]) -> Cost:
    tokens, experts = shapes["logits"]
    return Cost(
        read=tokens * experts * 4, written=tokens * attrs["k"] * 8, flops=tokens * experts * 10
    )


def _route_sample(
    seed: int,
    label: str,
    *,
    experts: int,
    k: int,
    score: str,
    groups: int = 1,
    kept_groups: int = 1,
    group_best: int = 1,
    renormalise: bool = False,
    scale: float = 1.0,
    bias: bool = False,
    used: int = 5,
) -> Sample:
    g = generator(seed)
    logits = floats(g, used + 2, experts, used=used, scale=2.0)
    if used > 2:  # ties: the whole row; and the two best experts of a row with one far below
        logits[0] = 0.5
        logits[1, [1, experts - 1]] = 9.0
    args: dict[str, Any] = {"live": live(used), "logits": logits}
    if bias:
        args["bias"] = floats(g, experts)
    attrs = {
        "k": k,
        "score": score,
        "groups": groups,
        "kept_groups": kept_groups,
        "group_best": group_best,
        "renormalise": renormalise,
        "scale": scale,
    }
    return Sample(label=label, args=args, attrs=attrs)


def _route_samples() -> list[Sample]:
    return [
        _route_sample(70, "softmax", experts=8, k=2, score="softmax", renormalise=True),
        _route_sample(71, "softmax, not normalised", experts=60, k=4, score="softmax"),
        _route_sample(72, "chosen", experts=32, k=4, score="chosen"),
        _route_sample(
            73,
            "group limit",
            experts=24,
            k=3,
            score="softmax",
            groups=4,
            kept_groups=2,
            scale=16.0,
        ),
        _route_sample(
            74,
            "corrected groups",
            experts=32,
            k=4,
            score="sigmoid",
            groups=8,
            kept_groups=4,
            group_best=2,
            renormalise=True,
            scale=2.5,
            bias=True,
        ),
        _route_sample(75, "odd experts", experts=6, k=6, score="sigmoid", renormalise=True),
        _route_sample(76, "all kept", experts=256, k=8, score="softmax", groups=8, kept_groups=8),
        _route_sample(77, "empty", experts=4, k=1, score="softmax", used=0),
    ]


ROUTE = register(
    Op(
        name="route",
        args=(
            LIVE,
            Arg(name="logits", role="input", dims=("R", "E"), dtypes=("float",)),
            Arg(name="bias", role="weight", dims=("E",), dtypes=("float",), optional=True),
            Arg(name="ids", role="output", dims=("R", "k"), dtypes=("int32",)),
            Arg(name="weights", role="output", dims=("R", "k"), dtypes=("float32",)),
        ),
        attrs={
            "k": int,
            "score": str,
            "groups": int,
            "kept_groups": int,
            "group_best": int,
            "renormalise": bool,
            "scale": float,
            "live_index": int,
        },
        reference=route_reference,
        cost=_route_cost,
        samples=with_logit_rows(_route_samples),
    )
)


def expert_order_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    """Pair t * k + j is choice j of token t. Expert e owns the pairs order[starts[e]:starts[e+1]]
    of the flattened `order`, ascending: a counting sort. Pairs of dead tokens stand nowhere."""
    n, experts = live_rows(args, attrs), attrs["experts"]
    ids = args["ids"]
    flat = ids[:n].flatten().long()
    order = torch.zeros(ids.numel(), dtype=torch.int32)
    order[: flat.numel()] = torch.sort(flat, stable=True).indices.int()
    starts = torch.zeros(experts + 1, dtype=torch.int32)
    starts[1:] = torch.bincount(flat, minlength=experts).cumsum(0).int()
    return {"order": order.view(ids.shape), "starts": starts}


def _order_samples() -> list[Sample]:
    g = generator(78)
    out = []
    for label, used, size, k, experts in (
        ("experts without a token", 3, 5, 2, 9),
        ("many", 70, 72, 4, 16),
        ("one", 1, 1, 1, 2),
        ("empty", 0, 2, 2, 4),
    ):
        ids = torch.full((size, k), POISON, dtype=torch.int32)
        for t in range(used):
            ids[t] = torch.randperm(experts, generator=g)[:k].int()
        args = {"live": live(used), "ids": ids}
        out.append(Sample(label=label, args=args, attrs={"experts": experts}))
    return out


EXPERT_ORDER = register(
    Op(
        name="expert_order",
        args=(
            LIVE,
            Arg(name="ids", role="input", dims=("R", "k"), dtypes=("int32",)),
            Arg(name="order", role="output", dims=("R", "k"), dtypes=("int32",)),
            Arg(name="starts", role="output", dims=("E+1",), dtypes=("int32",)),
        ),
        attrs={"experts": int, "live_index": int},
        reference=expert_order_reference,
        cost=lambda shapes, attrs: Cost(
            read=shapes["ids"][0] * shapes["ids"][1] * 4,
            written=(shapes["ids"][0] * shapes["ids"][1] + attrs["experts"] + 1) * 4,
            flops=0,
        ),
        samples=with_logit_rows(_order_samples),
    )
)
