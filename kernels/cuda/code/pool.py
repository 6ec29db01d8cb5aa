"""One vector per sequence, for embedding models."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code import pdl


@triton.jit
def pool_kernel(
    live_ptr,
    x_ptr,
    start_ptr,
    out_ptr,
    status_ptr,
    POOLING: tl.constexpr,
    NORMALISE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program per sequence; a mean reads ROWS tokens at a time."""
    pdl.wait()
    s = tl.program_id(0)
    if s < tl.load(live_ptr + 1):
        first = tl.load(start_ptr + s).to(tl.int64)
        last = tl.load(start_ptr + s + 1).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < WIDTH
        if POOLING == "mean":
            total = tl.zeros((BLOCK,), tl.float32)
            for at in range(first, last, ROWS):
                row = at + tl.arange(0, ROWS)[:, None]
                mask = (row < last) & inside[None, :]
                x = tl.load(x_ptr + row * WIDTH + column[None, :], mask, 0.0)
                total += tl.sum(x.to(tl.float32), axis=0)
            vector = total / (last - first).to(tl.float32)
        else:
            row = first if POOLING == "cls" else last - 1
            vector = tl.load(x_ptr + row * WIDTH + column, inside, 0.0).to(tl.float32)
        # An infinite or undefined x has x - x undefined.
        bad = tl.max((vector - vector != 0.0).to(tl.int32), axis=0)
        if NORMALISE:
            length = tl.sqrt(tl.sum(vector * vector, axis=0))
            vector = vector / tl.maximum(length, 1e-12)
        vector = tl.where(bad != 0, 0.0, vector)
        tl.store(out_ptr + s.to(tl.int64) * WIDTH + column, vector, inside)
        tl.store(status_ptr + s, bad)
    pdl.release()
