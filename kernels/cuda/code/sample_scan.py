"""Sampling in one to three reads of the logits (the later ones from cache), without sorting
(kernels/ops/sample.py says what is computed). Five kernels, so that none holds the registers of
another:

sample_scan     reads every chunk of every row: best value, sums, finiteness, best tokens
sample_count    of rows with top-k, top-p or min-p: a histogram of the values of every chunk
sample_join     joins the chunks of a row. Rows that are greedy, given or drawn without filters are
                done here. Of the others the histograms tell the bin of the k-th value exactly, and
                the bins that can hold the last value of top-p
sample_collect  reads such rows again: exact masses above those bins, and the few candidates within
sample_draw     searches their threshold among the candidates and draws. Should they be too many, or
                the estimate have missed, it searches the row itself: slower, equally exact

A weight e^((z - best) / temperature) is a multiple of 2^-40 in int64, so sums of weights do not
depend on their order and the choice of a token on neither grid nor chunk. A value and its id are
packed into one int64 that grows with the value and, among equal values, with lower ids: a set of
best tokens is {key >= pivot}. What is -inf (forbidden) is no candidate.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code import pdl
from kernels.cuda.code.sampling import (
    GREEDY_BELOW,
    LOGPROB,
    LOWEST,
    TOP,
    TOP_TILE,
    fixed,
    pack,
    row_of,
    row_values,
)


@triton.jit
def scan_kernel(
    live_ptr,
    logits_ptr,
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
    counts_ptr,
    bias_ptr,
    best_ptr,
    best_id_ptr,
    raw_max_ptr,
    raw_sum_ptr,
    bad_ptr,
    weight_ptr,
    top_ptr,
    VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,
    STATE: tl.constexpr,
    MASK: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Grid: chunks x rows. A chunk stays in registers."""
    pdl.wait()
    c = tl.program_id(0)
    r = tl.program_id(1)
    if r < tl.load(live_ptr + 2):
        sampled = tl.load(row_target_ptr + r) < 0
        flags = tl.load(row_flags_ptr + r)
        top = tl.minimum(tl.load(row_top_ptr + r), TOP)
        k = tl.load(top_k_ptr + r)
        temperature = tl.load(temperature_ptr + r)
        drawn = sampled & (temperature >= GREEDY_BELOW)
        inverse = 1.0 / tl.where(drawn, temperature, 1.0)
        filtered = (k > 0) & (k < VOCAB)
        filtered = filtered | (tl.load(top_p_ptr + r) < 1.0) | (tl.load(min_p_ptr + r) > 0.0)
        limited = drawn & filtered
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
        column = c * CHUNK + tl.arange(0, CHUNK)
        inside = column < VOCAB
        x, z = row_values(row, column, inside)
        exponent = x.to(tl.int32, bitcast=True) & 0x7F800000
        bad = tl.max((inside & (exponent == 0x7F800000)).to(tl.int32), axis=0)
        raw_max = tl.max(x, axis=0)
        best = tl.max(z, axis=0)
        best_id = tl.min(tl.where(z == best, column, VOCAB), axis=0)
        part = r * SPLITS + c
        tl.store(bad_ptr + part, bad)
        tl.store(raw_max_ptr + part, raw_max)
        tl.store(best_ptr + part, best)
        tl.store(best_id_ptr + part, best_id)
        wants_sum = ((flags & LOGPROB) != 0) | (sampled == 0) | (top > 0)
        if wants_sum:
            tl.store(raw_sum_ptr + part, tl.sum(tl.exp(x - raw_max), axis=0))
        if drawn & (limited == 0):
            e = tl.where(z > float("-inf"), tl.exp((z - best) * inverse), 0.0)
            tl.store(weight_ptr + part, tl.sum(fixed(e), axis=0))
        if top > 0:
            keys = tl.where(inside, pack(x, column), LOWEST)
            for i in range(top):
                key = tl.max(keys, axis=0)
                tl.store(top_ptr + part * TOP_TILE + i, key)
                keys = tl.where(keys == key, LOWEST, keys)
    pdl.release()
