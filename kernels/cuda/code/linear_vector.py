"""linear of one row, without tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code import pdl
from kernels.cuda.code.linear_ends import reduce, store
from kernels.cuda.code.product import ahead, code, fetch, magic, spread


@triton.jit
def vector_sums(
    tile,
    split,
    x_ptr,
    w_ptr,
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
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums of a tile of outputs [BLOCK_N, 1] of one row, on the ordinary cores in float32, as
    `reduce` gives them."""
    PER: tl.constexpr = 1 if BITS == 0 else 32 // BITS
    WORDS: tl.constexpr = 1 if BITS == 0 else GROUP // PER
    # What codes' floats exceed the codes by is taken off once per word, not per code, where the
    # cancellation (1e-4 of the products) is below the activations' own rounding.
    EXACT: tl.constexpr = x_ptr.dtype.element_ty == tl.float32
    WIDTH: tl.constexpr = K // PER  # stored columns of a row
    BLOCK: tl.constexpr = BLOCK_K // PER
    WHOLE: tl.constexpr = K % BLOCK_K == 0
    STEPS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    PART: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT * BLOCK
    begin = split * PART
    end = tl.minimum(begin + PART, WIDTH)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    there = n < OUTPUTS
    if rows_ptr is not None:
        x_ptr += tl.load(rows_ptr).to(tl.int64) * K
    zero = tl.program_id(2) * 0x12345679  # no bit of it is known
    sums = tl.zeros((BLOCK_N, BLOCK), tl.float32)
    sums_up = tl.zeros((BLOCK_N, BLOCK), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    gate_row = n.to(tl.int64)[:, None]
    up_row = (OUTPUTS + n).to(tl.int64)[:, None]
    for start in tl.range(begin, end, BLOCK, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK)
        mask = there[:, None]
        inside = column < WIDTH
        if not WHOLE:
            mask = mask & inside[None, :]
        b = fetch(w_ptr + gate_row * WIDTH + column[None, :], mask)
        if GATED:
            c = fetch(w_ptr + up_row * WIDTH + column[None, :], mask)
        if BITS != 0:
            group = start // WORDS + tl.arange(0, BLOCK // WORDS)
            there_s = there[:, None] & (group < K // (WORDS * PER))[None, :]
            at = gate_row * (K // GROUP) + group[None, :]
            s = spread(tl.load(scale_ptr + at, there_s, 0.0), BLOCK_N, BLOCK // WORDS, WORDS)
            if GATED:
                at = up_row * (K // GROUP) + group[None, :]
                s_up = spread(tl.load(scale_ptr + at, there_s, 0.0), BLOCK_N, BLOCK // WORDS, WORDS)
        total = tl.zeros((BLOCK_N, BLOCK), tl.float32)
        total_up = tl.zeros((BLOCK_N, BLOCK), tl.float32)
        excess = tl.zeros((BLOCK,), tl.float32)
        inputs = (column // WORDS) * (WORDS * PER) + column % WORDS
        for i in tl.static_range(PER):
            if WHOLE:
                x = tl.load(x_ptr + inputs + i * WORDS).to(tl.float32)
            else:
                x = tl.load(x_ptr + inputs + i * WORDS, inside, 0.0).to(tl.float32)
            if norm_ptr is not None:
                squares += x * x
                if WHOLE:
                    x *= tl.load(norm_ptr + inputs + i * WORDS).to(tl.float32)
                else:
                    x *= tl.load(norm_ptr + inputs + i * WORDS, inside, 0.0).to(tl.float32)
            if BITS == 0:
                sums += b.to(tl.float32) * x[None, :]
                if GATED:
                    sums_up += c.to(tl.float32) * x[None, :]
            elif EXACT:
                total += (code(b, zero, i, BITS) - magic(i, BITS)) * x[None, :]
                if GATED:
                    total_up += (code(c, zero, i, BITS) - magic(i, BITS)) * x[None, :]
            else:
                excess += magic(i, BITS) * x
                total += code(b, zero, i, BITS) * x[None, :]
                if GATED:
                    total_up += code(c, zero, i, BITS) * x[None, :]
        if BITS != 0:
            sums += s * (total - excess[None, :])
            if GATED:
                sums_up += s_up * (total_up - excess[None, :])
    acc, acc_up, square, last = reduce(
        tl.sum(sums, 1)[:, None],
        tl.sum(sums_up, 1)[:, None],
        tl.zeros((1,), tl.float32) + tl.sum(squares, 0),
        tile,
        split,
        part_ptr,
        counter_ptr,
        GATED,
        norm_ptr is not None,
        BLOCK_N,
        1,
        SPLIT,
    )
    return acc, acc_up, square, last


@triton.jit
def vector_kernel(
    live_ptr,
    x_ptr,
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
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One row, on the ordinary cores in float32: narrow tiles of outputs, so that many programs
    stream at once without a second pass, and no work for rows that do not exist."""
    program = tl.program_id(0)
    if AHEAD:
        ahead(w_ptr, program, OUTPUTS, K, ROW_BYTES, GATED, BLOCK_N, BLOCK_K, SPLIT)
    pdl.wait()
    live = tl.load(live_ptr + LIVE)
    if live > 0:
        acc, acc_up, square, last = vector_sums(
            program // SPLIT,
            program % SPLIT,
            x_ptr,
            w_ptr,
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
            BLOCK_N,
            BLOCK_K,
            SPLIT,
            STAGES,
        )
        if last:
            m = tl.arange(0, 1)
            store(
                acc,
                acc_up,
                square,
                m,
                m < live,
                program // SPLIT * BLOCK_N + tl.arange(0, BLOCK_N),
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
    pdl.release()
