"""Row-wise kernels: add."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code import pdl


@triton.jit
def add_kernel(live_ptr, a_ptr, b_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    pdl.wait()
    row = tl.program_id(0)
    if row < tl.load(live_ptr):
        for start in range(0, WIDTH, BLOCK):
            column = start + tl.arange(0, BLOCK)
            at = row.to(tl.int64) * WIDTH + column
            mask = column < WIDTH
            a = tl.load(a_ptr + at, mask, 0.0).to(tl.float32)
            b = tl.load(b_ptr + at, mask, 0.0).to(tl.float32)
            tl.store(out_ptr + at, (a + b).to(out_ptr.dtype.element_ty), mask)
    pdl.release()
