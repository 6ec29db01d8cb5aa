"""Sampling, fourth: the candidates of rows with a threshold (sample_scan.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code import pdl
from kernels.cuda.code.sampling import (
    BEST,
    BEST_ID,
    BIN_K,
    BIN_LOW,
    BIN_TOP,
    CANDIDATES,
    PENDING,
    REALS,
    REFERENCE,
    SCALE,
    WORDS,
    bin_of,
    fixed,
    pack,
    row_of,
    row_values,
)


@triton.jit
def collect_kernel(
    live_ptr,
    logits_ptr,
    row_slot_ptr,
    row_flags_ptr,
    row_mask_ptr,
    masks_ptr,
    temperature_ptr,
    min_p_ptr,
    frequency_ptr,
    presence_ptr,
    repetition_ptr,
    counts_ptr,
    bias_ptr,
    words_ptr,
    reals_ptr,
    masses_ptr,
    candidates_ptr,
    VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,
    STATE: tl.constexpr,
    MASK: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    BINS: tl.constexpr,
    ROOM: tl.constexpr,
):
    """A fixed grid goes through the chunks of all rows and takes those that are pending: a batch
    without any costs little more than the launch."""
    pdl.wait()
    work = tl.load(live_ptr + 2) * SPLITS
    for start in range(0, work, tl.num_programs(0)):
        part = start + tl.program_id(0)
        r = part // SPLITS
        if tl.load(words_ptr + r * WORDS + PENDING, part < work, 0) != 0:
            min_p = tl.load(min_p_ptr + r)
            inverse = 1.0 / tl.load(temperature_ptr + r)
            row = row_of(
                r,
                True,
                logits_ptr,
                row_slot_ptr,
                row_flags_ptr,
                row_mask_ptr,
                masks_ptr,
                counts_ptr,
                bias_ptr,
                frequency_ptr,
                presence_ptr,
                repetition_ptr,
                COLUMNS,
                STATE,
                MASK,
            )
            best_id = tl.load(words_ptr + r * WORDS + BEST_ID)
            bin_k = tl.load(words_ptr + r * WORDS + BIN_K)
            bin_top = tl.load(words_ptr + r * WORDS + BIN_TOP)
            bin_low = tl.load(words_ptr + r * WORDS + BIN_LOW)
            best = tl.load(reals_ptr + r * REALS + BEST)
            reference = tl.load(reals_ptr + r * REALS + REFERENCE)
            scale = tl.load(reals_ptr + r * REALS + SCALE)
            own_ptr = candidates_ptr + r.to(tl.int64) * ROOM

            column = part % SPLITS * CHUNK + tl.arange(0, CHUNK)
            inside = column < VOCAB
            _x, z = row_values(row, column, inside)
            b = bin_of(z, reference, scale, BINS)
            e = tl.exp((z - best) * inverse)
            weight = tl.where(inside, fixed(e), 0)
            above = b > bin_top
            sure = above & ((e >= min_p) | (column == best_id))
            own_masses = masses_ptr + part.to(tl.int64) * 4
            tl.store(own_masses, tl.sum(tl.where(b > bin_k, weight, 0), axis=0))
            tl.store(own_masses + 1, tl.sum(tl.where(above, weight, 0), axis=0))
            tl.store(own_masses + 2, tl.sum(tl.where(sure, weight, 0), axis=0))
            among = inside & (z > float("-inf"))
            among = among & (((b >= bin_low) & (b <= bin_top)) | (b == bin_k))
            among_here = tl.sum(among.to(tl.int32), axis=0)
            if among_here > 0:
                place = tl.atomic_add(
                    words_ptr + r * WORDS + CANDIDATES, among_here, sem="relaxed", scope="gpu"
                )
                place += tl.cumsum(among.to(tl.int32), 0) - 1
                tl.store(own_ptr + place, pack(z, column), among & (place < ROOM))
    pdl.release()
