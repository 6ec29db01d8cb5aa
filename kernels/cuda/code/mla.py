"""Per-head products of latent attention: every head's inputs times its own matrix, its rotary dims
rotated behind the outputs."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code import pdl
from kernels.cuda.code.product import product, warm
from kernels.cuda.code.rope import load_pairs, rotate, store_pairs


@triton.jit
def head_linear_kernel(
    live_ptr,
    x_ptr,
    w,
    w_ptr,
    scale_ptr,
    table_ptr,
    out_ptr,
    HEADS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    K: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    W_TMA: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PAIRS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (row tiles, output tiles of all heads): row tiles of the same weights beside each other.

    x [T, HEADS * (K + ROTARY)], w [HEADS * OUTPUTS, K] (a pointer, or a descriptor with W_TMA; a
    tile that reaches into the next head's rows does not store them), out [T, HEADS * (OUTPUTS +
    ROTARY)]. w_ptr: the weights again for prefetching, or None. A head's first output tile rotates
    its dims.
    """
    TYPE: tl.constexpr = tl.bfloat16 if HALF else tl.float32
    TILES_N: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    head = tl.program_id(1) // TILES_N
    n0 = tl.program_id(1) % TILES_N * BLOCK_N
    if w_ptr is not None:
        STEP_BYTES: tl.constexpr = ROW_BYTES * BLOCK_K // K
        for i in tl.static_range(min(STEPS, 2)):
            warm(
                w_ptr,
                head * OUTPUTS + n0,
                (head + 1) * OUTPUTS,
                i * STEP_BYTES,
                ROW_BYTES,
                STEP_BYTES,
                BLOCK_N,
            )
    pdl.wait()
    live = tl.load(live_ptr)
    m0 = tl.program_id(0) * BLOCK_M
    if m0 < live:
        m = m0 + tl.arange(0, BLOCK_M)
        n = n0 + tl.arange(0, BLOCK_N)
        here = m < live
        there = n < OUTPUTS
        x_at = m.to(tl.int64) * (HEADS * (K + ROTARY)) + head * (K + ROTARY)
        out_at = m.to(tl.int64) * (HEADS * (OUTPUTS + ROTARY)) + head * (OUTPUTS + ROTARY)
        acc, _, _ = product(
            x_ptr,
            x_at,
            0,
            here,
            w,
            scale_ptr,
            None,
            head * OUTPUTS + n0,
            0,
            there,
            0,
            STEPS * BLOCK_K,
            K,
            BITS,
            GROUP,
            False,
            False,
            W_TMA,
            TYPE,
            BLOCK_N,
            BLOCK_M,
            BLOCK_K,
            STAGES,
        )
        if BITS == 0 and scale_ptr is not None:
            acc = acc * tl.load(scale_ptr + head * OUTPUTS + n, there, 0.0)[:, None]
        y = tl.trans(acc).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + out_at[:, None] + n[None, :], y, here[:, None] & there[None, :])
        if table_ptr is not None:
            if n0 == 0:
                HALF_ROTARY: tl.constexpr = ROTARY // 2
                pair = tl.arange(0, PAIRS)[None, :]
                mask = here[:, None] & (pair < HALF_ROTARY)
                at = (x_at + K)[:, None]
                a, b = load_pairs(x_ptr, at, pair, mask, HALF_ROTARY, INTERLEAVED, "")
                a, b = rotate(table_ptr, m[:, None], pair, mask, a, b, HALF_ROTARY)
                store_pairs(
                    out_ptr,
                    (out_at + OUTPUTS)[:, None],
                    pair,
                    mask,
                    a,
                    b,
                    HALF_ROTARY,
                    INTERLEAVED,
                )
    pdl.release()
