"""Edits of the token state, in order."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code import pdl

CLEAR = tl.constexpr(0)  # kernels/ops/state.py
MARK = tl.constexpr(1)
COUNT = tl.constexpr(2)
BIAS = tl.constexpr(3)
SEEN = tl.constexpr(1 << 30)


@triton.jit
def edit_kernel(
    live_ptr,
    edits_ptr,
    counts_ptr,
    bias_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """A program owns BLOCK columns of every slot and goes through all edits, TILE at a time, so
    every location has one writer and order needs no program to wait for another. Within a tile an
    edit is void where a later one clears its slot or sets the same bias; what is left commutes:
    bits are set and counts added atomically, after the tile's clears."""
    pdl.wait()
    edits = tl.load(live_ptr + 3)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for start in range(0, edits, TILE):
        i = start + tl.arange(0, TILE)
        exists = i < edits
        slot = tl.load(edits_ptr + 4 * i, exists, -1)
        token = tl.load(edits_ptr + 4 * i + 1, exists, -1)
        kind = tl.load(edits_ptr + 4 * i + 2, exists, -1)
        value = tl.load(edits_ptr + 4 * i + 3, exists, 0)
        own = (kind > CLEAR) & (token // BLOCK == tl.program_id(0))
        clears = tl.sum((kind == CLEAR).to(tl.int32), axis=0)
        if clears + tl.sum((own & (kind == BIAS)).to(tl.int32), axis=0) > 0:
            # The columns of these matrices are the tile's edits once more.
            j = start + tl.arange(0, TILE)
            later_slot = tl.load(edits_ptr + 4 * j, j < edits, -1)
            later_token = tl.load(edits_ptr + 4 * j + 1, j < edits, -1)
            later_kind = tl.load(edits_ptr + 4 * j + 2, j < edits, -1)
            same = (j[None, :] > i[:, None]) & (later_slot[None, :] == slot[:, None])
            again = (later_token[None, :] == token[:, None]) & (kind[:, None] == BIAS)
            again = again & (later_kind[None, :] == BIAS)
            void = same & ((later_kind[None, :] == CLEAR) | again)
            own = own & (tl.max(void.to(tl.int32), axis=1) == 0)
        if clears > 0:
            for k in range(start, tl.minimum(start + TILE, edits)):
                if tl.load(edits_ptr + 4 * k + 2) == CLEAR:
                    row = tl.load(edits_ptr + 4 * k).to(tl.int64) * VOCAB
                    zero = tl.zeros((BLOCK,), tl.int32)
                    tl.store(counts_ptr + row + column, zero, column < VOCAB)
                    tl.store(bias_ptr + row + column, zero.to(tl.float32), column < VOCAB)
            tl.debug_barrier()  # other threads of this program change what was cleared
        at = slot.to(tl.int64) * VOCAB + token
        seen = tl.full((TILE,), SEEN, tl.int32)
        tl.atomic_or(counts_ptr + at, seen, own & (kind == MARK), sem="relaxed", scope="cta")
        tl.atomic_add(counts_ptr + at, value, own & (kind == COUNT), sem="relaxed", scope="cta")
        tl.store(bias_ptr + at, value.to(tl.float32, bitcast=True), own & (kind == BIAS))
        tl.debug_barrier()  # before the next tile's clears
    pdl.release()
