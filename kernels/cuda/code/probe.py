"""Kernels that measure a GPU rather than serve a model: reading memory, counting, copying a tile.
Launched by the benchmarks."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code import pdl


@triton.jit
def read_kernel(x_ptr, out_ptr, blocks, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr):
    """Streams `blocks` x BLOCK int32; the sum is stored so that no load is left out."""
    total = tl.zeros((BLOCK,), tl.int32)
    for block in tl.range(tl.program_id(0), blocks, PROGRAMS, num_stages=4):
        total += tl.load(x_ptr + block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def count_kernel(x_ptr, BLOCK: tl.constexpr):
    """x += 1: a chain of n of these is right only if each waits for the one before."""
    pdl.wait()
    at = x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(at, tl.load(at) + 1)
    pdl.release()


@triton.jit
def tile_kernel(x_desc, out_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Copies one tile by TMA."""
    row = tl.program_id(0) * ROWS
    tile = x_desc.load([row, 0])
    at = (row + tl.arange(0, ROWS))[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + at, tile)
