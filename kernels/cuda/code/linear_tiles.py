"""linear in tiles, for any number of rows, and the prologue that writes normalised or chosen rows
for the large ones."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code import pdl
from kernels.cuda.code.linear_ends import reduce, store
from kernels.cuda.code.product import ahead, product


@triton.jit
def corner(
    live,
    tile,
    OUTPUTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SUPER: tl.constexpr,
):
    """First row and column of a tile. SUPER row tiles beside each other share the weights they
    read, then the next weights."""
    TILES_N: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    tiles_m = (live + BLOCK_M - 1) // BLOCK_M
    first = tile // (SUPER * TILES_N) * SUPER
    beside = tl.minimum(tiles_m - first, SUPER)
    inside = tile % (SUPER * TILES_N)
    return (first + inside % beside) * BLOCK_M, inside // beside * BLOCK_N


@triton.jit
def tile_sums(
    live,
    tile,
    split,
    x,
    w,
    scale_ptr,
    norm_ptr,
    rows_ptr,
    part_ptr,
    counter_ptr,
    OUTPUTS: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    GATED: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    X_LEFT: tl.constexpr,
    SUPER: tl.constexpr,
    STAGES: tl.constexpr,
):
    """First row and column of a tile, its sums as `reduce` gives them."""
    m0, n0 = corner(live, tile, OUTPUTS, BLOCK_N, BLOCK_M, SUPER)
    m = m0 + tl.arange(0, BLOCK_M)
    n = n0 + tl.arange(0, BLOCK_N)
    here = m < live
    row = m
    if rows_ptr is not None:
        row = tl.load(rows_ptr + m, here, 0)
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    PART: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT * BLOCK_K
    begin = split * PART
    if SPLIT == 1:
        end = PART
    else:
        end = tl.minimum(begin + PART, STEPS * BLOCK_K)
    acc, acc_up, square = product(
        x,
        row.to(tl.int64) * K,
        m0,
        here,
        w,
        scale_ptr,
        norm_ptr,
        n0,
        OUTPUTS + n0,
        n < OUTPUTS,
        begin,
        end,
        K,
        BITS,
        GROUP,
        GATED,
        X_TMA,
        W_TMA,
        TYPE,
        BLOCK_N,
        BLOCK_M,
        BLOCK_K,
        STAGES,
        X_LEFT,
    )
    acc, acc_up, square, last = reduce(
        acc,
        acc_up,
        square,
        tile,
        split,
        part_ptr,
        counter_ptr,
        GATED,
        norm_ptr is not None,
        BLOCK_N,
        BLOCK_M,
        SPLIT,
    )
    return m0, n0, acc, acc_up, square, last


@triton.jit
def _tile(
    live,
    tile,
    split,
    x,
    w,
    scale_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    rows_ptr,
    residual_rows_ptr,
    out_ptr,
    part_ptr,
    counter_ptr,
    OUTPUTS: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    TYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    X_LEFT: tl.constexpr,
    SUPER: tl.constexpr,
    STAGES: tl.constexpr,
):
    m0, n0, acc, acc_up, square, last = tile_sums(
        live,
        tile,
        split,
        x,
        w,
        scale_ptr,
        norm_ptr,
        rows_ptr,
        part_ptr,
        counter_ptr,
        OUTPUTS,
        K,
        BITS,
        GROUP,
        GATED,
        X_TMA,
        W_TMA,
        TYPE,
        BLOCK_N,
        BLOCK_M,
        BLOCK_K,
        SPLIT,
        X_LEFT,
        SUPER,
        STAGES,
    )
    if last:
        m = m0 + tl.arange(0, BLOCK_M)
        store(
            acc,
            acc_up,
            square,
            m,
            m < live,
            n0 + tl.arange(0, BLOCK_N),
            scale_ptr if BITS == 0 else None,
            bias_ptr,
            residual_ptr,
            residual_rows_ptr,
            out_ptr,
            OUTPUTS,
            norm_ptr is not None,
            K,
            EPS,
            ACT,
            GATED,
            SCALE,
            SOFTCAP,
        )


@triton.jit
def tiles_kernel(
    live_ptr,
    x,
    w,
    w_ptr,
    scale_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    rows_ptr,
    residual_rows_ptr,
    out_ptr,
    part_ptr,
    counter_ptr,
    LIVE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    K: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    EPS: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    X_LEFT: tl.constexpr,
    SUPER: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out [R, OUTPUTS]. x and w: pointers, or descriptors with X_TMA and W_TMA; w_ptr: the weights
    again for prefetching, or None. HALF: multiply in bfloat16, else in float32. Programs take tiles
    `PROGRAMS` apart (0: exactly one each)."""
    TYPE: tl.constexpr = tl.bfloat16 if HALF else tl.float32
    TILES_N: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    if w_ptr is not None:
        # With one row tile the weights of a program are known before anything else is.
        ahead(w_ptr, program, OUTPUTS, K, ROW_BYTES, GATED, BLOCK_N, BLOCK_K, SPLIT)
    pdl.wait()
    live = tl.load(live_ptr + LIVE)
    total = (live + BLOCK_M - 1) // BLOCK_M * TILES_N * SPLIT
    # Not one loop that happens to run once: it would take half as many registers again (56 -> 90 at
    # 8 rows, 172 -> 255 at 64 rows of a gated bfloat16 product).
    if PROGRAMS == 0:
        if program < total:
            _tile(
                live,
                program // SPLIT,
                program % SPLIT,
                x,
                w,
                scale_ptr,
                bias_ptr,
                norm_ptr,
                residual_ptr,
                rows_ptr,
                residual_rows_ptr,
                out_ptr,
                part_ptr,
                counter_ptr,
                OUTPUTS,
                K,
                EPS,
                ACT,
                GATED,
                SCALE,
                SOFTCAP,
                BITS,
                GROUP,
                X_TMA,
                W_TMA,
                TYPE,
                BLOCK_N,
                BLOCK_M,
                BLOCK_K,
                SPLIT,
                X_LEFT,
                SUPER,
                STAGES,
            )
    else:
        for unit in tl.range(program, total, PROGRAMS):
            _tile(
                live,
                unit // SPLIT,
                unit % SPLIT,
                x,
                w,
                scale_ptr,
                bias_ptr,
                norm_ptr,
                residual_ptr,
                rows_ptr,
                residual_rows_ptr,
                out_ptr,
                part_ptr,
                counter_ptr,
                OUTPUTS,
                K,
                EPS,
                ACT,
                GATED,
                SCALE,
                SOFTCAP,
                BITS,
                GROUP,
                X_TMA,
                W_TMA,
                TYPE,
                BLOCK_N,
                BLOCK_M,
                BLOCK_K,
                SPLIT,
                X_LEFT,
                SUPER,
                STAGES,
            )
    pdl.release()


@triton.jit
def rows_kernel(
    live_ptr,
    x_ptr,
    norm_ptr,
    rows_ptr,
    out_ptr,
    LIVE: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row per program: x[rows], normalised when there is a norm, in out's type."""
    pdl.wait()
    program = tl.program_id(0)
    if program < tl.load(live_ptr + LIVE):
        row = program
        if rows_ptr is not None:
            row = tl.load(rows_ptr + program)
        x_ptr += row.to(tl.int64) * K
        out_ptr += program.to(tl.int64) * K
        inverse = 1.0
        if norm_ptr is not None:
            square = tl.zeros((BLOCK,), tl.float32)
            for start in tl.static_range(0, K, BLOCK):
                column = start + tl.arange(0, BLOCK)
                x = tl.load(x_ptr + column, column < K, 0.0).to(tl.float32)
                square += x * x
            inverse = tl.rsqrt(tl.sum(square, 0) / K + EPS)
        for start in tl.static_range(0, K, BLOCK):
            column = start + tl.arange(0, BLOCK)
            y = tl.load(x_ptr + column, column < K, 0.0).to(tl.float32)
            if norm_ptr is not None:
                y = y * inverse * tl.load(norm_ptr + column, column < K, 0.0).to(tl.float32)
            tl.store(out_ptr + column, y.to(out_ptr.dtype.element_ty), column < K)
    pdl.release()
