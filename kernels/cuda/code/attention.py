"""Attention over paged keys and values: split-KV over a whole ragged batch, and flash attention.

A tile of queries is ROWS rows of one KV head: row r is token r // TILE_HEADS of the tile and head
r % TILE_HEADS of the group, so the query heads that share keys share their tensor core product. A
group of more than ROWS heads takes HEAD_TILES tiles. Values have DIM columns, keys DIM + REST: two
products of widths that are powers of two, where one would be padded. Latent attention is the case
of one KV head whose values are the first DIM columns of its keys (VALUES is 0).

Scores are kept in units of log2, weights are exp2(score - top). Online softmax: Milakov and
Gimelshein 2018; split-KV and its merge: Dao et al., Flash-Decoding 2023; flat sharing of a ragged
batch as in stream-K (Osama et al. 2023).

Keys come by the page table, 16 tokens a page, gathered by pointer: a page holds 16 * DIM
contiguous elements of a head, so every row is read in 16-byte pieces and the pipeliner turns the
gather into asynchronous copies. Why not by tensor maps: docs/cuda.md.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code import pdl
from kernels.cuda.code.narrow import F16_LARGEST, clipped

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # below every score, and finite: lowest - lowest is 0, not NaN
PAGE_TOKENS = tl.constexpr(16)
# Of keys, which are not negative: a signed division would take three instructions.
PAGE_SHIFT = tl.constexpr(4)
PAGE_MASK = tl.constexpr(15)


@triton.jit
def first_block(length, count, WINDOW: tl.constexpr, KEYS: tl.constexpr):
    """First block of keys that any of the `count` newest tokens sees."""
    if WINDOW:
        return tl.maximum(length - count - WINDOW + 1, 0) // KEYS
    return length * 0


@triton.jit
def row_heads(r, tile, GROUP: tl.constexpr, TILE_HEADS: tl.constexpr, HEAD_TILES: tl.constexpr):
    """Token within the tile, head, and whether the head exists, of every row."""
    lane = tile % HEAD_TILES * TILE_HEADS + r % TILE_HEADS
    return r // TILE_HEADS, tile // HEAD_TILES * GROUP + lane, lane < GROUP


@triton.jit
def rows_again(r, tile, zero, GROUP: tl.constexpr, TILE_HEADS: tl.constexpr,
               HEAD_TILES: tl.constexpr):  # fmt: skip
    """`row_heads` behind a loop, computed anew: `zero` is a difference of loads that the compiler
    does not see through, so it holds nothing of this in registers over the loop."""
    return row_heads(r + zero, tile, GROUP, TILE_HEADS, HEAD_TILES)


@triton.jit
def load_queries(q_ptr, kv_ptr, row, head, valid, columns, BEGIN: tl.constexpr, WIDTH: tl.constexpr,
                 Q_ROW: tl.constexpr, Q_HEAD: tl.constexpr):  # fmt: skip
    """Columns BEGIN .. BEGIN + WIDTH of the tile's query heads, zero where there is none; in the
    type of the product: float32 where either side is, float16 over fp8 pages. float16 holds every
    value of both kinds of fp8, and one instruction makes two of them; bfloat16 takes that one and
    two conversions in the unit of transcendental functions (F2F, 16 lanes of 128). Queries keep all
    their bits (weights gain three) up to 65504, where they saturate."""
    at = row.to(tl.int64) * Q_ROW + head * Q_HEAD + BEGIN
    mask = valid[:, None] & (columns < WIDTH)[None, :]
    q = tl.load(q_ptr + at[:, None] + columns[None, :], mask, 0.0)
    type: tl.constexpr = kv_ptr.dtype.element_ty
    if type == tl.float32:
        q = q.to(tl.float32)
    elif q.dtype == tl.bfloat16 and (type == tl.float8e4nv or type == tl.float8e5):
        q = clipped(q.to(tl.float32), F16_LARGEST).to(tl.float16)
    return q


@triton.jit
def load_rows(pointers, columns, WIDTH: tl.constexpr, PAD: tl.constexpr):
    """Rows of WIDTH elements, PAD wide."""
    if WIDTH < PAD:
        return tl.load(pointers, (columns < WIDTH)[None, :], 0.0)
    return tl.load(pointers)


@triton.jit
def page_of(table_ptr, block, length, KEYS: tl.constexpr):
    """Page of every key of a block; of the last key beyond the sequence."""
    key = tl.minimum(block * KEYS + tl.arange(0, KEYS), length - 1)
    return tl.load(table_ptr + (key >> PAGE_SHIFT))


@triton.jit
def attend(acc, top, total, page, q, q_rest, block, k_ptr, v_ptr, table_ptr, length, position,
           unit, slope, DIM: tl.constexpr, DIM_PAD: tl.constexpr, REST: tl.constexpr,
           REST_PAD: tl.constexpr, PAGE: tl.constexpr, VALUES: tl.constexpr, KEYS: tl.constexpr,
           CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
           MASKED: tl.constexpr):  # fmt: skip
    """One block of KEYS keys more. `acc` [ROWS, DIM_PAD], `top` and `total` [ROWS]: weighted
    values, largest score, sum of weights so far. `k_ptr`, `v_ptr`: the head in page 0. `page`
    [KEYS]: the block's pages, read an iteration ahead, so that the gather itself can be pipelined.
    `unit`: score of a unit of q . k, in log2, per row. Beyond the sequence the last key is read
    again: memory there was never written, and 0 * NaN is NaN."""
    key = block * KEYS + tl.arange(0, KEYS)
    dims = tl.arange(0, DIM_PAD)
    slot = tl.arange(0, KEYS) % PAGE_TOKENS
    if MASKED:
        slot = tl.minimum(key, length - 1) & PAGE_MASK
    following = page_of(table_ptr, block + 1, length, KEYS)
    at = page.to(tl.int64) * PAGE + slot * (DIM + REST)
    keys = k_ptr + at[:, None] + dims[None, :]
    k = load_rows(keys, dims, DIM, DIM_PAD).to(q.dtype)
    score = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    if REST:
        rests = tl.arange(0, REST_PAD)
        k_rest = load_rows(k_ptr + DIM + at[:, None] + rests[None, :], rests, REST, REST_PAD)
        k_rest = k_rest.to(q.dtype)
        score = tl.dot(q_rest, tl.trans(k_rest), score, input_precision="tf32x3")
    if SOFTCAP > 0:
        # cap * tanh(x / cap), tanh(x) = 1 - 2 / (e^2x + 1)
        x = score * (unit * (2.0 / SOFTCAP))[:, None]
        score = SOFTCAP * LOG2E - (2.0 * SOFTCAP * LOG2E) / (tl.exp2(x) + 1.0)
    elif slope is not None:
        score = score * unit[:, None]
    if slope is not None:
        score += (slope * LOG2E)[:, None] * (key[None, :] - position[:, None]).to(tl.float32)
    if MASKED:
        if CAUSAL:
            visible = key[None, :] <= position[:, None]
        else:
            visible = (key < length)[None, :]
        if WINDOW:
            visible = visible & (key[None, :] > position[:, None] - WINDOW)
        score = tl.where(visible, score, float("-inf"))
    if SOFTCAP > 0 or slope is not None:
        best = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - best[:, None])
    else:  # the scale goes into the multiply-add of the exponent
        best = tl.maximum(top, tl.max(score, 1) * unit)
        weight = tl.exp2(score * unit[:, None] - best[:, None])
    fade = tl.exp2(top - best)
    total = total * fade + tl.sum(weight, 1)
    if VALUES:
        values = keys + VALUES  # of the same shape: one address serves both
        if REST:
            at = page.to(tl.int64) * PAGE + slot * DIM
            values = v_ptr + at[:, None] + dims[None, :]
        v = load_rows(values, dims, DIM, DIM_PAD).to(q.dtype)
    else:
        v = k
    acc = tl.dot(weight.to(q.dtype), v, acc * fade[:, None], input_precision="tf32x3")
    return acc, best, total, following


@triton.jit
def row_unit(position, SCALE: tl.constexpr, LOGN: tl.constexpr):
    """Score of a unit of q . k in log2, per row."""
    if LOGN:
        longer = tl.log2((position + 1).to(tl.float32)) / tl.log2(LOGN * 1.0)
        return tl.maximum(longer, 1.0) * (SCALE * LOG2E)
    return tl.full(position.shape, SCALE * LOG2E, tl.float32)


@triton.jit
def write_out(out_ptr, sinks_ptr, acc, top, total, row, head, valid, columns, WIDTH: tl.constexpr,
              OUT_ROW: tl.constexpr):  # fmt: skip
    """Normalises `columns` of the rows and stores them; the sink is a key more, without value. The
    largest numbers of these columns, as stored."""
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, valid, 0.0).to(tl.float32) * LOG2E
        best = tl.maximum(top, sink)
        fade = tl.exp2(top - best)
        total = total * fade + tl.exp2(sink - best)
        acc = acc * fade[:, None]
    at = row.to(tl.int64) * OUT_ROW + head * WIDTH
    mask = valid[:, None] & (columns < WIDTH)[None, :]
    value = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at[:, None] + columns[None, :], value, mask)
    return tl.max(tl.where(mask, tl.abs(value.to(tl.float32)), 0.0), 1)


@triton.jit
def split_kernel(live_ptr, q_ptr, kv_ptr, seq_start_ptr, seq_len_ptr, pages_ptr, sinks_ptr,
                 alibi_ptr, out_ptr, amax_ptr, partial_ptr, counters_ptr,
                 SEQS_PAD: tl.constexpr, COLUMNS: tl.constexpr,
                 HEADS: tl.constexpr, KV_HEADS: tl.constexpr, TILE_HEADS: tl.constexpr,
                 HEAD_TILES: tl.constexpr, TOKENS: tl.constexpr,
                 DIM: tl.constexpr, DIM_PAD: tl.constexpr, REST: tl.constexpr,
                 REST_PAD: tl.constexpr, PAGE: tl.constexpr, VALUES: tl.constexpr,
                 SCALE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
                 LOGN: tl.constexpr, DECODE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
                 PART_ROWS: tl.constexpr, PROGRAMS: tl.constexpr,
                 SPLITS: tl.constexpr):  # fmt: skip
    """Sequences of at most TOKENS new tokens (DECODE: exactly one in every sequence), causal.

    Unit of work: one block of keys for one tile. All units of the batch lie in one line, sequence
    by sequence, tile by tile; PROGRAMS programs take equal runs of it, so a program holds the end
    of one tile, whole tiles, and the beginning of another. Whole tiles are written at once. Of a
    tile that several programs share, each stores its part: in slot 2p + 1 if program p came to it
    from an earlier tile, else in slot 2p. The tile's counter is that of its first program (a
    program is the first of at most one shared tile); who counts last merges the parts in order and
    clears the counter.

    SPLITS > 0 is the static split that this is compared with: every tile of the bucket has SPLITS
    programs of its own.
    """
    pdl.wait()
    pdl.release()  # every program of this grid is resident; the successor may load its weights
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TILES: tl.constexpr = KV_HEADS * HEAD_TILES
    program = tl.program_id(0)
    seqs = tl.load(live_ptr + 1)
    if SPLITS:
        mine = program // SPLITS // TILES
        there = mine < seqs
        length = tl.load(seq_len_ptr + mine, there, 0)
        count = tl.where(there, 1, 0)
        if not DECODE:
            start = tl.load(seq_start_ptr + mine, there, 0)
            count = tl.load(seq_start_ptr + mine + 1, there, 0) - start
        blocks = tl.cdiv(length, KEYS) - first_block(length, count, WINDOW, KEYS)
        blocks = tl.where((count > 0) & (count <= TOKENS), blocks, 0)
        run = tl.maximum(tl.cdiv(blocks, SPLITS), 1)
        base = program // SPLITS * SPLITS * run
        unit = program * run
        stop = tl.minimum(unit + run, base + blocks)
    else:
        every = tl.arange(0, SEQS_PAD)
        lengths = tl.load(seq_len_ptr + every, every < seqs, 0)
        counts = tl.where(every < seqs, 1, 0)
        if not DECODE:
            starts = tl.load(seq_start_ptr + every, every < seqs, 0)
            counts = tl.load(seq_start_ptr + every + 1, every < seqs, 0) - starts
        needed = tl.cdiv(lengths, KEYS) - first_block(lengths, counts, WINDOW, KEYS)
        needed = tl.where((counts > 0) & (counts <= TOKENS), needed, 0)
        ends = tl.cumsum(needed * TILES, 0)
        units = tl.max(ends, 0)
        run = tl.maximum(tl.cdiv(units, PROGRAMS), 1)
        unit = program * run
        stop = tl.minimum(unit + run, units)

    r = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM_PAD)
    while unit < stop:
        if SPLITS:
            seq = mine
            tile = program // SPLITS % TILES
        else:
            passed = ends <= unit
            seq = tl.sum(passed.to(tl.int32), 0)
            base = tl.max(tl.where(passed, ends, 0), 0)
        length = tl.load(seq_len_ptr + seq)
        if DECODE:
            start = seq
            count = length * 0 + 1
        else:
            start = tl.load(seq_start_ptr + seq)
            count = tl.load(seq_start_ptr + seq + 1) - start
        skipped = first_block(length, count, WINDOW, KEYS)
        blocks = tl.cdiv(length, KEYS) - skipped
        if not SPLITS:
            tile = (unit - base) // blocks
            base += tile * blocks
        first = unit - base
        last = tl.minimum(blocks, stop - base)

        token, head, valid = row_heads(r, tile, GROUP, TILE_HEADS, HEAD_TILES)
        valid = valid & (token < count)
        position = length - count + token
        q = load_queries(
            q_ptr, kv_ptr, start + token, head, valid, dims, 0, DIM,
            HEADS * (DIM + REST), DIM + REST,
        )  # fmt: skip
        q_rest = None
        if REST:
            q_rest = load_queries(
                q_ptr, kv_ptr, start + token, head, valid, tl.arange(0, REST_PAD), DIM, REST,
                HEADS * (DIM + REST), DIM + REST,
            )  # fmt: skip
        slope = None
        if alibi_ptr is not None:
            slope = tl.load(alibi_ptr + head, valid, 0.0).to(tl.float32)
        scale = row_unit(position, SCALE, LOGN)
        acc = tl.zeros((ROWS, DIM_PAD), tl.float32)
        top = tl.full((ROWS,), LOWEST, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        k_ptr = kv_ptr + tile // HEAD_TILES * (PAGE_TOKENS * (DIM + REST))
        v_ptr = kv_ptr + VALUES + tile // HEAD_TILES * (PAGE_TOKENS * DIM)
        table_ptr = pages_ptr + seq.to(tl.int64) * COLUMNS
        page = page_of(table_ptr, skipped + first, length, KEYS)
        for block in tl.range(skipped + first, skipped + last):
            acc, top, total, page = attend(
                acc, top, total, page, q, q_rest, block, k_ptr, v_ptr, table_ptr, length,
                position, scale, slope, DIM, DIM_PAD, REST, REST_PAD, PAGE, VALUES, KEYS,
                True, WINDOW, SOFTCAP, True,
            )  # fmt: skip

        token, head, valid = rows_again(
            r,
            tile,
            tl.load(seq_len_ptr + seq, volatile=True) - length,
            GROUP,
            TILE_HEADS,
            HEAD_TILES,
        )
        valid = valid & (token < count)
        if first == 0 and last == blocks:
            largest = write_out(
                out_ptr, sinks_ptr, acc, top, total, start + token, head, valid, dims, DIM,
                HEADS * DIM,
            )  # fmt: skip
            if amax_ptr is not None:
                tl.store(amax_ptr + (start + token) * HEADS + head, largest, valid)
        else:
            slot = 2 * program + (program * run < base).to(tl.int32)
            part_ptr = partial_ptr + slot.to(tl.int64) * (PART_ROWS * (DIM + 2))
            kept = r < PART_ROWS
            tl.store(
                part_ptr + r[:, None] * DIM + dims[None, :],
                acc,
                kept[:, None] & (dims < DIM)[None, :],
            )
            tl.store(part_ptr + PART_ROWS * DIM + r, top, kept)
            tl.store(part_ptr + PART_ROWS * (DIM + 1) + r, total, kept)
            one, end = base // run, (base + blocks - 1) // run  # programs of this tile
            tl.debug_barrier()  # the parts of all threads before the one atomic
            if tl.atomic_add(counters_ptr + one, 1, sem="acq_rel", scope="gpu") == end - one:
                merge(
                    partial_ptr, out_ptr, amax_ptr, sinks_ptr, one, end, base, run, start, count,
                    tile, GROUP, TILE_HEADS, HEAD_TILES, DIM, DIM_PAD, HEADS * DIM, PART_ROWS,
                )  # fmt: skip
                tl.store(counters_ptr + one, 0)
        unit = base + last


@triton.jit
def merge(partial_ptr, out_ptr, amax_ptr, sinks_ptr, one, end, base, run, start, count, tile,
          GROUP: tl.constexpr, TILE_HEADS: tl.constexpr, HEAD_TILES: tl.constexpr,
          DIM: tl.constexpr, DIM_PAD: tl.constexpr, OUT_ROW: tl.constexpr,
          PART_ROWS: tl.constexpr):  # fmt: skip
    """Merges the parts of programs one .. end. Several parts are read at a time, since one program
    does it all and would else wait for one part after the other; columns go in pieces that keep
    them in registers."""
    COLUMNS: tl.constexpr = min(DIM_PAD, max(16, 4096 // PART_ROWS))
    AT_ONCE: tl.constexpr = max(1, 8192 // (PART_ROWS * COLUMNS))
    r = tl.arange(0, PART_ROWS)
    token, head, valid = row_heads(r, tile, GROUP, TILE_HEADS, HEAD_TILES)
    valid = valid & (token < count)
    if amax_ptr is not None:
        largest = tl.zeros((PART_ROWS,), tl.float32)
    for piece in range(0, DIM, COLUMNS):
        columns = piece + tl.arange(0, COLUMNS)
        acc = tl.zeros((PART_ROWS, COLUMNS), tl.float32)
        top = tl.full((PART_ROWS,), LOWEST, tl.float32)
        total = tl.zeros((PART_ROWS,), tl.float32)
        for first in range(one, end + 1, AT_ONCE):
            program = first + tl.arange(0, AT_ONCE)
            there = program <= end
            slot = 2 * program + (program * run < base).to(tl.int32)
            at = slot.to(tl.int64) * (PART_ROWS * (DIM + 2))
            row_at = at[:, None] + (PART_ROWS * DIM + r)[None, :]
            tops = tl.load(partial_ptr + row_at, there[:, None], LOWEST, cache_modifier=".cg")
            totals = tl.load(
                partial_ptr + row_at + PART_ROWS, there[:, None], 0.0, cache_modifier=".cg"
            )
            part = tl.load(
                partial_ptr + at[:, None, None] + (r * DIM)[None, :, None] + columns[None, None, :],
                there[:, None, None] & (columns < DIM)[None, None, :],
                0.0,
                cache_modifier=".cg",
            )
            best = tl.maximum(top, tl.max(tops, 0))
            fade = tl.exp2(top - best)
            weight = tl.exp2(tops - best[None, :])
            total = total * fade + tl.sum(totals * weight, 0)
            acc = acc * fade[:, None] + tl.sum(part * weight[:, :, None], 0)
            top = best
        found = write_out(
            out_ptr, sinks_ptr, acc, top, total, start + token, head, valid, columns, DIM, OUT_ROW
        )
        if amax_ptr is not None:
            largest = tl.maximum(largest, found)
    if amax_ptr is not None:
        tl.store(amax_ptr + (start + token) * (OUT_ROW // DIM) + head, largest, valid)


@triton.jit
def tile_kernel(live_ptr, q_ptr, kv_ptr, seq_start_ptr, seq_len_ptr, pages_ptr, sinks_ptr,
                alibi_ptr, out_ptr, amax_ptr,
                SEQS_PAD: tl.constexpr, COLUMNS: tl.constexpr,
                HEADS: tl.constexpr, KV_HEADS: tl.constexpr, TILE_HEADS: tl.constexpr,
                HEAD_TILES: tl.constexpr, TOKENS: tl.constexpr, SHORTEST: tl.constexpr,
                DIM: tl.constexpr, DIM_PAD: tl.constexpr, REST: tl.constexpr,
                REST_PAD: tl.constexpr, PAGE: tl.constexpr, VALUES: tl.constexpr,
                SCALE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
                SOFTCAP: tl.constexpr, LOGN: tl.constexpr, ROWS: tl.constexpr,
                KEYS: tl.constexpr):  # fmt: skip
    """Sequences of at least SHORTEST new tokens: one program per tile of TOKENS tokens.

    The device hands out programs in order as others end, which is a work queue: tiles go from the
    last to the first, so that of a sequence the longest come first and the short ones fill the end.
    The KV heads of a tile are neighbours. Programs beyond the live tiles leave at once. Blocks that
    all rows see whole take no masks; those at the edges of window and diagonal do.
    """
    pdl.wait()
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TILES: tl.constexpr = KV_HEADS * HEAD_TILES
    tile = tl.program_id(0) % TILES
    every = tl.arange(0, SEQS_PAD)
    seqs = tl.load(live_ptr + 1)
    starts = tl.load(seq_start_ptr + every, every < seqs, 0)
    counts = tl.load(seq_start_ptr + every + 1, every < seqs, 0) - starts
    ends = tl.cumsum(tl.where(counts >= SHORTEST, tl.cdiv(counts, TOKENS), 0), 0)
    index = tl.max(ends, 0) - 1 - tl.program_id(0) // TILES
    if index >= 0:
        passed = ends <= index
        seq = tl.sum(passed.to(tl.int32), 0)
        begin = (index - tl.max(tl.where(passed, ends, 0), 0)) * TOKENS
        length = tl.load(seq_len_ptr + seq)
        start = tl.load(seq_start_ptr + seq)
        new = tl.load(seq_start_ptr + seq + 1) - start
        count = tl.minimum(new - begin, TOKENS)
        oldest = length - new + begin  # positions of the tile's first and last token
        newest = oldest + count - 1

        r = tl.arange(0, ROWS)
        dims = tl.arange(0, DIM_PAD)
        token, head, valid = row_heads(r, tile, GROUP, TILE_HEADS, HEAD_TILES)
        valid = valid & (token < count)
        position = oldest + token
        row = start + begin + token
        q = load_queries(
            q_ptr, kv_ptr, row, head, valid, dims, 0, DIM, HEADS * (DIM + REST), DIM + REST
        )
        q_rest = None
        if REST:
            q_rest = load_queries(
                q_ptr, kv_ptr, row, head, valid, tl.arange(0, REST_PAD), DIM, REST,
                HEADS * (DIM + REST), DIM + REST,
            )  # fmt: skip
        slope = None
        if alibi_ptr is not None:
            slope = tl.load(alibi_ptr + head, valid, 0.0).to(tl.float32)
        scale = row_unit(position, SCALE, LOGN)
        acc = tl.zeros((ROWS, DIM_PAD), tl.float32)
        top = tl.full((ROWS,), LOWEST, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        k_ptr = kv_ptr + tile // HEAD_TILES * (PAGE_TOKENS * (DIM + REST))
        v_ptr = kv_ptr + VALUES + tile // HEAD_TILES * (PAGE_TOKENS * DIM)
        table_ptr = pages_ptr + seq.to(tl.int64) * COLUMNS

        if CAUSAL:
            last = tl.cdiv(newest + 1, KEYS)
            whole_end = (oldest + 1) // KEYS
        else:
            last = tl.cdiv(length, KEYS)
            whole_end = length // KEYS
        first = first_block(oldest + 1, 1, WINDOW, KEYS)
        page = page_of(table_ptr, first, length, KEYS)
        whole = first
        if WINDOW:
            whole = tl.minimum(tl.cdiv(tl.maximum(newest - WINDOW + 1, 0), KEYS), last)
            for block in tl.range(first, whole):
                acc, top, total, page = attend(
                    acc, top, total, page, q, q_rest, block, k_ptr, v_ptr, table_ptr, length,
                    position, scale, slope, DIM, DIM_PAD, REST, REST_PAD, PAGE, VALUES, KEYS,
                    CAUSAL, WINDOW, SOFTCAP, True,
                )  # fmt: skip
            whole_end = tl.maximum(whole, whole_end)
        for block in tl.range(whole, whole_end):
            acc, top, total, page = attend(
                acc, top, total, page, q, q_rest, block, k_ptr, v_ptr, table_ptr, length,
                position, scale, slope, DIM, DIM_PAD, REST, REST_PAD, PAGE, VALUES, KEYS,
                CAUSAL, WINDOW, SOFTCAP, False,
            )  # fmt: skip
        for block in tl.range(whole_end, last):
            acc, top, total, page = attend(
                acc, top, total, page, q, q_rest, block, k_ptr, v_ptr, table_ptr, length,
                position, scale, slope, DIM, DIM_PAD, REST, REST_PAD, PAGE, VALUES, KEYS,
                CAUSAL, WINDOW, SOFTCAP, True,
            )  # fmt: skip
        token, head, valid = rows_again(
            r,
            tile,
            tl.load(seq_len_ptr + seq, volatile=True) - length,
            GROUP,
            TILE_HEADS,
            HEAD_TILES,
        )
        valid = valid & (token < count)
        row = start + begin + token
        largest = write_out(
            out_ptr, sinks_ptr, acc, top, total, row, head, valid, dims, DIM, HEADS * DIM
        )
        if amax_ptr is not None:
            tl.store(amax_ptr + row * HEADS + head, largest, valid)
    pdl.release()
