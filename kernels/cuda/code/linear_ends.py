"""What stands behind the sums of a product, in tiles or of one row: partial sums joined by the last
program of a tile, and the epilogue."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code.activations import activate, gated, tanh


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
