"""Rotary position embedding: the angle table of a step and the rotation of heads.

Pair i of a rotated head is (x[i], x[half + i]), interleaved (x[2i], x[2i + 1]).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code import pdl
from kernels.cuda.code.narrow import narrowed


@triton.jit
def cosine_and_sine(angle):
    """Of float32 angles up to some 10^9, within two units in the last place. The whole quarter
    turns go off in float64, exactly enough for any position; the polynomials on +-pi/4 are those
    of the Cephes library (Moshier). The device's own sine is coarse far from zero."""
    wide = angle.to(tl.float64)
    turns = tl.floor(wide * 0.6366197723675814 + 0.5)
    r = (wide - turns * 1.5707963267948966).to(tl.float32)
    quarter = turns.to(tl.int64).to(tl.int32) & 3
    z = r * r
    sine = r + r * z * (-1.6666654611e-1 + z * (8.3321608736e-3 + z * -1.9515295891e-4))
    cosine = (4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5)) * z * z
    cosine += 1.0 - 0.5 * z
    odd = quarter % 2 == 1
    s = tl.where(odd, cosine, sine)
    c = tl.where(odd, sine, cosine)
    s = tl.where(quarter >= 2, -s, s)
    c = tl.where((quarter == 1) | (quarter == 2), -c, c)
    return c, s


@triton.jit
def rope_table_kernel(
    live_ptr,
    positions_ptr,
    freq_ptr,
    variant_ptr,
    out_ptr,
    SCALE: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pdl.wait()
    tokens = tl.load(live_ptr)
    if tl.program_id(0) * ROWS < tokens:
        t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        i = tl.arange(0, BLOCK)[None, :]
        exists = t < tokens
        mask = exists & (i < HALF)
        position = tl.load(positions_ptr + t, exists, 0)
        first = i
        if variant_ptr is not None:
            first = tl.load(variant_ptr + t, exists, 0) * HALF + i
        freq = tl.load(freq_ptr + first, mask, 0.0).to(tl.float32)
        c, s = cosine_and_sine(position.to(tl.float32) * freq)
        at = t.to(tl.int64) * (2 * HALF) + i
        tl.store(out_ptr + at, c * SCALE, mask)
        tl.store(out_ptr + at + HALF, s * SCALE, mask)
    pdl.release()


@triton.jit
def load_pairs(
    ptr,
    at,
    pair,
    mask,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CACHE: tl.constexpr,
):
    """Both members of pairs as float32 [rows, pairs]; `at` [rows, 1] is where a head starts. CACHE:
    modifier of the loads."""
    if INTERLEAVED:
        both = tl.arange(0, 2)[None, None, :]
        index = (at + 2 * pair)[:, :, None] + both
        mask = mask[:, :, None] & (both < 2)
        a, b = tl.split(tl.load(ptr + index, mask, 0.0, cache_modifier=CACHE).to(tl.float32))
    else:
        a = tl.load(ptr + at + pair, mask, 0.0, cache_modifier=CACHE).to(tl.float32)
        b = tl.load(ptr + at + HALF + pair, mask, 0.0, cache_modifier=CACHE).to(tl.float32)
    return a, b


@triton.jit
def store_pairs(ptr, at, pair, mask, a, b, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    a, b = narrowed(a, ptr), narrowed(b, ptr)
    if INTERLEAVED:
        both = tl.arange(0, 2)[None, None, :]
        index = (at + 2 * pair)[:, :, None] + both
        tl.store(ptr + index, tl.join(a, b), mask[:, :, None] & (both < 2))
    else:
        tl.store(ptr + at + pair, a, mask)
        tl.store(ptr + at + HALF + pair, b, mask)


@triton.jit
def rotate(table_ptr, t, pair, mask, a, b, HALF: tl.constexpr):
    """The pairs of token t turned by its angles; a row of the table is cosines, then sines."""
    at = t.to(tl.int64) * (2 * HALF) + pair
    c = tl.load(table_ptr + at, mask, 1.0)
    s = tl.load(table_ptr + at + HALF, mask, 0.0)
    return a * c - b * s, b * c + a * s


@triton.jit
def rope_kernel(
    live_ptr,
    x_ptr,
    table_ptr,
    out_ptr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    START: tl.constexpr,
    ROTARY: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    """A unit is one head of one token; ROTARY dims from START on are rotated."""
    pdl.wait()
    units = tl.load(live_ptr) * HEADS
    if tl.program_id(0) * ROWS < units:
        HALF: tl.constexpr = ROTARY // 2
        unit = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        at = unit.to(tl.int64) * DIM
        pair = tl.arange(0, PAIRS)[None, :]
        mask = (unit < units) & (pair < HALF)
        a, b = load_pairs(x_ptr, at + START, pair, mask, HALF, INTERLEAVED, "")
        a, b = rotate(table_ptr, unit // HEADS, pair, mask, a, b, HALF)
        store_pairs(out_ptr, at + START, pair, mask, a, b, HALF, INTERLEAVED)
        if ROTARY < DIM:
            rest = tl.arange(0, REST)[None, :]
            column = tl.where(rest < START, rest, ROTARY + rest)
            mask = (unit < units) & (column < DIM)
            x = tl.load(x_ptr + at + column, mask, 0.0)
            tl.store(out_ptr + at + column, x.to(out_ptr.dtype.element_ty), mask)
    pdl.release()
