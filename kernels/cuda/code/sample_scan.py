"""Sampling in two launches and one or two reads of the logits, without sorting
(kernels/ops/sample.py says what is computed):

sample_scan     reads every chunk of every row once: best value, sums, finiteness, best tokens; of
                rows with top-k, top-p or min-p also how many values fall in each of 256 bins; with
                a small k the largest of every four, of which k are k values too. The last program
                of a row joins them (sample_join): rows that are greedy, given or drawn without
                filters are done. Of the others the bins tell that of the k-th value exactly, or
                one below it, and those that can hold the last value of top-p
sample_collect  reads the others again: exact masses above those bins, and the few candidates
                within. The last program of a row searches the threshold among the candidates and
                draws (sample_draw). Should they be too many, or the estimate have missed, it
                searches the row itself: slower, equally exact

A weight e^((z - best) / temperature) is a multiple of 2^-40 in int64, so sums of weights do not
depend on their order, and the token of a row with a threshold on neither grid nor chunk (of a row
without one on the chunk only as float32 scales its sum). A value and its id are packed into one
int64 that grows with the value and, among equal values, with lower ids: a set of best tokens is
{key >= pivot}. What is -inf (forbidden) is no candidate.

A histogram costs arithmetic, not memory: 24 instructions for the votes of a value and, for every 32
bins, 5 of which one is a population count (4 a cycle and scheduler). At 4.8 TB/s each of the four
schedulers of a processor has about 25 cycles for the 32 values of a warp before memory is no longer
the limit; 256 bins take about 70, 2048 take 500. So there are few bins, placed by the spread of the
row, and the masses below them bound those above.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code import pdl
from kernels.cuda.code.sample_join import join
from kernels.cuda.code.sampling import (
    GREEDY_BELOW,
    LOGPROB,
    LOWEST,
    MOST_EXPONENT,
    REALS,
    REFERENCE,
    SCALE,
    TOP,
    TOP_TILE,
    bin_of,
    few_of,
    fixed,
    pack,
    place_bins,
    row_of,
    row_values,
)


@triton.jit
def count_bins(z, reference, scale, BINS: tl.constexpr):
    """How many are in each bin; those that are -inf in the first, which is no bin."""
    bin = tl.where(z > float("-inf"), bin_of(z, reference, scale, BINS), 0)
    return tl.histogram(bin, BINS)


@triton.jit
def scan_kernel(
    live_ptr,
    logits_ptr,
    row_token_ptr,
    row_slot_ptr,
    row_target_ptr,
    row_flags_ptr,
    row_top_ptr,
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
    top_ids_ptr,
    top_logprobs_ptr,
    status_ptr,
    best_ptr,
    best_id_ptr,
    raw_max_ptr,
    raw_sum_ptr,
    bad_ptr,
    chunk_best_ptr,
    weight_ptr,
    top_ptr,
    bins_ptr,
    mass_ptr,
    words_ptr,
    reals_ptr,
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
    """Grid: programs of a row x rows. A program takes STEPS chunks, each in registers."""
    pdl.wait()
    p = tl.program_id(0)
    r = tl.program_id(1)
    if r < tl.load(live_ptr + 2):
        sampled = tl.load(row_target_ptr + r) < 0
        flags = tl.load(row_flags_ptr + r)
        top = tl.minimum(tl.load(row_top_ptr + r), TOP)
        k = tl.load(top_k_ptr + r)
        has_p = tl.load(top_p_ptr + r) < 1.0
        temperature = tl.load(temperature_ptr + r)
        drawn = sampled & (temperature >= GREEDY_BELOW)
        inverse = 1.0 / tl.where(drawn, temperature, 1.0)
        filtered = ((k > 0) & (k < VOCAB)) | has_p | (tl.load(min_p_ptr + r) > 0.0)
        limited = drawn & filtered
        plain = drawn & (filtered == 0)
        few = few_of(k, VOCAB, ROOM)
        wants_sum = ((flags & LOGPROB) != 0) | (sampled == 0) | (top > 0)
        row = row_of(
            r,
            sampled,
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
        part = r * PROGRAMS + p
        reference, scale = inverse * 0.0, inverse
        if limited:
            reference, scale = place_bins(row[0], VOCAB)
            tl.store(reals_ptr + r * REALS + REFERENCE, reference)  # every program, the same
            tl.store(reals_ptr + r * REALS + SCALE, scale)
        first = p * STEPS
        lane = tl.arange(0, CHUNK)
        bests = tl.full((CHUNK,), float("-inf"), tl.float32)
        ids = first * CHUNK + lane
        bad = tl.zeros((CHUNK // 4,), tl.int32)
        mass = tl.zeros((CHUNK // 4,), tl.float32)
        n = tl.zeros((BINS,), tl.int32)
        raw_max, raw_sum = inverse * 0.0 + float("-inf"), inverse * 0.0
        for c in tl.range(first, tl.minimum(first + STEPS, SPLITS), num_stages=STAGES):
            column = c * CHUNK + lane
            inside = column < VOCAB
            x, z = row_values(row, column, inside)
            exponent = x.to(tl.int32, bitcast=True) & 0x7F800000
            odd = inside & (exponent == 0x7F800000)
            # Four at a time, in the thread that holds them: fewer registers go round the loop.
            bad = tl.maximum(bad, tl.max(odd.to(tl.int32).reshape(CHUNK // 4, 4), axis=1))
            ids = tl.where(z > bests, column, ids)
            bests = tl.maximum(bests, z)
            if wants_sum:
                most = tl.maximum(raw_max, tl.max(x, axis=0))
                raw_sum = raw_sum * tl.exp(raw_max - most) + tl.sum(tl.exp(x - most), axis=0)
                raw_max = most
            if plain:
                best = tl.max(z, axis=0)
                e = tl.where(z > float("-inf"), tl.exp((z - best) * inverse), 0.0)
                tl.store(chunk_best_ptr + r * SPLITS + c, best)
                tl.store(weight_ptr + r * SPLITS + c, tl.sum(fixed(e), axis=0))
            if limited & few:
                n += count_bins(tl.max(z.reshape(CHUNK // 4, 4), axis=1), reference, scale, BINS)
            elif limited:
                n += count_bins(z, reference, scale, BINS)
                if has_p:
                    e = tl.exp(tl.minimum((z - reference) * inverse, MOST_EXPONENT))
                    mass += tl.sum(e.reshape(CHUNK // 4, 4), axis=1)
            if top > 0:
                keys = tl.where(inside, pack(x, column), LOWEST)
                for i in range(top):
                    key = tl.max(keys, axis=0)
                    tl.store(top_ptr + (r * SPLITS + c) * TOP_TILE + i, key)
                    keys = tl.where(keys == key, LOWEST, keys)
        best = tl.max(bests, axis=0)
        tl.store(best_ptr + part, best)
        tl.store(best_id_ptr + part, tl.min(tl.where(bests == best, ids, VOCAB), axis=0))
        tl.store(bad_ptr + part, tl.max(bad, axis=0))
        tl.store(raw_max_ptr + part, raw_max)
        tl.store(raw_sum_ptr + part, raw_sum)
        if limited:
            tl.store(bins_ptr + part * BINS + tl.arange(0, BINS), n)
            tl.store(mass_ptr + part, tl.sum(mass, axis=0))
        tl.debug_barrier()  # the parts of all threads before the one atomic
        if tl.atomic_add(counter_ptr + r, 1, sem="acq_rel", scope="gpu") == PROGRAMS - 1:
            tl.store(counter_ptr + r, 0)
            join(
                r,
                row,
                inverse,
                drawn,
                limited,
                wants_sum,
                row_token_ptr,
                row_slot_ptr,
                row_target_ptr,
                row_flags_ptr,
                row_top_ptr,
                row_mask_ptr,
                top_k_ptr,
                top_p_ptr,
                seed_ptr,
                positions_ptr,
                last_ptr,
                token_ptr,
                logprob_ptr,
                top_ids_ptr,
                top_logprobs_ptr,
                status_ptr,
                best_ptr,
                best_id_ptr,
                raw_max_ptr,
                raw_sum_ptr,
                bad_ptr,
                chunk_best_ptr,
                weight_ptr,
                top_ptr,
                bins_ptr,
                mass_ptr,
                words_ptr,
                reals_ptr,
                VOCAB,
                CHUNK,
                SPLITS,
                PROGRAMS,
                BINS,
                ROOM,
                TILE,
            )
    pdl.release()
