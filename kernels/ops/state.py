"""Per-sequence token state: how often a token was produced, whether the prompt holds it, its bias;
and the edits of a step.

V vocabulary. Edits run before sampling, in order; the scheduler sends them when a sequence gets its
slot.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kernels.op import Arg, Cost, Op, Sample, register
from kernels.ops.embed import LIVE, live_count
from kernels.ops.samples import POISON, floats, generator, live

SEEN = 1 << 30  # bit of counts: the token stands in the prompt
CLEAR, MARK, COUNT, BIAS = 0, 1, 2, 3  # kinds of edits


def edit_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    counts, bias = args["counts"], args["bias"]
    for slot, token, kind, value in args["edits"][: live_count(args, 3)].tolist():
        if kind == CLEAR:
            counts[slot] = 0
            bias[slot] = 0
        elif kind == MARK:
            counts[slot, token] |= SEEN
        elif kind == COUNT:
            counts[slot, token] += value
        else:
            bias[slot, token] = torch.tensor(value, dtype=torch.int32).view(torch.float32)
    return {}


def _edit_samples() -> list[Sample]:
    g = generator(60)
    bits = torch.tensor([1.5, -100.0, -math.inf]).view(torch.int32).tolist()
    rows = [
        (2, 0, CLEAR, 0),
        (2, 5, MARK, 0),
        (2, 5, COUNT, 3),
        (0, 1, BIAS, bits[0]),
        (2, 5, COUNT, 1),
        (0, 96, BIAS, bits[1]),
        (1, 7, COUNT, 2),
        (0, 0, CLEAR, 0),
        (0, 1, BIAS, bits[2]),
        (1, 7, MARK, 0),
    ]
    edits = torch.full((16, 4), POISON, dtype=torch.int32)
    edits[: len(rows)] = torch.tensor(rows, dtype=torch.int32)
    state = {"counts": torch.randint(0, 3, (4, 97), generator=g).int(), "bias": floats(g, 4, 97)}
    full = {"live": live(edits=len(rows)), "edits": edits, **state}
    empty = {"live": live(), "edits": torch.full((2, 4), POISON, dtype=torch.int32), **state}
    return [
        Sample(label="all kinds", args=full, attrs={}),
        Sample(label="none", args=empty, attrs={}),
    ]


COUNTS = Arg(name="counts", role="state", dims=("slots", "V"), dtypes=("int32",))
BIASES = Arg(name="bias", role="state", dims=("slots", "V"), dtypes=("float32",))

EDIT = register(
    Op(
        name="edit",
        args=(
            LIVE,
            Arg(name="edits", role="input", dims=("E", "4"), dtypes=("int32",)),
            COUNTS,
            BIASES,
        ),
        reference=edit_reference,
        cost=lambda shapes, attrs: Cost(
            read=shapes["edits"][0] * 16, written=shapes["edits"][0] * 4, flops=0
        ),
        samples=_edit_samples,
    )
)
