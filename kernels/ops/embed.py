"""Rows out of tables: token embedding, learned positions, and the choice of activation rows.

T tokens, S logit rows, V vocabulary, P positions, Y token types, D model. `embed_positions` adds
row position + offset of a table and row 0 of the token types. Used by the model builder; `gather`
disappears into the LM head by fusion.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kernels.op import Arg, Cost, Op, Sample, register
from kernels.ops.amax import amax_norm, out_amax, part_maxima
from kernels.ops.samples import floats, generator, live, padded

LIVE = Arg(name="live", role="input", dims=("8",), dtypes=("int32",))


def live_count(args: dict[str, Any], index: int) -> int:
    """Tokens (0), sequences (1), logit rows (2) or edits (3) that exist in this step; the rest
    of a bucket is unspecified."""
    return int(args["live"][index])


def live_rows(args: dict[str, Any], attrs: dict[str, Any]) -> int:
    """How many rows a row-wise op has: one per token, or (`live_index` 2) one per logit row."""
    return live_count(args, attrs.get("live_index", 0))


def embed_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    n = live_count(args, 0)
    tokens, table_VD = args["tokens"], args["table"]
    out = torch.zeros(len(tokens), table_VD.shape[1])
    ids = tokens[:n].long()
    ids = torch.where(ids < 0, args["last_token"].long()[(-1 - ids).clamp(min=0)], ids)
    out[:n] = table_VD[ids].float() * attrs["scale"]
    return {"out": out, "out_amax": part_maxima(out, args)}


def _embed_cost(shapes: dict[str, tuple[int, ...]], attrs: dict[str, Any]) -> Cost:
    tokens, dim = shapes["tokens"][0], shapes["table"][1]
    written = tokens * dim * 4 + 4 * math.prod(shapes.get("out_amax", (0,)))
    return Cost(read=tokens * 4, written=written, flops=tokens * dim)


def _embed_samples() -> list[Sample]:
    g = generator(1)
    out = []
    for label, used, size, vocab, dim in (
        ("partial", 5, 8, 83, 96),
        ("one", 1, 1, 16, 64),
        ("empty", 0, 3, 20, 32),
        ("maxima", 2, 3, 20, 96),
        ("maxima before a norm", 3, 4, 20, 1088),
    ):
        tokens = padded([[0, vocab - 1, -1, -4, 7, -2][i % 6] for i in range(used)], size)
        args = {
            "live": live(used),
            "tokens": tokens,
            "last_token": torch.tensor([3, vocab - 1, 1, 15], dtype=torch.int32),
            "table": floats(g, vocab, dim),
        }
        if label == "maxima before a norm":
            args["amax_norm"] = floats(g, dim)
        out.append(
            Sample(
                label=label,
                args=args,
                attrs={"scale": 1.0 if label == "one" else 2.5},
                wanted=("out_amax",) if label.startswith("maxima") else (),
            )
        )
    return out


EMBED = register(
    Op(
        name="embed",
        args=(
            LIVE,
            Arg(name="tokens", role="input", dims=("tokens",), dtypes=("int32",)),
            Arg(name="last_token", role="state", dims=("slots",), dtypes=("int32",)),
            Arg(name="table", role="weight", dims=("V", "D"), dtypes=("float",)),
            Arg(name="out", role="output", dims=("tokens", "D"), dtypes=("float",)),
            amax_norm("D"),
            out_amax("tokens"),
        ),
        attrs={"scale": float},
        reference=embed_reference,
        cost=_embed_cost,
        samples=_embed_samples,
    )
)


def embed_positions_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    n = live_count(args, 0)
    rows = args["positions"][:n].long() + attrs["offset"]
    out = torch.zeros_like(args["x"])
    out[:n] = args["x"][:n] + args["table"][rows].float() + args["types"][0].float()
    return {"out": out}


def _embed_positions_samples() -> list[Sample]:
    g = generator(4)
    out = []
    for label, used, size, dim, offset in (("partial", 3, 4, 96, 0), ("offset", 2, 2, 32, 2)):
        args = {
            "live": live(used),
            "x": floats(g, size, dim, used=used),
            "positions": padded([5, 0, 6][:used], size),
            "table": floats(g, 9, dim),
            "types": floats(g, 2, dim),
        }
        out.append(Sample(label=label, args=args, attrs={"offset": offset}))
    return out


EMBED_POSITIONS = register(
    Op(
        name="embed_positions",
        args=(
            LIVE,
            Arg(name="x", role="input", dims=("tokens", "D"), dtypes=("float",)),
            Arg(name="positions", role="input", dims=("tokens",), dtypes=("int32",)),
            Arg(name="table", role="weight", dims=("P", "D"), dtypes=("float",)),
            Arg(name="types", role="weight", dims=("Y", "D"), dtypes=("float",)),
            Arg(name="out", role="output", dims=("tokens", "D"), dtypes=("float",)),
        ),
        attrs={"offset": int},
        reference=embed_positions_reference,
        cost=lambda shapes, attrs: Cost(
            read=math.prod(shapes["x"]) * 4,
            written=math.prod(shapes["x"]) * 4,
            flops=2 * math.prod(shapes["x"]),
        ),
        samples=_embed_positions_samples,
    )
)


def gather_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    n = live_count(args, 2)
    out = torch.zeros(len(args["rows"]), args["x"].shape[1])
    out[:n] = args["x"][args["rows"][:n].long()].float()
    return {"out": out}


def _gather_cost(shapes: dict[str, tuple[int, ...]], attrs: dict[str, Any]) -> Cost:
    size = shapes["rows"][0] * shapes["x"][1] * 4
    return Cost(read=size, written=size, flops=0)


def _gather_samples() -> list[Sample]:
    g = generator(2)
    x = floats(g, 9, 33, used=7)
    return [
        Sample(
            label="partial",
            args={"live": live(7, 3, 3), "x": x, "rows": padded([6, 0, 3], 4)},
            attrs={},
        ),
        Sample(label="empty", args={"live": live(7), "x": x, "rows": padded([], 2)}, attrs={}),
    ]


GATHER = register(
    Op(
        name="gather",
        args=(
            LIVE,
            Arg(name="x", role="input", dims=("tokens", "D"), dtypes=("float",)),
            Arg(name="rows", role="input", dims=("seqs",), dtypes=("int32",)),
            Arg(name="out", role="output", dims=("seqs", "D"), dtypes=("float",)),
        ),
        reference=gather_reference,
        cost=_gather_cost,
        samples=_gather_samples,
    )
)
