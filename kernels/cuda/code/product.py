"""The inner product all matrix kernels share: a tile of weight rows times a tile of activation
rows.

The weight tile is the left operand (`W x^T`, out transposed): wgmma wants 64 or more rows on the
left and takes the left operand from registers, which is where quantised weights are decoded; few
activation rows then cost a narrow right operand instead of a mostly empty left one. With X_LEFT the
sides change: activations that are multiplied by a norm's weight go from registers into the product.

Weights: float rows, or 32-bit words of integer codes (`kernels.cuda.layout`). A word is decoded
without integer-to-float conversions: code bits are put into the mantissa of a float whose exponent
gives their lowest bit the weight 1, so the float is 2^e + code exactly, and one fused multiply-add
subtracts the offset and scales.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def magic(INDEX: tl.constexpr, BITS: tl.constexpr):
    """What `code`'s float exceeds the code's value by (offset of the codes included)."""
    if BITS == 8:
        return 256.0 + 128.0
    elif INDEX == 1 or INDEX == 3 or INDEX == 5:
        return 2048.0 + 8.0
    else:
        return 128.0 + 8.0


@triton.jit
def code(word, zero, INDEX: tl.constexpr, BITS: tl.constexpr):
    """Code INDEX of each word, plus `magic(INDEX)`, as float32.

    `zero` is a zero the compiler cannot see through: the exponent then comes from a register, and
    mask and exponent are one instruction, which takes a single immediate.
    """
    if BITS == 8:  # to mantissa bits 15..22
        SHIFT: tl.constexpr = 15 - 8 * INDEX
        MASK: tl.constexpr = 0x7F8000
        EXPONENT: tl.constexpr = 0x43800000
    else:  # to bits 12..15 (odd places) or 16..19: five shifts serve eight codes
        PLACE: tl.constexpr = 12 if (INDEX == 1 or INDEX == 3 or INDEX == 5) else 16
        SHIFT: tl.constexpr = PLACE - 4 * INDEX
        MASK: tl.constexpr = 0xF << PLACE
        EXPONENT: tl.constexpr = 0x45000000 if PLACE == 12 else 0x43000000
    if SHIFT >= 0:
        moved = word << SHIFT
    else:
        moved = word >> (0 - SHIFT)
    return ((moved & MASK) | (zero + EXPONENT)).to(tl.float32, bitcast=True)


@triton.jit
def fetch(pointers, mask):
    """Stored weights, zero outside the mask. They are read once a step: evict first."""
    if pointers.dtype.element_ty == tl.float8e4nv:
        bits = tl.load(
            pointers.to(tl.pointer_type(tl.uint8)), mask, 0, eviction_policy="evict_first"
        )
        tile = bits.to(tl.float8e4nv, bitcast=True)
    else:
        tile = tl.load(pointers, mask, 0, eviction_policy="evict_first")
    return tile


@triton.jit
def spread(scale, ROWS: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr):
    """Group scales [ROWS, GROUPS] for every word of the groups: [ROWS, GROUPS * WORDS]."""
    wide = tl.broadcast_to(scale.to(tl.float32)[:, :, None], (ROWS, GROUPS, WORDS))
    return tl.reshape(wide, (ROWS, GROUPS * WORDS))


@triton.jit
def warm(w, first_row, rows, k, ROW_BYTES: tl.constexpr, BYTES: tl.constexpr, ROWS: tl.constexpr):
    """Brings `BYTES` of each of `ROWS` weight rows towards the second-level cache: one load per
    32-byte sector whose value nobody waits for. Called before `pdl.wait`, so that the first tiles
    travel while the previous kernel ends."""
    row = first_row + tl.arange(0, ROWS)
    at = k + tl.arange(0, BYTES // 32) * 32
    base = w.to(tl.pointer_type(tl.int32))
    offset = row.to(tl.int64)[:, None] * (ROW_BYTES // 4) + (at // 4)[None, :]
    tl.load(base + offset, mask=(row < rows)[:, None] & (at < ROW_BYTES)[None, :], volatile=True)


@triton.jit
def _activations(
    x,
    x_at,
    first_row,
    here,
    norm_ptr,
    square,
    k,
    column,
    K: tl.constexpr,
    X_TMA: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Activation tile [rows, columns] in TYPE, times the norm's weight, and its squares' sums."""
    if X_TMA:
        tile = x.load([first_row, k])
    else:
        if WHOLE:
            mask = here[:, None]
        else:
            mask = here[:, None] & (column < K)[None, :]
        tile = tl.load(x + x_at[:, None] + column[None, :], mask, 0.0)
    if norm_ptr is not None:
        wide = tile.to(tl.float32)
        square += tl.sum(wide * wide, 1)
        if WHOLE:
            norm = tl.load(norm_ptr + column)
        else:
            norm = tl.load(norm_ptr + column, column < K, 0.0)
        tile = wide * norm.to(tl.float32)[None, :]
    return tile.to(TYPE), square


@triton.jit
def _weights(
    w,
    first_row,
    row_at,
    there,
    k,
    column,
    WIDTH: tl.constexpr,
    W_TMA: tl.constexpr,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Stored weight tile [ROWS, columns]."""
    if W_TMA:
        tile = tl.reshape(w.load([first_row, k]), (ROWS, column.shape[0]))
    else:
        if WHOLE:
            mask = there[:, None]
        else:
            mask = there[:, None] & (column < WIDTH)[None, :]
        tile = fetch(w + row_at[:, None] + column[None, :], mask)
    return tile


@triton.jit
def _widened(tile, TYPE: tl.constexpr):
    """Stored weights in the product's type. fp8 goes by way of float32: straight to bfloat16 takes
    a conversion per value in the unit of transcendental functions (F2F.BF16.F16), 16 a clock and
    multiprocessor, fewer than the memory delivers."""
    if tile.dtype == tl.float8e4nv:
        tile = tile.to(tl.float32)
    return tile.to(TYPE)


@triton.jit
def _multiply(w, x, acc, TYPE: tl.constexpr, X_LEFT: tl.constexpr):
    if X_LEFT:
        left, right = x, w
    else:
        left, right = w, x
    if TYPE == tl.float32:
        acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")
    else:
        acc = tl.dot(left, tl.trans(right), acc)
    return acc


@triton.jit
def product(
    x,
    x_at,
    x_first,
    here,
    w,
    scale_ptr,
    norm_ptr,
    w_first,
    up_first,
    there,
    begin,
    end,
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
    STAGES: tl.constexpr,
    X_LEFT: tl.constexpr = False,
):
    """Sums over inputs begin..end of w[w_first:+BLOCK_N] x^T, [BLOCK_N, BLOCK_M] float32; of
    w[up_first:+BLOCK_N] too with GATED (the first again without); and sums of x^2 [BLOCK_M] when
    there is a norm.

    x: pointer with element offsets `x_at` [BLOCK_M] of the rows and `here` [BLOCK_M], or with X_TMA
    a descriptor read from row `x_first`. w: pointer or descriptor over rows of K inputs; `there`
    [BLOCK_N]. begin and end are multiples of BLOCK_K (end may exceed K). With X_LEFT weights are
    floats.
    """
    WHOLE: tl.constexpr = K % BLOCK_K == 0
    LEFT: tl.constexpr = BLOCK_M if X_LEFT else BLOCK_N
    RIGHT: tl.constexpr = BLOCK_N if X_LEFT else BLOCK_M
    acc = tl.zeros((LEFT, RIGHT), tl.float32)
    acc_up = tl.zeros((LEFT, RIGHT), tl.float32)
    square = tl.zeros((BLOCK_M,), tl.float32)
    n = tl.arange(0, BLOCK_N)
    gate_row = (w_first + n).to(tl.int64)
    up_row = (up_first + n).to(tl.int64)
    if BITS == 0:
        for k in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
            column = k + tl.arange(0, BLOCK_K)
            a, square = _activations(
                x, x_at, x_first, here, norm_ptr, square, k, column, K, X_TMA, WHOLE, BLOCK_K, TYPE
            )
            b = _weights(w, w_first, gate_row * K, there, k, column, K, W_TMA, WHOLE, BLOCK_N)
            acc = _multiply(_widened(b, TYPE), a, acc, TYPE, X_LEFT)
            if GATED:
                c = _weights(w, up_first, up_row * K, there, k, column, K, W_TMA, WHOLE, BLOCK_N)
                acc_up = _multiply(_widened(c, TYPE), a, acc_up, TYPE, X_LEFT)
    else:
        zero = tl.program_id(2) * 0x12345679  # no bit of it is known
        PER: tl.constexpr = 32 // BITS
        WORDS: tl.constexpr = GROUP // PER  # of a group
        WIDTH: tl.constexpr = K // PER
        BLOCK_W: tl.constexpr = BLOCK_K // PER
        GROUPS: tl.constexpr = BLOCK_K // GROUP
        for k in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
            column = k // PER + tl.arange(0, BLOCK_W)
            group = k // GROUP + tl.arange(0, GROUPS)
            b = _weights(
                w, w_first, gate_row * WIDTH, there, k // PER, column, WIDTH, W_TMA, WHOLE, BLOCK_N
            )
            if WHOLE:
                mask = there[:, None]
            else:
                mask = there[:, None] & (group < K // GROUP)[None, :]
            at = gate_row[:, None] * (K // GROUP) + group[None, :]
            s = spread(tl.load(scale_ptr + at, mask, 0.0), BLOCK_N, GROUPS, WORDS)
            if GATED:
                c = _weights(
                    w,
                    up_first,
                    up_row * WIDTH,
                    there,
                    k // PER,
                    column,
                    WIDTH,
                    W_TMA,
                    WHOLE,
                    BLOCK_N,
                )
                at = up_row[:, None] * (K // GROUP) + group[None, :]
                s_up = spread(tl.load(scale_ptr + at, mask, 0.0), BLOCK_N, GROUPS, WORDS)
            inputs = (column // WORDS) * GROUP + column % WORDS
            for i in tl.static_range(PER):
                a, square = _activations(
                    x,
                    x_at,
                    x_first,
                    here,
                    norm_ptr,
                    square,
                    k,
                    inputs + i * WORDS,
                    K,
                    False,
                    WHOLE,
                    BLOCK_K,
                    TYPE,
                )
                value = code(b, zero, i, BITS) * s - magic(i, BITS) * s
                acc = _multiply(value.to(TYPE), a, acc, TYPE, X_LEFT)
                if GATED:
                    value = code(c, zero, i, BITS) * s_up - magic(i, BITS) * s_up
                    acc_up = _multiply(value.to(TYPE), a, acc_up, TYPE, X_LEFT)
    if X_LEFT:
        acc = tl.trans(acc)
        acc_up = tl.trans(acc_up)
    return acc, acc_up, square


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
