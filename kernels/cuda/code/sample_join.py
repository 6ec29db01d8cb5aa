"""Sampling: the parts of a row joined, by the last program of its scan (sample_scan.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code.sampling import (
    ABOVE_K,
    BELOW,
    BEST,
    BEST_ID,
    BIN_K,
    BIN_K_TOP,
    BIN_LOW,
    BIN_TOP,
    CANDIDATES,
    ESTIMATE,
    LOG_SUM,
    LOWEST,
    MOST_EXPONENT,
    NOTHING_ALLOWED,
    PENDING,
    REALS,
    REFERENCE,
    SCALE,
    TOP,
    TOP_TILE,
    WORDS,
    emit,
    few_of,
    pick,
    uniform,
    unpack,
)


@triton.jit
def from_here(x):
    """Sums from each bin to the last."""
    return tl.sum(x, axis=0) - tl.cumsum(x, 0) + x


@triton.jit
def find_bins(
    r,
    k,
    top_p,
    has_k,
    has_p,
    best,
    inverse,
    bins_ptr,
    mass_ptr,
    words_ptr,
    reals_ptr,
    VOCAB: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BINS: tl.constexpr,
    ROOM: tl.constexpr,
):
    """The bins that can hold the k-th value and the last value of top-p. Where k is small only the
    lowest is looked for, and all values from there on are candidates. Otherwise the bin of the k-th
    value is known exactly, and that of top-p's last bounded: a bin's edges bound its weights, so
    its values and those above it weigh between the sums of the bounds, and between what the bounds
    of the values below it leave of the row's weight. Where more than ROOM / 2 candidates are
    between, the weights at the bins' centres say nearer."""
    s = tl.arange(0, triton.next_power_of_2(PROGRAMS))
    b = tl.arange(0, BINS)
    n = tl.zeros((BINS,), tl.int32)
    for first in range(0, PROGRAMS, 4):
        part = first + tl.arange(0, 4)[:, None]
        at = (r * PROGRAMS + part) * BINS + b[None, :]
        n += tl.sum(tl.load(bins_ptr + at, part < PROGRAMS, 0), axis=0)
    n = tl.where(b > 0, n, 0)
    reference = tl.load(reals_ptr + r * REALS + REFERENCE)
    scale = tl.load(reals_ptr + r * REALS + SCALE)
    # 0, and no limit, where there are no k values. Fewer than k fours may still hold k.
    few = few_of(k, VOCAB, ROOM)
    bin_k = tl.where(has_k, tl.max(tl.where(from_here(n) >= k, b, 0), axis=0), 0)
    bin_k = tl.where(few, tl.maximum(bin_k, 1), bin_k)
    has_k = bin_k > 0
    bin_k_top = tl.where(few, BINS - 1, bin_k)
    above_k = tl.sum(tl.where(b > bin_k_top, n, 0), axis=0)
    bin_top = bin_k_top
    bin_low = tl.where(has_k, bin_k, 1)
    if has_p & (few == 0):
        # Of a bin only partly in top-k, the part is known.
        kept = tl.where(b > bin_k, n, tl.where(has_k & (b == bin_k), k - above_k, 0))
        left = (n - kept).to(tl.float32)
        kept = kept.to(tl.float32)
        edge = (b - BELOW).to(tl.float32)
        offset = reference - best
        low = tl.exp(tl.minimum((edge / scale + offset) * inverse, 0.0))
        low = tl.where(b == 1, 0.0, low) * 0.9999
        high = tl.exp(tl.minimum(((edge + 1.0) / scale + offset) * inverse, 0.0))
        high = tl.where(b == BINS - 1, 1.0, high) * 1.0001
        middle = tl.exp(tl.minimum(((edge + 0.5) / scale + offset) * inverse, 0.0))
        # What top-k keeps of the row, whose weight is unknown where an exponent was cut
        total = tl.sum(tl.load(mass_ptr + r * PROGRAMS + s, s < PROGRAMS, 0.0), axis=0)
        total *= tl.exp(offset * inverse)
        known = offset * inverse > -MOST_EXPONENT
        least, most = tl.sum(low * kept, axis=0), tl.sum(high * kept, axis=0)
        above = total - tl.sum(high * left, axis=0)
        least = tl.where(known, tl.maximum(least, above), least)
        below = total - tl.sum(low * left, axis=0)
        most = tl.where(known, tl.minimum(most, below), most)
        low *= kept
        high *= kept
        middle *= kept
        # What it keeps from a bin on
        least_here = tl.maximum(from_here(low), least - tl.cumsum(high, 0) + high)
        most_here = tl.minimum(from_here(high), most - tl.cumsum(low, 0) + low)
        floor = tl.maximum(bin_k, 1)
        slack = 2e-6 * most
        bin_top = tl.max(tl.where(most_here + slack >= top_p * least, b, floor), axis=0)
        bin_low = tl.max(tl.where(least_here - slack >= top_p * most, b, floor), axis=0)
        held = tl.sum(tl.where((b >= bin_low) & (b <= bin_top), n, 0), axis=0)
        if held > ROOM // 2:
            # The threshold is where the values below weigh 1 - top_p.
            about = tl.minimum(tl.maximum(tl.sum(middle, axis=0), least), most)
            share = (tl.cumsum(middle, 0) - middle) / about
            rest = 1.0 - top_p
            nearer = tl.max(tl.where(share <= rest * (1.0 + ESTIMATE), b, floor), axis=0)
            bin_top = tl.minimum(bin_top, nearer)
            nearer = tl.max(tl.where(share <= rest * (1.0 - ESTIMATE), b, floor), axis=0)
            bin_low = tl.maximum(bin_low, nearer)
    tl.store(words_ptr + r * WORDS + BIN_K, bin_k)
    tl.store(words_ptr + r * WORDS + BIN_K_TOP, bin_k_top)
    tl.store(words_ptr + r * WORDS + BIN_TOP, bin_top)
    tl.store(words_ptr + r * WORDS + BIN_LOW, bin_low)
    tl.store(words_ptr + r * WORDS + ABOVE_K, above_k)


@triton.jit
def join(
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
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BINS: tl.constexpr,
    ROOM: tl.constexpr,
    TILE: tl.constexpr,
):
    """Finishes row r, or leaves its bins to sample_collect."""
    SPLIT_TILE: tl.constexpr = triton.next_power_of_2(SPLITS)
    target = tl.load(row_target_ptr + r)
    flags = tl.load(row_flags_ptr + r)
    top = tl.minimum(tl.load(row_top_ptr + r), TOP)
    k = tl.load(top_k_ptr + r)
    top_p = tl.load(top_p_ptr + r)
    masked = (target < 0) & (tl.load(row_mask_ptr + r) >= 0)
    s = tl.arange(0, SPLIT_TILE)
    parts = r * PROGRAMS + s
    used = s < PROGRAMS
    lowest = float("-inf")
    bests = tl.load(best_ptr + parts, used, lowest)
    raw_maxs = tl.load(raw_max_ptr + parts, used, lowest)
    bad = tl.max(tl.load(bad_ptr + parts, used, 0), axis=0)
    best = tl.max(bests, axis=0)
    bad = tl.where((bad == 0) & masked & (best == lowest), NOTHING_ALLOWED, bad)
    first = tl.min(tl.where(used & (bests == best), s, PROGRAMS - 1), axis=0)
    best_id = tl.load(best_id_ptr + r * PROGRAMS + first)
    log_sum = tl.max(raw_maxs, axis=0)
    if wants_sum:
        sums = tl.load(raw_sum_ptr + parts, used, 0.0)
        log_sum += tl.log(tl.sum(sums * tl.exp(raw_maxs - log_sum), axis=0))
    drawn = drawn & (bad == 0) & (tl.abs(best) < float("inf"))
    pending = drawn & limited
    tl.store(words_ptr + r * WORDS + PENDING, pending.to(tl.int32))
    tl.store(status_ptr + r, bad)

    parts = r * SPLITS + s
    used = s < SPLITS
    lane = tl.arange(0, TOP_TILE)
    ids = tl.full((TOP_TILE,), -1, tl.int32)
    logprobs = tl.full((TOP_TILE,), float("nan"), tl.float32)
    if (top > 0) & (bad == 0):
        at = parts[:, None] * TOP_TILE + lane[None, :]
        listed = used[:, None] & (lane[None, :] < top)
        keys = tl.load(top_ptr + at, listed, LOWEST)
        for i in range(tl.minimum(top, VOCAB)):
            key = tl.max(tl.max(keys, axis=1), axis=0)
            value, id = unpack(key)
            ids = tl.where(lane == i, id, ids)
            logprobs = tl.where(lane == i, value - log_sum, logprobs)
            keys = tl.where(keys == key, LOWEST, keys)
    tl.store(top_ids_ptr + r * TOP + lane, ids, lane < TOP)
    tl.store(top_logprobs_ptr + r * TOP + lane, logprobs, lane < TOP)

    if bad != 0:
        tl.store(token_ptr + r, 0)
        tl.store(logprob_ptr + r, float("nan"))
    elif pending:
        tl.store(words_ptr + r * WORDS + BEST_ID, best_id)
        tl.store(words_ptr + r * WORDS + CANDIDATES, 0)
        tl.store(reals_ptr + r * REALS + BEST, best)
        tl.store(reals_ptr + r * REALS + LOG_SUM, log_sum)
        find_bins(
            r,
            k,
            top_p,
            (k > 0) & (k < VOCAB),
            top_p < 1.0,
            best,
            inverse,
            bins_ptr,
            mass_ptr,
            words_ptr,
            reals_ptr,
            VOCAB,
            PROGRAMS,
            BINS,
            ROOM,
        )
    else:
        token = tl.where(target >= 0, target, best_id)
        if drawn:
            bests = tl.load(chunk_best_ptr + parts, used, lowest)
            weights = tl.load(weight_ptr + parts, used, 0)
            factor = tl.where(bests > lowest, tl.exp((bests - best) * inverse), 0.0)
            share = weights.to(tl.float64) * factor.to(tl.float64)
            cdf = tl.cumsum(share, 0)
            position = tl.load(positions_ptr + tl.load(row_token_ptr + r))
            draw = uniform(tl.load(seed_ptr + r), position) * tl.sum(share, axis=0)
            chunk = tl.min(tl.where((cdf > draw) & (share > 0.0), s, SPLIT_TILE), axis=0)
            last = tl.max(tl.where(share > 0.0, s, 0), axis=0)
            chunk = tl.minimum(chunk, last)
            before = tl.sum(tl.where(s < chunk, share, 0.0), axis=0)
            token = pick(
                row,
                inverse,
                best,
                best_id,
                0.0,
                LOWEST,
                chunk,
                (draw - before).to(tl.int64),
                VOCAB,
                CHUNK,
                TILE,
            )
        emit(
            r,
            token,
            tl.load(row_slot_ptr + r),
            target,
            flags,
            log_sum,
            row,
            last_ptr,
            token_ptr,
            logprob_ptr,
        )
