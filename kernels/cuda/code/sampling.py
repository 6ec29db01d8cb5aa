"""What the kernels of sampling share (sample_scan.py says how they work together): a row's values
after penalties, bias and mask, their keys, weights and bins; random numbers; what a row leaves.
"""

from __future__ import annotations

import triton
import triton.language as tl

TOP = tl.constexpr(20)
TOP_TILE = tl.constexpr(32)
SEEN = tl.constexpr(1 << 30)
PENALTIES = tl.constexpr(1)
LOGPROB = tl.constexpr(2)
NOTHING_ALLOWED = tl.constexpr(2)
GREEDY_BELOW = tl.constexpr(1e-5)
LEAD = tl.constexpr(1024)  # logits whose spread places the bins
SECTOR = tl.constexpr(8)  # logits that memory gives in one piece
BELOW = tl.constexpr(72)  # bins below the reference
PER_SPREAD = tl.constexpr(24.0)  # bins of one standard deviation
LOWEST = tl.constexpr(-(1 << 63))
MOST_EXPONENT = tl.constexpr(60.0)  # of a sum in float32 that does not know the best value
UNIT = tl.constexpr(1099511627776.0)  # of weights: 2^40
ESTIMATE = tl.constexpr(0.01)  # how far bin centres misjudge cumulated weights, at most
# Words of a row's state between the kernels.
PENDING = tl.constexpr(0)
BEST_ID = tl.constexpr(1)
BIN_K = tl.constexpr(2)
BIN_TOP = tl.constexpr(3)
BIN_LOW = tl.constexpr(4)
ABOVE_K = tl.constexpr(5)
CANDIDATES = tl.constexpr(6)
BIN_K_TOP = tl.constexpr(7)
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
def row_of(
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
    COLUMNS: tl.constexpr,
    STATE: tl.constexpr,
    MASK: tl.constexpr,
):
    """What `row_values` reads of row r; without penalties and mask where it is not sampled."""
    state_at = tl.load(row_slot_ptr + r).to(tl.int64) * STATE
    mask_row = tl.load(row_mask_ptr + r)
    return (
        logits_ptr + r.to(tl.int64) * COLUMNS,
        counts_ptr + state_at,
        bias_ptr + state_at,
        sampled & ((tl.load(row_flags_ptr + r) & PENALTIES) != 0),
        tl.load(frequency_ptr + r),
        tl.load(presence_ptr + r),
        tl.load(repetition_ptr + r),
        masks_ptr + mask_row.to(tl.int64) * MASK,
        sampled & (mask_row >= 0),
    )


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
def few_of(k, VOCAB: tl.constexpr, ROOM: tl.constexpr):
    """Whether top-k keeps so few that they all may be candidates."""
    return (k > 0) & (k < VOCAB) & (k <= ROOM // 4)


@triton.jit
def place_bins(logits, VOCAB: tl.constexpr):
    """Reference and scale of a row's bins, from a sample of its logits: the mean of those above
    the mean, and their spread above that in normal deviations. A cluster far below, or a few
    values far above, do not widen the bins."""
    STRIDE: tl.constexpr = max(VOCAB // LEAD * SECTOR, SECTOR)
    i = tl.arange(0, LEAD)
    at = i // SECTOR * STRIDE + i % SECTOR
    exists = at < VOCAB
    y = tl.load(logits + at, exists, 0.0)
    mean = tl.sum(y, axis=0) / tl.sum(exists.to(tl.float32), axis=0)
    above = exists & (y >= mean)
    reference = tl.sum(tl.where(above, y, 0.0), axis=0)
    reference /= tl.maximum(tl.sum(above.to(tl.float32), axis=0), 1.0)
    above = exists & (y >= reference)
    excess = tl.sum(tl.where(above, y - reference, 0.0), axis=0)
    excess /= tl.maximum(tl.sum(above.to(tl.float32), axis=0), 1.0)
    # Of a normal distribution the excess is 0.567 deviations.
    return reference, PER_SPREAD * 0.567 / tl.maximum(excess, 1e-6)


@triton.jit
def bin_of(z, reference, scale, BINS: tl.constexpr):
    """Bins grow with z, from 1; the outermost take everything beyond. No product is followed by a
    sum that could be contracted, so both kernels agree to the bit."""
    place = tl.floor((z - reference) * scale)
    place = tl.minimum(tl.maximum(place, -1.0 * BINS), 1.0 * BINS).to(tl.int32)
    return tl.minimum(tl.maximum(place + BELOW, 1), BINS - 1)


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
    TILE: tl.constexpr,
):
    """The first id of a chunk where the weights of what is kept, summed from the chunk's start,
    exceed `rest`."""
    chosen = chunk * 0 + VOCAB
    last = chunk * 0 - 1
    passed = rest * 0
    for start in range(0, CHUNK, TILE):
        column = chunk * CHUNK + start + tl.arange(0, TILE)
        inside = column < VOCAB
        _x, z = row_values(row, column, inside)
        e = tl.exp((z - best) * inverse)
        keep = inside & (pack(z, column) >= pivot) & ((e >= min_p) | (column == best_id))
        weight = tl.where(keep, fixed(e), 0)
        beyond = passed + tl.cumsum(weight, 0) > rest
        chosen = tl.minimum(chosen, tl.min(tl.where(beyond & keep, column, VOCAB), axis=0))
        last = tl.maximum(last, tl.max(tl.where(weight > 0, column, -1), axis=0))
        passed += tl.sum(weight, axis=0)
    # Rounding may leave `rest` a hair beyond the last entry of a row drawn without filters.
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
