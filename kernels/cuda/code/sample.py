"""Sampling in one or two reads of the logits, without sorting (kernels/ops/sample.py says what is
computed).

scan_kernel reads every row once: best value, sums, finiteness. The last program of a row joins the
chunks and finishes rows that are greedy, given, or drawn without filters. For top-k, top-p and
min-p it counts the values into a histogram, from which it knows the bin of the k-th value exactly
and the bins that can hold the last value of top-p. collect_kernel reads such rows a second time:
exact masses above those bins, and the few candidates within; its last program searches the
threshold among the candidates and draws. Should they be too many, or the estimate have missed, it
searches the row itself: slower, equally exact.

A weight e^((z - best) / temperature) is a multiple of 2^-40 in int64, so sums of weights do not
depend on their order and the choice of a token on neither grid nor chunk. A value and its id are
packed into one int64 that grows with the value and, among equal values, with lower ids: a set of
best tokens is {key >= pivot}.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code import pdl

TOP = tl.constexpr(20)
TOP_TILE = tl.constexpr(32)
SEEN = tl.constexpr(1 << 30)
PENALTIES = tl.constexpr(1)
LOGPROB = tl.constexpr(2)
NOTHING_ALLOWED = tl.constexpr(2)
GREEDY_BELOW = tl.constexpr(1e-5)
LEAD = tl.constexpr(1024)  # logits whose maximum and spread place the bins
LOWEST = tl.constexpr(-(1 << 63))
UNIT = tl.constexpr(1099511627776.0)  # of weights: 2^40
ESTIMATE = tl.constexpr(0.003)  # how far bin centres misjudge cumulated weights, at most
# Words of a row's state between the kernels.
PENDING = tl.constexpr(0)
BEST_ID = tl.constexpr(1)
BIN_K = tl.constexpr(2)
BIN_TOP = tl.constexpr(3)
BIN_LOW = tl.constexpr(4)
ABOVE_K = tl.constexpr(5)
CANDIDATES = tl.constexpr(6)
WORDS = tl.constexpr(8)
BEST = tl.constexpr(0)
LOG_SUM = tl.constexpr(1)
REFERENCE = tl.constexpr(2)
SCALE = tl.constexpr(3)
REALS = tl.constexpr(4)


@triton.jit
def mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def uniform(seed, position):
    """SplitMix64 of (seed, position), 53 bits, in [0, 1)."""
    x = mix(seed.to(tl.uint64) + 0x9E3779B97F4A7C15)
    x = mix(x + (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15)
    return (x >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def pack(z, id):
    """Keys of (value, id); +0 and -0 are equal values."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - id).to(tl.int64)


@triton.jit
def unpack(key):
    order = (key >> 32).to(tl.int32)
    bits = order ^ ((order >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True), 0x7FFFFFFF - (key & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def row_values(row, column, inside):
    """What sampling makes of a row's logits, -inf outside the vocabulary and the row's mask."""
    logits, counts_ptr, bias_ptr, penalised, frequency, presence, repetition, mask_ptr, masked = row
    x = tl.load(logits + column, inside, float("-inf"))
    z = x
    if penalised:
        counts = tl.load(counts_ptr + column, inside, 0)
        output = counts & (SEEN - 1)
        z = tl.where(counts != 0, tl.where(x > 0.0, tl.div_rn(x, repetition), x * repetition), x)
        z = z - frequency * output.to(tl.float32) - tl.where(output > 0, presence, 0.0)
        z += tl.load(bias_ptr + column, inside, 0.0)
    if masked:
        word = tl.load(mask_ptr + (column >> 5), inside, 0)
        z = tl.where(((word >> (column & 31)) & 1) != 0, z, float("-inf"))
    return x, z


@triton.jit
def fixed(e):
    return (e * UNIT).to(tl.int64)


@triton.jit
def bin_of(z, reference, scale, BINS: tl.constexpr):
    """Bins grow with z, from 1; the outermost take everything beyond. No product is followed by a
    sum that could be contracted, so both kernels agree to the bit."""
    place = tl.floor((z - reference) * scale)
    place = tl.minimum(tl.maximum(place, -1.0 * BINS), 1.0 * BINS).to(tl.int32)
    return tl.minimum(tl.maximum(place + BINS // 8 * 5, 1), BINS - 1)


@triton.jit
def pick(
    row,
    inverse,
    best,
    best_id,
    min_p,
    pivot,
    chunk,
    rest,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The first id of a chunk where the weights of what is kept, summed from the chunk's start,
    exceed `rest`."""
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = column < VOCAB
    _x, z = row_values(row, column, inside)
    e = tl.exp((z - best) * inverse)
    keep = inside & (pack(z, column) >= pivot) & ((e >= min_p) | (column == best_id))
    weight = tl.where(keep, fixed(e), 0)
    chosen = tl.min(tl.where(tl.cumsum(weight, 0) > rest, column, VOCAB), axis=0)
    # Rounding may leave `rest` a hair beyond the last entry of a row drawn without filters.
    last = tl.max(tl.where(weight > 0, column, -1), axis=0)
    chosen = tl.where(chosen < VOCAB, chosen, last)
    return tl.where(chosen >= 0, chosen, best_id)


@triton.jit
def emit(
    r,
    token,
    slot,
    target,
    flags,
    log_sum,
    row,
    last_ptr,
    token_ptr,
    logprob_ptr,
):
    """A row's token, its log-probability where wanted, and the sequence's state."""
    tl.store(token_ptr + r, token)
    wanted = ((flags & LOGPROB) != 0) | (target >= 0)
    logprob = tl.load(row[0] + token) - log_sum
    tl.store(logprob_ptr + r, tl.where(wanted, logprob, float("nan")))
    if target < 0:
        tl.store(last_ptr + slot, token)
        count = tl.load(row[1] + token)
        tl.debug_barrier()  # the count is read by every thread and written by one
        tl.store(row[1] + token, count + 1)


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
    counter_ptr,
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
):
    """Grid: chunks x rows. A chunk stays in registers; a greedy row is done after this read."""
    pdl.wait()
    c = tl.program_id(0)
    r = tl.program_id(1)
    if r < tl.load(live_ptr + 2):
        slot = tl.load(row_slot_ptr + r)
        target = tl.load(row_target_ptr + r)
        flags = tl.load(row_flags_ptr + r)
        top = tl.minimum(tl.load(row_top_ptr + r), TOP)
        k = tl.load(top_k_ptr + r)
        top_p = tl.load(top_p_ptr + r)
        min_p = tl.load(min_p_ptr + r)
        temperature = tl.load(temperature_ptr + r)
        frequency = tl.load(frequency_ptr + r)
        presence = tl.load(presence_ptr + r)
        repetition = tl.load(repetition_ptr + r)
        penalised = (target < 0) & ((flags & PENALTIES) != 0)
        drawn = (target < 0) & (temperature >= GREEDY_BELOW)
        inverse = 1.0 / tl.where(drawn, temperature, 1.0)
        has_k = (k > 0) & (k < VOCAB)
        has_p = top_p < 1.0
        limited = drawn & (has_k | has_p | (min_p > 0.0))
        logits = logits_ptr + r.to(tl.int64) * COLUMNS
        state_at = slot.to(tl.int64) * STATE
        counts = counts_ptr + state_at
        bias = bias_ptr + state_at
        mask_row = tl.load(row_mask_ptr + r)
        masked = (target < 0) & (mask_row >= 0)
        mask = masks_ptr + mask_row.to(tl.int64) * MASK
        row = (logits, counts, bias, penalised, frequency, presence, repetition, mask, masked)

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
        wants_sum = ((flags & LOGPROB) != 0) | (target >= 0) | (top > 0)
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
        if limited:
            lead = tl.arange(0, LEAD)
            exists = lead < VOCAB
            y = tl.load(logits + lead, exists, float("-inf"))
            reference = tl.max(y, axis=0)
            mean = tl.sum(tl.where(exists, y, 0.0), axis=0) / tl.minimum(LEAD, VOCAB)
            # 32 bins to a factor of e, more where the logits are so even that many share a bin
            scale = tl.maximum(32.0 * inverse, 200.0 / tl.maximum(reference - mean, 1e-6))
            possible = inside & (z > float("-inf"))
            bins = tl.histogram(bin_of(z, reference, scale, BINS), BINS, mask=possible)
            b = tl.arange(0, BINS)
            tl.store(bins_ptr + part.to(tl.int64) * BINS + b, bins.to(tl.int16))
            tl.store(reals_ptr + r * REALS + REFERENCE, reference)  # every chunk, the same
            tl.store(reals_ptr + r * REALS + SCALE, scale)

        tl.debug_barrier()  # all of this program's results are on their way before its ticket
        ticket = tl.atomic_add(counter_ptr + r, 1, sem="acq_rel", scope="gpu")
        if ticket == SPLITS - 1:
            tl.store(counter_ptr + r, 0)
            s = tl.arange(0, SPLIT_TILE)
            parts = r * SPLITS + s
            used = s < SPLITS
            lowest = float("-inf")
            bests = tl.load(best_ptr + parts, used, lowest, cache_modifier=".cg")
            raw_maxs = tl.load(raw_max_ptr + parts, used, lowest, cache_modifier=".cg")
            bad = tl.max(tl.load(bad_ptr + parts, used, 0, cache_modifier=".cg"), axis=0)
            best = tl.max(bests, axis=0)
            bad = tl.where((bad == 0) & masked & (best == lowest), NOTHING_ALLOWED, bad)
            first = tl.min(tl.where(used & (bests == best), s, SPLITS - 1), axis=0)
            best_id = tl.load(best_id_ptr + r * SPLITS + first, cache_modifier=".cg")
            log_sum = tl.max(raw_maxs, axis=0)
            if wants_sum:
                sums = tl.load(raw_sum_ptr + parts, used, 0.0, cache_modifier=".cg")
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
                keys = tl.load(top_ptr + at, listed, LOWEST, cache_modifier=".cg")
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
                token = tl.where(target >= 0, target, best_id)
                if drawn:
                    weights = tl.load(weight_ptr + parts, used, 0, cache_modifier=".cg")
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
                    )
                emit(
                    r,
                    token,
                    slot,
                    target,
                    flags,
                    log_sum,
                    row,
                    last_ptr,
                    token_ptr,
                    logprob_ptr,
                )
    pdl.release()


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
        n += tl.sum(
            tl.load(bins_ptr + at, part < SPLITS, 0, cache_modifier=".cg").to(tl.int32), axis=0
        )
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
def tally(
    row,
    inverse,
    best,
    best_id,
    min_p,
    reference,
    scale,
    candidates_ptr,
    whole,
    items,
    pivot,
    low,
    high,
    end,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Of a row's candidates, or of the whole row, those with keys from `pivot` on, bins from `low`
    to `high`, ids below `end` and weights of min_p or more: how many they are, what they weigh,
    their lowest and highest key."""
    count = tl.sum(tl.zeros((TILE,), tl.int64), axis=0)
    mass = tl.sum(tl.zeros((TILE,), tl.int64), axis=0)
    least = tl.max(tl.full((TILE,), 0x7FFFFFFFFFFFFFFE, tl.int64), axis=0)
    most = tl.max(tl.full((TILE,), LOWEST, tl.int64), axis=0)
    for start in range(0, items, TILE):
        i = start + tl.arange(0, TILE)
        exists = i < items
        if whole:
            _x, z = row_values(row, i, exists)
            key = pack(z, i)
        else:
            key = tl.load(candidates_ptr + i, exists, LOWEST)
        z, id = unpack(key)
        e = tl.exp((z - best) * inverse)
        b = bin_of(z, reference, scale, BINS)
        keep = exists & (key >= pivot) & (b >= low) & (b <= high) & (id < end)
        keep = keep & ((e >= min_p) | (id == best_id))
        count += tl.sum(keep.to(tl.int64), axis=0)
        mass += tl.sum(tl.where(keep, fixed(e), 0), axis=0)
        least = tl.minimum(least, tl.min(tl.where(keep, key, 0x7FFFFFFFFFFFFFFE), axis=0))
        most = tl.maximum(most, tl.max(tl.where(keep, key, LOWEST), axis=0))
    return count, mass, least, most


@triton.jit
def search(
    row,
    inverse,
    best,
    best_id,
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
        best_id,
        0.0,
        reference,
        scale,
        candidates_ptr,
        whole,
        items,
        LOWEST,
        low,
        high,
        0x7FFFFFFF,
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
            best_id,
            0.0,
            reference,
            scale,
            candidates_ptr,
            whole,
            items,
            middle,
            low,
            high,
            0x7FFFFFFF,
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
    counter_ptr,
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
    SPLIT_TILE: tl.constexpr,
    BINS: tl.constexpr,
    ROOM: tl.constexpr,
    TILE: tl.constexpr,
):
    """A fixed grid goes through the chunks of all rows and takes those that are pending: a batch
    without any costs little more than the launch."""
    pdl.wait()
    work = tl.load(live_ptr + 2) * SPLITS
    for start in range(0, work, tl.num_programs(0)):
        part = start + tl.program_id(0)
        r = part // SPLITS
        if tl.load(words_ptr + r * WORDS + PENDING, part < work, 0) != 0:
            slot = tl.load(row_slot_ptr + r)
            flags = tl.load(row_flags_ptr + r)
            k = tl.load(top_k_ptr + r)
            top_p = tl.load(top_p_ptr + r)
            min_p = tl.load(min_p_ptr + r)
            frequency = tl.load(frequency_ptr + r)
            presence = tl.load(presence_ptr + r)
            repetition = tl.load(repetition_ptr + r)
            inverse = 1.0 / tl.load(temperature_ptr + r)
            penalised = (flags & PENALTIES) != 0
            has_p = top_p < 1.0
            logits = logits_ptr + r.to(tl.int64) * COLUMNS
            state_at = slot.to(tl.int64) * STATE
            counts = counts_ptr + state_at
            bias = bias_ptr + state_at
            mask_row = tl.load(row_mask_ptr + r)
            mask = masks_ptr + mask_row.to(tl.int64) * MASK
            masked = mask_row >= 0
            row = (logits, counts, bias, penalised, frequency, presence, repetition, mask, masked)
            best_id = tl.load(words_ptr + r * WORDS + BEST_ID)
            bin_k = tl.load(words_ptr + r * WORDS + BIN_K)
            has_k = bin_k > 0
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

            tl.debug_barrier()
            ticket = tl.atomic_add(counter_ptr + r, 1, sem="acq_rel", scope="gpu")
            if ticket == SPLITS - 1:
                tl.store(counter_ptr + r, 0)
                s = tl.arange(0, SPLIT_TILE)
                used = s < SPLITS
                all_masses = masses_ptr + (r * SPLITS + s).to(tl.int64) * 4
                above_k = tl.sum(tl.load(all_masses, used, 0, cache_modifier=".cg"), axis=0)
                above_top = tl.sum(tl.load(all_masses + 1, used, 0, cache_modifier=".cg"), axis=0)
                sures = tl.load(all_masses + 2, used, 0, cache_modifier=".cg")
                items = tl.load(words_ptr + r * WORDS + CANDIDATES, cache_modifier=".cg")
                better_k = tl.load(words_ptr + r * WORDS + ABOVE_K)
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
                            best_id,
                            reference,
                            scale,
                            own_ptr,
                            whole,
                            items,
                            tl.where(whole, 0, bin_k),
                            tl.where(whole, BINS, bin_k),
                            (k - tl.where(whole, 0, better_k)).to(tl.int64),
                            True,
                            BINS,
                            TILE,
                        )
                    if has_p:
                        if has_k | whole:
                            _count, kept, _least, _most = tally(
                                row,
                                inverse,
                                best,
                                best_id,
                                0.0,
                                reference,
                                scale,
                                own_ptr,
                                whole,
                                items,
                                pivot,
                                tl.where(whole, 0, bin_k),
                                tl.where(whole, BINS, bin_k),
                                0x7FFFFFFF,
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
                            best_id,
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
                sures = tl.where(whole, 0, sures)
                position = tl.load(positions_ptr + tl.load(row_token_ptr + r))
                random = uniform(tl.load(seed_ptr + r), position)
                draw = pivot * 0
                before = pivot * 0
                # First every chunk, for the total; then the chunk in which the draw falls.
                chunk, beyond, end = best_id * 0, best_id * 0 + 2 * SPLITS, best_id * 0 + SPLITS
                while chunk + 1 < beyond:
                    _count, kept, _least, _most = tally(
                        row,
                        inverse,
                        best,
                        best_id,
                        min_p,
                        reference,
                        scale,
                        own_ptr,
                        whole,
                        items,
                        pivot,
                        0,
                        BINS,
                        end * CHUNK,
                        BINS,
                        TILE,
                    )
                    kept += tl.sum(tl.where(s < end, sures, 0), axis=0)
                    if beyond > SPLITS:
                        draw = (random * kept.to(tl.float64)).to(tl.int64)
                        draw = tl.minimum(draw, kept - 1)
                        beyond = end
                    else:
                        passed = kept > draw
                        before = tl.where(passed, before, kept)
                        chunk = tl.where(passed, chunk, end)
                        beyond = tl.where(passed, end, beyond)
                    end = (chunk + beyond) // 2
                token = pick(
                    row,
                    inverse,
                    best,
                    best_id,
                    min_p,
                    pivot,
                    chunk,
                    draw - before,
                    VOCAB,
                    CHUNK,
                )
                emit(
                    r,
                    token,
                    slot,
                    -1,
                    flags,
                    tl.load(reals_ptr + r * REALS + LOG_SUM),
                    row,
                    last_ptr,
                    token_ptr,
                    logprob_ptr,
                )
    pdl.release()
