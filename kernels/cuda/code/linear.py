"""linear: tiles for any number of rows, a vector kernel for one row, and the prologue that writes
normalised or chosen rows for the large tiles."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code import pdl
from kernels.cuda.code.activations import activate, gated, tanh
from kernels.cuda.code.product import code, fetch, magic, product, spread, warm


@triton.jit
def finish(
    acc,
    acc_up,
    square,
    n,
    row_scale_ptr,
    bias_ptr,
    OUTPUTS: tl.constexpr,
    NORM: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Everything behind the product but the residual; acc [BLOCK_N, BLOCK_M], n [BLOCK_N]."""
    inside = n < OUTPUTS
    y = acc
    up = acc_up
    if NORM:
        inverse = tl.rsqrt(square / K + EPS)[None, :]
        y = y * inverse
        if GATED:
            up = up * inverse
    if row_scale_ptr is not None:
        y = y * tl.load(row_scale_ptr + n, inside, 0.0)[:, None]
        if GATED:
            up = up * tl.load(row_scale_ptr + OUTPUTS + n, inside, 0.0)[:, None]
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + n, inside, 0.0).to(tl.float32)[:, None]
        if GATED:
            up = up + tl.load(bias_ptr + OUTPUTS + n, inside, 0.0).to(tl.float32)[:, None]
    if GATED:
        y = gated(y, up, ACT)
    elif ACT != "":
        y = activate(y, ACT)
    if SCALE != 1.0:
        y = y * SCALE
    if SOFTCAP != 0.0:
        y = SOFTCAP * tanh(y / SOFTCAP)
    return y


@triton.jit
def reduce(
    acc,
    acc_up,
    square,
    tile,
    split,
    part_ptr,
    counter_ptr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Sums of all splits, and whether this program is the one that has them.

    Partial sums go to memory; whoever comes last adds them up in the order of the splits, so the
    result does not depend on who that is.
    """
    last = True
    if SPLIT > 1:
        SIZE: tl.constexpr = BLOCK_N * BLOCK_M
        UPS: tl.constexpr = SIZE if GATED else 0
        EACH: tl.constexpr = SIZE + UPS + BLOCK_M
        at = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        squares = SIZE + UPS + tl.arange(0, BLOCK_M)
        place = part_ptr + (tile * SPLIT + split) * EACH
        tl.store(place + at, acc)
        if GATED:
            tl.store(place + SIZE + at, acc_up)
        if NORM:
            tl.store(place + squares, square)
        tl.debug_barrier()  # all threads' stores before the release of one
        last = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1
        if last:
            tl.store(counter_ptr + tile, 0)
            place = part_ptr + tile * SPLIT * EACH
            acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            acc_up = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            square = tl.zeros((BLOCK_M,), tl.float32)
            for _ in range(SPLIT):
                acc += tl.load(place + at, cache_modifier=".cg")
                if GATED:
                    acc_up += tl.load(place + SIZE + at, cache_modifier=".cg")
                if NORM:
                    square += tl.load(place + squares, cache_modifier=".cg")
                place += EACH
    return acc, acc_up, square, last


@triton.jit
def store(
    acc,
    acc_up,
    square,
    m,
    here,
    n,
    row_scale_ptr,
    bias_ptr,
    residual_ptr,
    residual_rows_ptr,
    out_ptr,
    OUTPUTS: tl.constexpr,
    NORM: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """The epilogue, to rows m [BLOCK_M] and columns n [BLOCK_N] of out; returns what it stores."""
    y = finish(
        acc,
        acc_up,
        square,
        n,
        row_scale_ptr,
        bias_ptr,
        OUTPUTS,
        NORM,
        K,
        EPS,
        ACT,
        GATED,
        SCALE,
        SOFTCAP,
    )
    y = tl.trans(y)
    mask = here[:, None] & (n < OUTPUTS)[None, :]
    if residual_ptr is not None:
        row = m
        if residual_rows_ptr is not None:
            row = tl.load(residual_rows_ptr + m, here, 0)
        at = row.to(tl.int64)[:, None] * OUTPUTS + n[None, :]
        y += tl.load(residual_ptr + at, mask, 0.0).to(tl.float32)
    at = out_ptr + (m.to(tl.int64)[:, None] * OUTPUTS + n[None, :])
    value = y.to(out_ptr.dtype.element_ty)
    tl.store(at, value, mask)
    return value


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
def ahead(
    w_ptr,
    program,
    OUTPUTS: tl.constexpr,
    K: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Warms the first steps of a program whose unit is (tile of outputs, split)."""
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    STEP_BYTES: tl.constexpr = ROW_BYTES * BLOCK_K // K
    n0 = program // SPLIT * BLOCK_N
    at = program % SPLIT * ((STEPS + SPLIT - 1) // SPLIT) * STEP_BYTES
    for _ in tl.static_range(2):
        warm(w_ptr, n0, OUTPUTS, at, ROW_BYTES, STEP_BYTES, BLOCK_N)
        if GATED:
            warm(w_ptr, OUTPUTS + n0, 2 * OUTPUTS, at, ROW_BYTES, STEP_BYTES, BLOCK_N)
        at += STEP_BYTES


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
