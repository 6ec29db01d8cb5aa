"""linear_rope_kv: the products of `linear`, whose epilogue norms, turns and stores whole heads.

A tile of outputs holds whole heads, so whoever has its sums has all that a head's norm and rotation
need; with one row tiles are narrower than a head, and the last program of a head does it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code import pdl
from kernels.cuda.code.kv_write import load_head, write_heads
from kernels.cuda.code.linear_ends import finish
from kernels.cuda.code.linear_tiles import tile_sums
from kernels.cuda.code.linear_vector import vector_sums
from kernels.cuda.code.product import ahead


@triton.jit
def heads_of(
    y,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Rows of HEADS heads as heads of DIM dims, as `write_heads` takes them: all dims in pairs, or
    none where nothing is turned."""
    UNITS: tl.constexpr = y.shape[0] * HEADS
    a, b, x = y, y, y
    if ROTARY == 0:
        x = tl.reshape(y, (UNITS, DIM))
    elif INTERLEAVED:
        a, b = tl.split(tl.reshape(y, (UNITS, DIM // 2, 2)))
    else:
        a, b = tl.split(tl.permute(tl.reshape(y, (UNITS, 2, DIM // 2)), (0, 2, 1)))
    return a, b, x


@triton.jit
def halves(y):
    """The first and the second half of the rows."""
    rows: tl.constexpr = y.shape[0] // 2
    return tl.split(tl.permute(tl.reshape(y, (2, rows, y.shape[1])), (1, 2, 0)))


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
    rows_ptr,
    table_ptr,
    q_norm_ptr,
    k_norm_ptr,
    slots_ptr,
    kv_ptr,
    q_ptr,
    part_ptr,
    counter_ptr,
    OUTPUTS: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    HEAD_EPS: tl.constexpr,
    CENTRE: tl.constexpr,
    OWN: tl.constexpr,
    CLIP: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    PAGE: tl.constexpr,
    STRIDE: tl.constexpr,
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
    PIECES: tl.constexpr,
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
        False,
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
        y = finish(
            acc,
            acc_up,
            square,
            n0 + tl.arange(0, BLOCK_N),
            scale_ptr if BITS == 0 else None,
            bias_ptr,
            OUTPUTS,
            norm_ptr is not None,
            K,
            EPS,
            "",
            False,
            1.0,
            0.0,
        )
        rows = tl.trans(y)
        BESIDE: tl.constexpr = BLOCK_N // DIM
        for piece in tl.static_range(PIECES):
            some = rows
            if PIECES > 1:
                low, high = halves(rows)
                some = low if piece == 0 else high
            unit = tl.arange(0, BLOCK_M // PIECES * BESIDE)[:, None]
            t = m0 + piece * (BLOCK_M // PIECES) + unit // BESIDE
            h = n0 // DIM + unit % BESIDE
            a, b, rest = heads_of(some, BESIDE, DIM, ROTARY, INTERLEAVED)
            write_heads(
                a,
                b,
                rest,
                t,
                h,
                (t < live) & (h < HEADS + 2 * KV_HEADS),
                table_ptr,
                q_norm_ptr,
                k_norm_ptr,
                slots_ptr,
                kv_ptr,
                q_ptr,
                HEAD_EPS,
                CENTRE,
                OWN,
                CLIP,
                INTERLEAVED,
                HEADS,
                KV_HEADS,
                DIM,
                ROTARY,
                DIM if ROTARY > 0 else 0,
                PAGE,
                STRIDE,
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
    rows_ptr,
    table_ptr,
    q_norm_ptr,
    k_norm_ptr,
    slots_ptr,
    kv_ptr,
    q_ptr,
    part_ptr,
    counter_ptr,
    LIVE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    K: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    EPS: tl.constexpr,
    HEAD_EPS: tl.constexpr,
    CENTRE: tl.constexpr,
    OWN: tl.constexpr,
    CLIP: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    PAGE: tl.constexpr,
    STRIDE: tl.constexpr,
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
    PIECES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """As `linear_tiles`; BLOCK_N is a multiple of DIM. The rows of a tile are finished in
    PIECES, 1 or 2."""
    TYPE: tl.constexpr = tl.bfloat16 if HALF else tl.float32
    TILES_N: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    if w_ptr is not None:
        ahead(w_ptr, program, OUTPUTS, K, ROW_BYTES, False, BLOCK_N, BLOCK_K, SPLIT)
    pdl.wait()
    live = tl.load(live_ptr + LIVE)
    total = (live + BLOCK_M - 1) // BLOCK_M * TILES_N * SPLIT
    if PROGRAMS == 0:  # no loop, for the registers' sake
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
                rows_ptr,
                table_ptr,
                q_norm_ptr,
                k_norm_ptr,
                slots_ptr,
                kv_ptr,
                q_ptr,
                part_ptr,
                counter_ptr,
                OUTPUTS,
                K,
                EPS,
                HEAD_EPS,
                CENTRE,
                OWN,
                CLIP,
                INTERLEAVED,
                HEADS,
                KV_HEADS,
                DIM,
                ROTARY,
                PAGE,
                STRIDE,
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
                PIECES,
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
                rows_ptr,
                table_ptr,
                q_norm_ptr,
                k_norm_ptr,
                slots_ptr,
                kv_ptr,
                q_ptr,
                part_ptr,
                counter_ptr,
                OUTPUTS,
                K,
                EPS,
                HEAD_EPS,
                CENTRE,
                OWN,
                CLIP,
                INTERLEAVED,
                HEADS,
                KV_HEADS,
                DIM,
                ROTARY,
                PAGE,
                STRIDE,
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
                PIECES,
                STAGES,
            )
    pdl.release()


@triton.jit
def vector_kernel(
    live_ptr,
    x_ptr,
    w_ptr,
    scale_ptr,
    bias_ptr,
    norm_ptr,
    table_ptr,
    q_norm_ptr,
    k_norm_ptr,
    slots_ptr,
    kv_ptr,
    q_ptr,
    row_ptr,
    part_ptr,
    counter_ptr,
    LIVE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    K: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    EPS: tl.constexpr,
    HEAD_EPS: tl.constexpr,
    CENTRE: tl.constexpr,
    OWN: tl.constexpr,
    CLIP: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    PAGE: tl.constexpr,
    STRIDE: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row, as `linear_vector`; DIM is a multiple of BLOCK_N. row_ptr: [OUTPUTS] float32,
    where the tiles of a head meet. Counters: one per tile with SPLIT, then one per head."""
    program = tl.program_id(0)
    if AHEAD:
        ahead(w_ptr, program, OUTPUTS, K, ROW_BYTES, False, BLOCK_N, BLOCK_K, SPLIT)
    pdl.wait()
    live = tl.load(live_ptr + LIVE)
    if live > 0:
        TILES: tl.constexpr = OUTPUTS // BLOCK_N if SPLIT > 1 else 0
        tile = program // SPLIT
        acc, acc_up, square, last = vector_sums(
            tile,
            program % SPLIT,
            x_ptr,
            w_ptr,
            scale_ptr,
            norm_ptr,
            None,
            part_ptr,
            counter_ptr,
            OUTPUTS,
            K,
            BITS,
            GROUP,
            False,
            BLOCK_N,
            BLOCK_K,
            SPLIT,
            STAGES,
        )
        if last:
            n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            y = finish(
                acc,
                acc_up,
                square,
                n,
                scale_ptr if BITS == 0 else None,
                bias_ptr,
                OUTPUTS,
                norm_ptr is not None,
                K,
                EPS,
                "",
                False,
                1.0,
                0.0,
            )
            tl.store(row_ptr + n[:, None], y)
            tl.debug_barrier()  # all threads' stores before the release of one
            head = tile * BLOCK_N // DIM
            count = counter_ptr + TILES + head
            done = tl.atomic_add(count, 1, sem="acq_rel", scope="gpu") == DIM // BLOCK_N - 1
            if done:
                tl.store(count, 0)
                unit = tl.arange(0, 1)[:, None]
                h = head + unit
                a, b, rest = load_head(
                    row_ptr, h * DIM, unit < 1, DIM, ROTARY, PAIRS, REST, INTERLEAVED, ".cg"
                )
                write_heads(
                    a,
                    b,
                    rest,
                    unit,
                    h,
                    unit < 1,
                    table_ptr,
                    q_norm_ptr,
                    k_norm_ptr,
                    slots_ptr,
                    kv_ptr,
                    q_ptr,
                    HEAD_EPS,
                    CENTRE,
                    OWN,
                    CLIP,
                    INTERLEAVED,
                    HEADS,
                    KV_HEADS,
                    DIM,
                    ROTARY,
                    ROTARY,
                    PAGE,
                    STRIDE,
                )
    pdl.release()
