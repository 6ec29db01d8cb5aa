"""linear on e4m3 codes of both operands: the rows' codes and scales (`e4m3_rows` of
kernels/ops/linear.py) and tiles of their product.

A row's codes are its numbers times 448 / largest, its scale largest / 448. A norm's factor is the
same for the whole row, so it changes the scale alone: codes are made of x * norm, whatever computes
them, and only the order of the sum of squares may differ between configurations, in the scale's
last bits. Where codes are made on the way into the product, the squares are summed there too, and
rows of 64 and more are the left operand, which wgmma takes from registers.

Hopper's tensor cores keep about 14 bits of a sum of fp8 products (DeepSeek-V3 report, 3.3.2). So
each step of at most 128 inputs has a sum of its own, added to the others in float32, as DeepGEMM
does. Not through `max_num_imprecise_acc`: with it Triton adds sums before it has waited for them,
and leaves the repair to ptxas (C7517).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code import pdl
from kernels.cuda.code.amax import load_maxima, store_maxima
from kernels.cuda.code.linear_ends import reduce, store
from kernels.cuda.code.linear_tiles import corner
from kernels.cuda.code.product import ahead, fetch


@triton.jit
def _scales(largest):
    """What numbers are multiplied with to become codes, and what codes stand for."""
    largest = tl.maximum(largest, 7.888609052210118e-31)  # 2^-100, `LEAST` of the op
    return 448.0 / largest, largest * (1.0 / 448.0)


@triton.jit
def rows_kernel(
    live_ptr,
    x_ptr,
    norm_ptr,
    rows_ptr,
    codes_ptr,
    scales_ptr,
    LIVE: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row per program: codes [R, K] and scales [R] of norm(x)[rows]. A row that fits into a
    block stays in registers between its largest number and its codes."""
    NORM: tl.constexpr = norm_ptr is not None
    WHOLE: tl.constexpr = K <= BLOCK
    program = tl.program_id(0)
    first = tl.arange(0, BLOCK)
    if WHOLE and NORM:  # weights are nobody's output
        norm = tl.load(norm_ptr + first, first < K, 0.0).to(tl.float32)
    pdl.wait()
    if program < tl.load(live_ptr + LIVE):
        row = program
        if rows_ptr is not None:
            row = tl.load(rows_ptr + program)
        x_ptr += row.to(tl.int64) * K
        codes_ptr += program.to(tl.int64) * K
        if WHOLE:
            x = tl.load(x_ptr + first, first < K, 0.0).to(tl.float32)
            square = tl.sum(x * x, 0)
            if NORM:
                x = x * norm
            up, scale = _scales(tl.max(tl.abs(x), 0))
            tl.store(codes_ptr + first, (x * up).to(tl.float8e4nv), first < K)
        else:
            largest = tl.zeros((BLOCK,), tl.float32)
            squares = tl.zeros((BLOCK,), tl.float32)
            for start in tl.static_range(0, K, BLOCK):
                column = start + first
                x = tl.load(x_ptr + column, column < K, 0.0).to(tl.float32)
                squares += x * x
                if NORM:
                    x = x * tl.load(norm_ptr + column, column < K, 0.0).to(tl.float32)
                largest = tl.maximum(largest, tl.abs(x))
            square = tl.sum(squares, 0)
            up, scale = _scales(tl.max(largest, 0))
            for start in tl.static_range(0, K, BLOCK):
                column = start + first
                x = tl.load(x_ptr + column, column < K, 0.0).to(tl.float32)
                if NORM:
                    x = x * tl.load(norm_ptr + column, column < K, 0.0).to(tl.float32)
                tl.store(codes_ptr + column, (x * up).to(tl.float8e4nv), column < K)
        if NORM:
            scale = scale * tl.rsqrt(square / K + EPS)
        tl.store(scales_ptr + program, scale)
    pdl.release()


@triton.jit
def _own_maxima(
    x_ptr,
    norm_ptr,
    rows_ptr,
    m,
    live,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Largest numbers of rows m [BLOCK_M], of which the first ROWS may exist: the others would only
    fill registers. All of a row is on its way at a time."""
    r = tl.arange(0, ROWS)
    there = r < live
    row = r
    if rows_ptr is not None:
        row = tl.load(rows_ptr + r, there, 0)
    largest = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in tl.static_range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < K
        at = row.to(tl.int64)[:, None] * K + column[None, :]
        x = tl.load(x_ptr + at, there[:, None] & inside[None, :], 0.0).to(tl.float32)
        if norm_ptr is not None:
            x = x * tl.load(norm_ptr + column, inside, 0.0).to(tl.float32)[None, :]
        largest = tl.maximum(largest, tl.abs(x))
    same = m[:, None] == r[None, :]
    return tl.sum(tl.where(same, tl.max(largest, 1)[None, :], 0.0), 1)


@triton.jit
def _x_codes(
    x,
    x_at,
    first_row,
    here,
    norm_ptr,
    up,
    square,
    k,
    K: tl.constexpr,
    X_TMA: tl.constexpr,
    MADE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Codes of an activation tile [rows, BLOCK_K]: read, or made here, which adds to the sums of
    squares for a norm."""
    column = k + tl.arange(0, BLOCK_K)
    if X_TMA:
        tile = x.load([first_row, k])
    else:
        mask = here[:, None]
        if K % BLOCK_K != 0:
            mask = mask & (column < K)[None, :]
        if MADE:
            tile = fetch(x + x_at[:, None] + column[None, :], mask)
        else:
            tile = tl.load(x + x_at[:, None] + column[None, :], mask, 0.0)
    if not MADE:
        wide = tile.to(tl.float32)
        if norm_ptr is not None:
            square += tl.sum(wide * wide, 1)
            if K % BLOCK_K == 0:
                norm = tl.load(norm_ptr + column)
            else:
                norm = tl.load(norm_ptr + column, column < K, 0.0)
            wide = wide * norm.to(tl.float32)[None, :]
        tile = (wide * up[:, None]).to(tl.float8e4nv)
    return tile, square


@triton.jit
def _w_codes(
    w,
    first_row,
    there,
    k,
    K: tl.constexpr,
    W_TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Codes of a weight tile [BLOCK_N, BLOCK_K]."""
    if W_TMA:
        tile = w.load([first_row, k])
    else:
        column = k + tl.arange(0, BLOCK_K)
        mask = there[:, None]
        if K % BLOCK_K != 0:
            mask = mask & (column < K)[None, :]
        row = (first_row + tl.arange(0, BLOCK_N)).to(tl.int64)
        tile = fetch(w + row[:, None] * K + column[None, :], mask)
    return tile


@triton.jit
def _multiply(w, x, X_LEFT: tl.constexpr):
    """Sums of one step, of which nothing else is part."""
    if X_LEFT:
        left, right = x, w
    else:
        left, right = w, x
    return tl.dot(left, tl.trans(right))


@triton.jit
def _tile(
    live,
    tile,
    split,
    x,
    x_scale_ptr,
    x_amax_ptr,
    w,
    scale_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    rows_ptr,
    residual_rows_ptr,
    out_ptr,
    amax_norm_ptr,
    amax_ptr,
    part_ptr,
    counter_ptr,
    OUTPUTS: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    X_LEFT: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    SUPER: tl.constexpr,
    STAGES: tl.constexpr,
):
    MADE: tl.constexpr = x_scale_ptr is not None
    m0, n0 = corner(live, tile, OUTPUTS, BLOCK_N, BLOCK_M, SUPER)
    m = m0 + tl.arange(0, BLOCK_M)
    n = n0 + tl.arange(0, BLOCK_N)
    here = m < live
    there = n < OUTPUTS
    row = m
    up = tl.zeros((BLOCK_M,), tl.float32)
    if MADE:
        scale = tl.load(x_scale_ptr + m, here, 0.0)
    else:
        if rows_ptr is not None:
            row = tl.load(rows_ptr + m, here, 0)
        if x_amax_ptr is not None:
            largest = load_maxima(x_amax_ptr, row, here, PARTS, BLOCK_X)
        else:
            largest = _own_maxima(x, norm_ptr, rows_ptr, m, live, K, ROWS, BLOCK_X)
        up, scale = _scales(largest)
    x_at = row.to(tl.int64) * K

    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    SHARE: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT * BLOCK_K
    begin = split * SHARE
    if SPLIT == 1:
        end = SHARE
    else:
        end = tl.minimum(begin + SHARE, STEPS * BLOCK_K)
    LEFT: tl.constexpr = BLOCK_M if X_LEFT else BLOCK_N
    RIGHT: tl.constexpr = BLOCK_N if X_LEFT else BLOCK_M
    acc = tl.zeros((LEFT, RIGHT), tl.float32)
    acc_up = tl.zeros((LEFT, RIGHT), tl.float32)
    square = tl.zeros((BLOCK_M,), tl.float32)
    for k in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        a, square = _x_codes(x, x_at, m0, here, norm_ptr, up, square, k, K, X_TMA, MADE, BLOCK_K)
        b = _w_codes(w, n0, there, k, K, W_TMA, BLOCK_N, BLOCK_K)
        acc += _multiply(b, a, X_LEFT)
        if GATED:
            c = _w_codes(w, OUTPUTS + n0, there, k, K, W_TMA, BLOCK_N, BLOCK_K)
            acc_up += _multiply(c, a, X_LEFT)
    if X_LEFT:
        acc = tl.trans(acc)
        acc_up = tl.trans(acc_up)
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
    if last:
        value = store(
            acc * scale[None, :],
            acc_up * scale[None, :],
            square,
            m,
            here,
            n,
            scale_ptr,
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
        if amax_ptr is not None:
            store_maxima(value, amax_norm_ptr, m, here, n0, amax_ptr, OUTPUTS, PART)


@triton.jit
def tiles_kernel(
    live_ptr,
    x,
    x_scale_ptr,
    x_amax_ptr,
    w,
    w_ptr,
    scale_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    rows_ptr,
    residual_rows_ptr,
    out_ptr,
    amax_norm_ptr,
    amax_ptr,
    part_ptr,
    counter_ptr,
    LIVE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    K: tl.constexpr,
    EPS: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    X_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    X_LEFT: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_X: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    SUPER: tl.constexpr,
    PROGRAMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out [R, OUTPUTS]. With x_scale_ptr x has the codes of the chosen, normalised rows (a pointer,
    or a descriptor with X_TMA); without, x has activations, and every program makes codes of them:
    by x_amax_ptr [x rows, PARTS], or else of at most ROWS rows whose largest numbers it finds
    itself, BLOCK_X at a time. amax_ptr: what is found of the rows written, in parts of PART
    columns. w: a pointer, or a descriptor with W_TMA; w_ptr: the weights again for prefetching, or
    None. Programs take tiles `PROGRAMS` apart (0: exactly one each)."""
    TILES_N: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    if w_ptr is not None:
        # With one row tile the weights of a program are known before anything else is.
        ahead(w_ptr, program, OUTPUTS, K, K, GATED, BLOCK_N, BLOCK_K, SPLIT)
    pdl.wait()
    live = tl.load(live_ptr + LIVE)
    total = (live + BLOCK_M - 1) // BLOCK_M * TILES_N * SPLIT
    # Not one loop that happens to run once: it would take more registers.
    if PROGRAMS == 0:
        if program < total:
            _tile(
                live,
                program // SPLIT,
                program % SPLIT,
                x,
                x_scale_ptr,
                x_amax_ptr,
                w,
                scale_ptr,
                bias_ptr,
                norm_ptr,
                residual_ptr,
                rows_ptr,
                residual_rows_ptr,
                out_ptr,
                amax_norm_ptr,
                amax_ptr,
                part_ptr,
                counter_ptr,
                OUTPUTS,
                K,
                EPS,
                ACT,
                GATED,
                SCALE,
                SOFTCAP,
                X_TMA,
                W_TMA,
                X_LEFT,
                ROWS,
                PARTS,
                BLOCK_X,
                PART,
                BLOCK_N,
                BLOCK_M,
                BLOCK_K,
                SPLIT,
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
                x_scale_ptr,
                x_amax_ptr,
                w,
                scale_ptr,
                bias_ptr,
                norm_ptr,
                residual_ptr,
                rows_ptr,
                residual_rows_ptr,
                out_ptr,
                amax_norm_ptr,
                amax_ptr,
                part_ptr,
                counter_ptr,
                OUTPUTS,
                K,
                EPS,
                ACT,
                GATED,
                SCALE,
                SOFTCAP,
                X_TMA,
                W_TMA,
                X_LEFT,
                ROWS,
                PARTS,
                BLOCK_X,
                PART,
                BLOCK_N,
                BLOCK_M,
                BLOCK_K,
                SPLIT,
                SUPER,
                STAGES,
            )
    pdl.release()
