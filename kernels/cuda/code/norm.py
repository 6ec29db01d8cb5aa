"""Norms of rows and of heads, with what follows them."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code import pdl


@triton.jit
def norm_kernel(
    live_ptr,
    x_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    LIVE: tl.constexpr,
    EPS: tl.constexpr,
    CENTRE: tl.constexpr,
    HEADS: tl.constexpr,
    OWN: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A unit is one head of one row (HEADS is 1 for norms of rows), WIDTH wide; with OWN each head
    has its own weights. The tile stays in registers, so mean and deviations take two exact passes
    over it."""
    unit = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < WIDTH
    # Weights, like bias, are nobody's output: they may be read before the predecessor ends.
    first = (unit % HEADS) * WIDTH if OWN else 0
    w = tl.load(w_ptr + first + column, inside, 0.0).to(tl.float32)
    pdl.wait()
    units = tl.load(live_ptr + LIVE) * HEADS
    if tl.program_id(0) * ROWS < units:
        at = unit.to(tl.int64) * WIDTH + column
        mask = (unit < units) & inside
        x = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
        if CENTRE:
            x = tl.where(inside, x - tl.sum(x, axis=1, keep_dims=True) / WIDTH, 0.0)
        scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / WIDTH + EPS)
        y = x * scale * w
        if bias_ptr is not None:
            y += tl.load(bias_ptr + column, inside, 0.0).to(tl.float32)
        if residual_ptr is not None:
            y += tl.load(residual_ptr + at, mask, 0.0).to(tl.float32)
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask)
    pdl.release()
