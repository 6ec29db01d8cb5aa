"""Sampling: a row's threshold and draw, by the last program that collected (sample_scan.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code.sampling import (
    ABOVE_K,
    CANDIDATES,
    LOG_SUM,
    LOWEST,
    REALS,
    WORDS,
    bin_of,
    emit,
    fixed,
    pack,
    pick,
    row_values,
    uniform,
    unpack,
)


@triton.jit
def key_of(row, candidates_ptr, whole, i, exists):
    """Of a row's candidates, or of all its values, the i-th."""
    key = tl.load(candidates_ptr + i, exists & (whole == 0), LOWEST)
    if whole:
        _x, z = row_values(row, i, exists)
        key = pack(z, i)
    return key


@triton.jit
def tally(
    row,
    inverse,
    best,
    reference,
    scale,
    candidates_ptr,
    whole,
    items,
    pivot,
    low,
    high,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Of a row's candidates, or of the whole row, those with keys from `pivot` on, bins from `low`
    to `high`: how many they are, what they weigh, their lowest and highest key."""
    count = tl.zeros((TILE,), tl.int32)
    mass = tl.zeros((TILE,), tl.int64)
    least = tl.full((TILE,), 0x7FFFFFFFFFFFFFFE, tl.int64)
    most = tl.full((TILE,), LOWEST, tl.int64)
    for start in tl.range(0, items, TILE, num_stages=3):
        i = start + tl.arange(0, TILE)
        exists = i < items
        key = key_of(row, candidates_ptr, whole, i, exists)
        z, _id = unpack(key)
        e = tl.exp((z - best) * inverse)
        b = bin_of(z, reference, scale, BINS)
        keep = exists & (key >= pivot) & (b >= low) & (b <= high)
        count += keep.to(tl.int32)
        mass += tl.where(keep, fixed(e), 0)
        least = tl.minimum(least, tl.where(keep, key, 0x7FFFFFFFFFFFFFFE))
        most = tl.maximum(most, tl.where(keep, key, LOWEST))
    return (
        tl.sum(count, axis=0),
        tl.sum(mass, axis=0),
        tl.min(least, axis=0),
        tl.max(most, axis=0),
    )


@triton.jit
def search(
    row,
    inverse,
    best,
    reference,
    scale,
    candidates_ptr,
    whole,
    items,
    low,
    high,
    need,
    BY_COUNT: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
):
    """A pivot whose set is the smallest set of best values that counts, or weighs, `need`; and
    whether there is one. Halves the range of keys until one value is left between its ends."""
    count, mass, least, most = tally(
        row,
        inverse,
        best,
        reference,
        scale,
        candidates_ptr,
        whole,
        items,
        LOWEST,
        low,
        high,
        BINS,
        TILE,
    )
    found = (need >= 1) & ((count if BY_COUNT else mass) >= need)
    bottom, ceiling = least, most + 1
    left = tl.where(found, count, 0)  # values between the two
    beyond = count * 0  # values from the ceiling on
    while (left > 1) & (bottom + 1 < ceiling):
        middle = (bottom >> 1) + (ceiling >> 1) + (bottom & ceiling & 1)
        n, m, _least, _most = tally(
            row,
            inverse,
            best,
            reference,
            scale,
            candidates_ptr,
            whole,
            items,
            middle,
            low,
            high,
            BINS,
            TILE,
        )
        enough = (n if BY_COUNT else m) >= need
        bottom = tl.where(enough, middle, bottom)
        ceiling = tl.where(enough, ceiling, middle)
        left = tl.where(enough, n - beyond, beyond + left - n)
        beyond = tl.where(enough, beyond, n)
    return bottom, found


@triton.jit
def draw(
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
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BINS: tl.constexpr,
    ROOM: tl.constexpr,
    TILE: tl.constexpr,
):
    """Threshold and draw of row r."""
    SPLIT_TILE: tl.constexpr = triton.next_power_of_2(SPLITS)
    k = tl.load(top_k_ptr + r)
    top_p = tl.load(top_p_ptr + r)
    has_p = top_p < 1.0
    s = tl.arange(0, SPLIT_TILE)
    all_masses = masses_ptr + (r * PROGRAMS + s) * 2
    above_k = tl.sum(tl.load(all_masses, s < PROGRAMS, 0), axis=0)
    above_top = tl.sum(tl.load(all_masses + 1, s < PROGRAMS, 0), axis=0)
    own_sure = sure_ptr + r * SPLITS
    items = tl.load(words_ptr + r * WORDS + CANDIDATES)
    better_k = tl.load(words_ptr + r * WORDS + ABOVE_K)
    # Of a few best values there may be less than k: those that a mask leaves.
    has_k = (bin_k > 0) & (items + better_k >= k)
    whole = items > ROOM
    searching = items >= 0
    pivot = best_id.to(tl.int64) * 0 + LOWEST
    while searching:
        # The whole row is its own list of candidates, with nothing above it.
        items = tl.where(whole, VOCAB, items)
        found = items >= 0
        pivot = pivot * 0 + LOWEST
        mass = above_k
        if has_k:
            pivot, found = search(
                row,
                inverse,
                best,
                reference,
                scale,
                own_ptr,
                whole,
                items,
                tl.where(whole, 0, bin_k),
                tl.where(whole, BINS, bin_k_top),
                (k - tl.where(whole, 0, better_k)).to(tl.int64),
                True,
                BINS,
                TILE,
            )
        if has_p:
            if (bin_k > 0) | whole:
                _count, kept, _least, _most = tally(
                    row,
                    inverse,
                    best,
                    reference,
                    scale,
                    own_ptr,
                    whole,
                    items,
                    pivot,
                    tl.where(whole, 0, bin_k),
                    tl.where(whole, BINS, bin_k_top),
                    BINS,
                    TILE,
                )
                mass = tl.where(whole, 0, above_k) + kept
            share = top_p.to(tl.float64) * mass.to(tl.float64)
            need = tl.maximum(tl.ceil(share).to(tl.int64), 1)
            narrower, reached = search(
                row,
                inverse,
                best,
                reference,
                scale,
                own_ptr,
                whole,
                items,
                tl.where(whole, 0, bin_low),
                tl.where(whole, BINS, bin_top),
                need - tl.where(whole, 0, above_top),
                False,
                BINS,
                TILE,
            )
            pivot = tl.maximum(pivot, narrower)
            found = found & reached
        searching = (found == 0) & (whole == 0)
        whole = whole | searching
    # Every chunk's candidates that stay join what surely stays of it.
    if whole:
        tl.store(own_sure + s, tl.zeros((SPLIT_TILE,), tl.int64), s < SPLITS)
        tl.debug_barrier()
    for start in tl.range(0, items, TILE, num_stages=3):
        i = start + tl.arange(0, TILE)
        key = key_of(row, own_ptr, whole, i, i < items)
        z, id = unpack(key)
        e = tl.exp((z - best) * inverse)
        keep = (i < items) & (key >= pivot) & ((e >= min_p) | (id == best_id))
        tl.atomic_add(own_sure + id // CHUNK, fixed(e), keep, sem="relaxed", scope="gpu")
    tl.debug_barrier()
    sums = tl.load(own_sure + s, s < SPLITS, 0, cache_modifier=".cg")
    upto = tl.cumsum(sums, 0)
    kept = tl.sum(sums, axis=0)
    position = tl.load(positions_ptr + tl.load(row_token_ptr + r))
    random = uniform(tl.load(seed_ptr + r), position)
    target = tl.minimum((random * kept.to(tl.float64)).to(tl.int64), kept - 1)
    chunk = tl.sum(((upto <= target) & (s < SPLITS)).to(tl.int32), axis=0)
    before = tl.sum(tl.where(s < chunk, sums, 0), axis=0)
    token = pick(
        row,
        inverse,
        best,
        best_id,
        min_p,
        pivot,
        chunk,
        target - before,
        VOCAB,
        CHUNK,
        TILE,
    )
    emit(
        r,
        token,
        tl.load(row_slot_ptr + r),
        -1,
        tl.load(row_flags_ptr + r),
        tl.load(reals_ptr + r * REALS + LOG_SUM),
        row,
        last_ptr,
        token_ptr,
        logprob_ptr,
    )
