"""Sampling, second launch: rows with a threshold, read again (sample_scan.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code import pdl
from kernels.cuda.code.sample_draw import draw
from kernels.cuda.code.sampling import (
    BEST,
    BEST_ID,
    BIN_K,
    BIN_K_TOP,
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
    row_token_ptr,
    row_slot_ptr,
    row_flags_ptr,
    row_mask_ptr,
    masks_ptr,
    top_k_ptr,
    temperature_ptr,
    top_p_ptr,
    min_p_ptr,
    frequency_ptr,
    presence_ptr,
    repetition_ptr,
    seed_ptr,
    positions_ptr,
    counts_ptr,
    bias_ptr,
    last_ptr,
    token_ptr,
    logprob_ptr,
    words_ptr,
    reals_ptr,
    masses_ptr,
    sure_ptr,
    candidates_ptr,
    counter_ptr,
    VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,
    STATE: tl.constexpr,
    MASK: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BINS: tl.constexpr,
    ROOM: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: programs of a row x rows, as of sample_scan."""
    pdl.wait()
    p = tl.program_id(0)
    r = tl.program_id(1)
    pending = r < tl.load(live_ptr + 2)
    if tl.load(words_ptr + r * WORDS + PENDING, pending, 0) != 0:
        has_p = tl.load(top_p_ptr + r) < 1.0
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
        bin_k_top = tl.load(words_ptr + r * WORDS + BIN_K_TOP)
        bin_top = tl.load(words_ptr + r * WORDS + BIN_TOP)
        bin_low = tl.load(words_ptr + r * WORDS + BIN_LOW)
        best = tl.load(reals_ptr + r * REALS + BEST)
        reference = tl.load(reals_ptr + r * REALS + REFERENCE)
        scale = tl.load(reals_ptr + r * REALS + SCALE)
        own_ptr = candidates_ptr + r.to(tl.int64) * ROOM

        above_k = tl.zeros((CHUNK // 4,), tl.int64)
        above_top = tl.zeros((CHUNK // 4,), tl.int64)
        for c in tl.range(p * STEPS, tl.minimum(p * STEPS + STEPS, SPLITS), num_stages=STAGES):
            column = c * CHUNK + tl.arange(0, CHUNK)
            inside = column < VOCAB
            _x, z = row_values(row, column, inside)
            b = bin_of(z, reference, scale, BINS)
            e = tl.exp((z - best) * inverse)
            weight = tl.where(inside, fixed(e), 0)
            above = b > bin_top
            if has_p & (bin_top < BINS - 1):
                # Four at a time, in the thread that holds them
                here = tl.where(b > bin_k_top, weight, 0).reshape(CHUNK // 4, 4)
                above_k += tl.sum(here, axis=1)
                here = tl.where(above, weight, 0).reshape(CHUNK // 4, 4)
                above_top += tl.sum(here, axis=1)
            sure = above & ((e >= min_p) | (column == best_id))
            tl.store(sure_ptr + r * SPLITS + c, tl.sum(tl.where(sure, weight, 0), axis=0))
            among = inside & (z > float("-inf"))
            at_k = (b >= bin_k) & (b <= bin_k_top)
            among = among & (((b >= bin_low) & (b <= bin_top)) | at_k)
            # A thread with any takes places for its own: no sum over the chunk, no barrier.
            fours = among.to(tl.int32).reshape(CHUNK // 4, 4)
            count = tl.sum(fours, axis=1)
            count_ptr = words_ptr + r * WORDS + CANDIDATES + tl.zeros((CHUNK // 4,), tl.int32)
            place = tl.atomic_add(count_ptr, count, count > 0, sem="relaxed", scope="gpu")
            place = (place[:, None] + tl.cumsum(fours, 1) - 1).reshape(CHUNK)
            tl.store(own_ptr + place, pack(z, column), among & (place < ROOM))
        own_masses = masses_ptr + (r * PROGRAMS + p) * 2
        tl.store(own_masses, tl.sum(above_k, axis=0))
        tl.store(own_masses + 1, tl.sum(above_top, axis=0))
        tl.debug_barrier()  # the parts of all threads before the one atomic
        if tl.atomic_add(counter_ptr + r, 1, sem="acq_rel", scope="gpu") == PROGRAMS - 1:
            tl.store(counter_ptr + r, 0)
            draw(
                r,
                row,
                inverse,
                best,
                best_id,
                min_p,
                reference,
                scale,
                own_ptr,
                bin_k,
                bin_k_top,
                bin_top,
                bin_low,
                row_token_ptr,
                row_slot_ptr,
                row_flags_ptr,
                top_k_ptr,
                top_p_ptr,
                seed_ptr,
                positions_ptr,
                last_ptr,
                token_ptr,
                logprob_ptr,
                words_ptr,
                reals_ptr,
                masses_ptr,
                sure_ptr,
                VOCAB,
                CHUNK,
                SPLITS,
                PROGRAMS,
                BINS,
                ROOM,
                TILE,
            )
    pdl.release()
