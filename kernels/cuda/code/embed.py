"""Rows out of tables and out of activations."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code import pdl
from kernels.cuda.code.amax import store_maxima
from kernels.cuda.code.product import fetch


@triton.jit
def table_row(
    data_ptr,
    scale_ptr,
    row,
    column,
    mask,
    WIDTH: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """float32 values of one row of a stored matrix (kernels/cuda/layout.py). BITS 8 and 4: words
    of codes. A scale serves GROUP columns."""
    row = row.to(tl.int64)
    if BITS == 0:
        y = fetch(data_ptr + row * WIDTH + column, mask).to(tl.float32)
    else:
        PER: tl.constexpr = 32 // BITS
        WORDS: tl.constexpr = GROUP // PER
        place = column % GROUP
        at = row * (WIDTH // PER) + column // GROUP * WORDS + place % WORDS
        word = tl.load(data_ptr + at, mask, 0)
        code = (word >> (place // WORDS * BITS)) & ((1 << BITS) - 1)
        y = code.to(tl.float32) - (1 << (BITS - 1))
    if scale_ptr is not None:
        at = row * (WIDTH // GROUP) + column // GROUP
        y *= tl.load(scale_ptr + at, mask, 0.0).to(tl.float32)
    return y


@triton.jit
def embed_kernel(
    live_ptr,
    tokens_ptr,
    last_ptr,
    data_ptr,
    scale_ptr,
    out_ptr,
    amax_norm_ptr,
    amax_ptr,
    SCALE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Token -1 - s stands for the token that slot s sampled last."""
    pdl.wait()
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    t = tl.program_id(0) // BLOCKS
    if t < tl.load(live_ptr):
        token = tl.load(tokens_ptr + t)
        if token < 0:
            token = tl.load(last_ptr + (-1 - token))
        column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        mask = column < WIDTH
        y = table_row(data_ptr, scale_ptr, token, column, mask, WIDTH, BITS, GROUP) * SCALE
        at = t.to(tl.int64) * WIDTH + column
        value = y.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, value, mask)
        if amax_ptr is not None:
            unit = tl.arange(0, 1)
            first = tl.program_id(0) % BLOCKS * BLOCK
            store_maxima(
                value[None, :], amax_norm_ptr, t + unit, unit < 1, first, amax_ptr, WIDTH, PART
            )
    pdl.release()


@triton.jit
def embed_positions_kernel(
    live_ptr,
    x_ptr,
    positions_ptr,
    data_ptr,
    scale_ptr,
    types_ptr,
    types_scale_ptr,
    out_ptr,
    OFFSET: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pdl.wait()
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    t = tl.program_id(0) // BLOCKS
    if t < tl.load(live_ptr):
        row = tl.load(positions_ptr + t) + OFFSET
        column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        mask = column < WIDTH
        at = t.to(tl.int64) * WIDTH + column
        y = tl.load(x_ptr + at, mask, 0.0).to(tl.float32)
        y += table_row(data_ptr, scale_ptr, row, column, mask, WIDTH, BITS, GROUP)
        y += table_row(types_ptr, types_scale_ptr, row * 0, column, mask, WIDTH, BITS, GROUP)
        tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask)
    pdl.release()


@triton.jit
def gather_kernel(live_ptr, x_ptr, rows_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    pdl.wait()
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    r = tl.program_id(0) // BLOCKS
    if r < tl.load(live_ptr + 2):
        row = tl.load(rows_ptr + r).to(tl.int64)
        column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        mask = column < WIDTH
        x = tl.load(x_ptr + row * WIDTH + column, mask, 0.0)
        at = r.to(tl.int64) * WIDTH + column
        tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask)
    pdl.release()
