"""Largest numbers of parts of rows (kernels/ops/amax.py): written behind the rows, read in front of
their quantization."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def store_maxima(
    value,
    norm_ptr,
    m,
    here,
    n0,
    amax_ptr,
    OUTPUTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Those of a tile: `value` [rows, columns] as stored, rows m (of which there are those `here`),
    columns from n0 on, whole parts of WIDTH."""
    ROWS: tl.constexpr = value.shape[0]
    COUNT: tl.constexpr = value.shape[1] // WIDTH
    PARTS: tl.constexpr = (OUTPUTS + WIDTH - 1) // WIDTH
    n = n0 + tl.arange(0, value.shape[1])
    size = value.to(tl.float32)
    if norm_ptr is not None:
        size = size * tl.load(norm_ptr + n, n < OUTPUTS, 0.0).to(tl.float32)[None, :]
    size = tl.where(here[:, None] & (n < OUTPUTS)[None, :], tl.abs(size), 0.0)
    largest = tl.max(tl.reshape(size, (ROWS, COUNT, WIDTH)), 2)
    part = n0 // WIDTH + tl.arange(0, COUNT)
    at = m.to(tl.int64)[:, None] * PARTS + part[None, :]
    tl.store(amax_ptr + at, largest, here[:, None] & (part < PARTS)[None, :])


@triton.jit
def load_maxima(amax_ptr, row, here, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest number of each row, BLOCK parts at a time; 0 where there is none."""
    largest = tl.zeros((row.shape[0], BLOCK), tl.float32)
    for start in tl.static_range(0, PARTS, BLOCK):
        part = start + tl.arange(0, BLOCK)
        at = row.to(tl.int64)[:, None] * PARTS + part[None, :]
        mask = here[:, None] & (part < PARTS)[None, :]
        largest = tl.maximum(largest, tl.load(amax_ptr + at, mask, 0.0))
    return tl.max(largest, 1)
