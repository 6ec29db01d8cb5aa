"""Elementwise ops of a layer: add, clip, activations gated and plain."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code import pdl
from kernels.cuda.code.activations import activate


@triton.jit
def elementwise_kernel(
    live_ptr,
    a_ptr,
    b_ptr,
    out_ptr,
    LIVE: tl.constexpr,
    ACT: tl.constexpr,
    LIMIT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = act(a) * b, act(a), a + b (no ACT) or a clamped to +-LIMIT; b may be absent."""
    pdl.wait()
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = tl.program_id(0) // BLOCKS
    if row < tl.load(live_ptr + LIVE):
        column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        at = row.to(tl.int64) * WIDTH + column
        mask = column < WIDTH
        y = tl.load(a_ptr + at, mask, 0.0).to(tl.float32)
        if ACT is not None:
            y = activate(y, ACT)
        if LIMIT is not None:
            y = tl.where(y > LIMIT, LIMIT, tl.where(y < -LIMIT, -LIMIT, y))  # NaN stays
        if b_ptr is not None:
            b = tl.load(b_ptr + at, mask, 0.0).to(tl.float32)
            if ACT is None:
                y += b
            else:
                y *= b
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask)
    pdl.release()
