"""One vector per sequence: what an embedding model gives instead of logits.

T tokens, S sequences, D model. Sequence s owns tokens seq_start[s] .. seq_start[s+1]. The vector is
that of its last token, of its first ("cls"), or the mean of all; `normalise` divides it by its
length (at least 1e-12). Status 0: ok; 1: numbers that are not finite, the vector is 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.op import Arg, Cost, Op, Sample, register
from kernels.ops.embed import LIVE, live_count
from kernels.ops.samples import floats, generator, live, padded

POOLINGS = ("last", "cls", "mean")


def pool_reference(args: dict[str, Any], attrs: dict[str, Any]) -> dict[str, Tensor]:
    x, starts = args["x"], args["seq_start"].tolist()
    seqs = len(starts) - 1
    out = torch.zeros(seqs, x.shape[1])
    status = torch.zeros(seqs, dtype=torch.int32)
    for s in range(live_count(args, 1)):
        own = x[starts[s] : starts[s + 1]].float()
        vector = {"last": own[-1], "cls": own[0], "mean": own.mean(0)}[attrs["pooling"]]
        if not torch.isfinite(vector).all():
            status[s] = 1
            continue
        out[s] = F.normalize(vector, dim=0) if attrs["normalise"] else vector
    return {"embedding": out, "status": status}


def _cost(shapes: dict[str, tuple[int, ...]], attrs: dict[str, Any]) -> Cost:
    tokens, dim = shapes["x"]
    seqs = shapes["embedding"][0]
    rows = tokens if attrs["pooling"] == "mean" else seqs
    return Cost(read=rows * dim * 4, written=seqs * dim * 4, flops=(rows + 2 * seqs) * dim)


def _samples() -> list[Sample]:
    out = []
    for n, pooling in enumerate(POOLINGS):
        for label, dim, normalise in (("", 96, True), ("odd, raw", 37, False)):
            g = generator(90 + n)
            args = {
                "live": live(9, 3, 3),
                "x": floats(g, 12, dim, used=9),
                "seq_start": padded([0, 1, 7, 9], 6),
            }
            attrs = {"pooling": pooling, "normalise": normalise}
            out.append(Sample(label=f"{pooling} {label}".strip(), args=args, attrs=attrs))
    g = generator(95)
    bad = floats(g, 4, 64)
    bad[2, 5] = float("inf")
    attrs = {"pooling": "mean", "normalise": True}
    args = {"live": live(4, 2, 2), "x": bad, "seq_start": padded([0, 2, 4], 3)}
    out.append(Sample(label="not finite", args=args, attrs=attrs))
    args = {"live": live(), "x": bad, "seq_start": padded([0], 3)}
    out.append(Sample(label="empty", args=args, attrs=attrs))
    return out


POOL = register(
    Op(
        name="pool",
        args=(
            LIVE,
            Arg(name="x", role="input", dims=("tokens", "D"), dtypes=("float",)),
            Arg(name="seq_start", role="input", dims=("seqs+1",), dtypes=("int32",)),
            Arg(name="embedding", role="output", dims=("seqs", "D"), dtypes=("float32",)),
            Arg(name="status", role="output", dims=("seqs",), dtypes=("int32",)),
        ),
        attrs={"pooling": str, "normalise": bool},
        reference=pool_reference,
        cost=_cost,
        samples=_samples,
    )
)
