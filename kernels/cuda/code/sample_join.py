"""Sampling, third: the chunks of a row joined (sample_scan.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code import pdl
from kernels.cuda.code.sampling import (
    ABOVE_K,
    BEST,
    BEST_ID,
    BIN_K,
    BIN_LOW,
    BIN_TOP,
    CANDIDATES,
    ESTIMATE,
    GREEDY_BELOW,
    LOG_SUM,
    LOGPROB,
    LOWEST,
    NOTHING_ALLOWED,
    PENDING,
    REALS,
    REFERENCE,
    SCALE,
    TOP,
    TOP_TILE,
    WORDS,
    emit,
    pick,
    row_of,
    uniform,
    unpack,
)


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
    words_ptr,
    reals_ptr,
    SPLITS: tl.constexpr,
    BINS: tl.constexpr,
    ROOM: tl.constexpr,
):
    """The bin of the k-th value, exactly, and the bins that can hold the last value of top-p, from
    the bounds that a bin's edges put on its weights; where those leave more than ROOM candidates,
    from the weights at the bins' centres."""
    b = tl.arange(0, BINS)
    n = tl.zeros((BINS,), tl.int32)
    for s in range(0, SPLITS, 4):
        part = s + tl.arange(0, 4)[:, None]
        at = (r * SPLITS + part).to(tl.int64) * BINS + b[None, :]
        n += tl.sum(tl.load(bins_ptr + at, part < SPLITS, 0).to(tl.int32), axis=0)
    reference = tl.load(reals_ptr + r * REALS + REFERENCE)
    scale = tl.load(reals_ptr + r * REALS + SCALE)
    from_here = tl.sum(n, axis=0) - tl.cumsum(n, 0) + n  # values in this bin and better ones
    # 0, and no limit, where there are no k values
    bin_k = tl.where(has_k, tl.max(tl.where(from_here >= k, b, 0), axis=0), 0)
    has_k = bin_k > 0
    above_k = tl.sum(tl.where(b > bin_k, n, 0), axis=0)
    bin_top = bin_k
    bin_low = tl.where(has_k, bin_k, 1)
    if has_p:
        # Of a bin only partly in top-k, the part is known.
        inside = tl.where(b > bin_k, n, tl.where(has_k & (b == bin_k), k - above_k, 0))
        inside = inside.to(tl.float32)
        edge = (b - BINS // 8 * 5).to(tl.float32)
        offset = reference - best
        low = tl.exp(tl.minimum((edge / scale + offset) * inverse, 0.0))
        high = tl.exp(tl.minimum(((edge + 1.0) / scale + offset) * inverse, 0.0))
        middle = tl.exp(tl.minimum(((edge + 0.5) / scale + offset) * inverse, 0.0))
        low = tl.where(b == 1, 0.0, low) * inside * 0.9999
        high = tl.where(b == BINS - 1, 1.0, high) * inside * 1.0001
        middle *= inside
        most, least, about = tl.sum(high, axis=0), tl.sum(low, axis=0), tl.sum(middle, axis=0)
        high = most - tl.cumsum(high, 0) + high
        low = least - tl.cumsum(low, 0) + low
        middle = about - tl.cumsum(middle, 0) + middle
        floor = tl.maximum(bin_k, 1)
        slack = 1e-5 * most
        bin_top = tl.max(tl.where(high + slack >= top_p * least, b, floor), axis=0)
        bin_low = tl.max(tl.where(low - slack >= top_p * most, b, floor), axis=0)
        held = tl.sum(tl.where((b >= bin_low) & (b <= bin_top), n, 0), axis=0)
        if held > ROOM // 2:
            bin_top = tl.max(tl.where(middle >= (top_p - ESTIMATE) * about, b, floor), axis=0)
            bin_low = tl.max(tl.where(middle >= (top_p + ESTIMATE) * about, b, floor), axis=0)
    tl.store(words_ptr + r * WORDS + BIN_K, bin_k)
    tl.store(words_ptr + r * WORDS + BIN_TOP, bin_top)
    tl.store(words_ptr + r * WORDS + BIN_LOW, bin_low)
    tl.store(words_ptr + r * WORDS + ABOVE_K, above_k)


@triton.jit
def join_kernel(
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
    weight_ptr,
    top_ptr,
    bins_ptr,
    words_ptr,
    reals_ptr,
    VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,
    STATE: tl.constexpr,
    MASK: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_TILE: tl.constexpr,
    BINS: tl.constexpr,
    ROOM: tl.constexpr,
    TILE: tl.constexpr,
):
    """Grid: rows."""
    pdl.wait()
    r = tl.program_id(0)
    if r < tl.load(live_ptr + 2):
        target = tl.load(row_target_ptr + r)
        flags = tl.load(row_flags_ptr + r)
        top = tl.minimum(tl.load(row_top_ptr + r), TOP)
        k = tl.load(top_k_ptr + r)
        top_p = tl.load(top_p_ptr + r)
        temperature = tl.load(temperature_ptr + r)
        drawn = (target < 0) & (temperature >= GREEDY_BELOW)
        inverse = 1.0 / tl.where(drawn, temperature, 1.0)
        has_k = (k > 0) & (k < VOCAB)
        has_p = top_p < 1.0
        limited = drawn & (has_k | has_p | (tl.load(min_p_ptr + r) > 0.0))
        wants_sum = ((flags & LOGPROB) != 0) | (target >= 0) | (top > 0)
        masked = (target < 0) & (tl.load(row_mask_ptr + r) >= 0)
        s = tl.arange(0, SPLIT_TILE)
        parts = r * SPLITS + s
        used = s < SPLITS
        lowest = float("-inf")
        bests = tl.load(best_ptr + parts, used, lowest)
        raw_maxs = tl.load(raw_max_ptr + parts, used, lowest)
        bad = tl.max(tl.load(bad_ptr + parts, used, 0), axis=0)
        best = tl.max(bests, axis=0)
        bad = tl.where((bad == 0) & masked & (best == lowest), NOTHING_ALLOWED, bad)
        first = tl.min(tl.where(used & (bests == best), s, SPLITS - 1), axis=0)
        best_id = tl.load(best_id_ptr + r * SPLITS + first)
        log_sum = tl.max(raw_maxs, axis=0)
        if wants_sum:
            sums = tl.load(raw_sum_ptr + parts, used, 0.0)
            log_sum += tl.log(tl.sum(sums * tl.exp(raw_maxs - log_sum), axis=0))
        drawn = drawn & (bad == 0) & (tl.abs(best) < float("inf"))
        pending = drawn & limited
        tl.store(words_ptr + r * WORDS + PENDING, pending.to(tl.int32))
        tl.store(status_ptr + r, bad)

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
                has_k,
                has_p,
                best,
                inverse,
                bins_ptr,
                words_ptr,
                reals_ptr,
                SPLITS,
                BINS,
                ROOM,
            )
        else:
            row = row_of(
                r,
                target < 0,
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
            token = tl.where(target >= 0, target, best_id)
            if drawn:
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
    pdl.release()
