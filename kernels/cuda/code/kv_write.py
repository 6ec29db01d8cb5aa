"""Keys and values into pages, alone or with all that stands between the projection and the cache.

A page of a layer is keys [KV heads, PAGE tokens, DIM], then values likewise; latent attention's is
[PAGE, LATENT + ROTARY].
`kv_ptr` points at the layer in page 0, STRIDE is elements from page to page. Elements of a page are
written once and read by later launches only.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code import pdl
from kernels.cuda.code.narrow import clipped, narrowed
from kernels.cuda.code.rope import load_pairs, rotate, store_pairs


@triton.jit
def kv_write_kernel(
    live_ptr,
    k_ptr,
    v_ptr,
    shared_ptr,
    slots_ptr,
    kv_ptr,
    KV_HEADS: tl.constexpr,
    OWN: tl.constexpr,
    SHARED: tl.constexpr,
    V_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SHARED_BLOCK: tl.constexpr,
):
    """A unit is one KV head of one token. Its key is OWN dims, then SHARED ones that are the same
    in every head. v_ptr None: the values of all heads stand behind their keys."""
    DIM: tl.constexpr = OWN + SHARED
    BEHIND: tl.constexpr = v_ptr is None
    K_ROW: tl.constexpr = KV_HEADS * (OWN + V_DIM if BEHIND else OWN)
    V_ROW: tl.constexpr = K_ROW if BEHIND else KV_HEADS * V_DIM
    values_ptr = v_ptr
    if BEHIND:
        values_ptr = k_ptr + KV_HEADS * OWN
    pdl.wait()
    units = tl.load(live_ptr) * KV_HEADS
    if tl.program_id(0) * ROWS < units:
        unit = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        column = tl.arange(0, BLOCK)[None, :]
        exists = unit < units
        head = unit % KV_HEADS
        token = (unit // KV_HEADS).to(tl.int64)
        slot = tl.load(slots_ptr + token, exists, 0)
        page = (slot // PAGE).to(tl.int64) * STRIDE
        row = head * PAGE + slot % PAGE
        mask = exists & (column < OWN)
        k = tl.load(k_ptr + token * K_ROW + head * OWN + column, mask, 0.0).to(tl.float32)
        tl.store(kv_ptr + page + row * DIM + column, narrowed(k, kv_ptr), mask)
        if SHARED:
            last = tl.arange(0, SHARED_BLOCK)[None, :]
            mask = exists & (last < SHARED)
            k = tl.load(shared_ptr + token * SHARED + last, mask, 0.0).to(tl.float32)
            tl.store(kv_ptr + page + row * DIM + OWN + last, narrowed(k, kv_ptr), mask)
        mask = exists & (column < V_DIM)
        at = token * V_ROW + head * V_DIM + column
        v = tl.load(values_ptr + at, mask, 0.0).to(tl.float32)
        to = KV_HEADS * PAGE * DIM + row * V_DIM + column
        tl.store(kv_ptr + page + to, narrowed(v, kv_ptr), mask)
    pdl.release()


@triton.jit
def head_weights(
    q_norm_ptr,
    k_norm_ptr,
    h,
    column,
    inside,
    OWN: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
):
    """Norm weights at `column` [1, columns], where it is `inside`, of heads h [units, 1]; 1 where a
    head has no norm."""
    w = tl.full((h.shape[0], column.shape[1]), 1.0, tl.float32)
    if q_norm_ptr is not None:
        is_q = h < HEADS
        if OWN:
            own = tl.load(q_norm_ptr + h * DIM + column, inside & is_q, 1.0)
        else:
            own = tl.load(q_norm_ptr + column, inside, 1.0)
        w = tl.where(is_q, own.to(tl.float32), w)
    if k_norm_ptr is not None:
        is_k = (h >= HEADS) & (h < HEADS + KV_HEADS)
        if OWN:
            own = tl.load(k_norm_ptr + (h - HEADS) * DIM + column, inside & is_k, 1.0)
        else:
            own = tl.load(k_norm_ptr + column, inside, 1.0)
        w = tl.where(is_k, own.to(tl.float32), w)
    return w


@triton.jit
def load_head(
    ptr,
    at,
    exists,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CACHE: tl.constexpr,
):
    """Heads that start at `at` [units, 1]: the pairs of their first ROTARY dims and the rest, as
    `write_heads` takes them."""
    a, b, x = at, at, at
    if ROTARY > 0:
        pair = tl.arange(0, PAIRS)[None, :]
        mask = exists & (pair < ROTARY // 2)
        a, b = load_pairs(ptr, at, pair, mask, ROTARY // 2, INTERLEAVED, CACHE)
    if ROTARY < DIM:
        column = ROTARY + tl.arange(0, REST)[None, :]
        mask = exists & (column < DIM)
        x = tl.load(ptr + at + column, mask, 0.0, cache_modifier=CACHE).to(tl.float32)
    return a, b, x


@triton.jit
def write_heads(
    a,
    b,
    x,
    t,
    h,
    exists,
    table_ptr,
    q_norm_ptr,
    k_norm_ptr,
    slots_ptr,
    kv_ptr,
    q_ptr,
    EPS: tl.constexpr,
    CENTRE: tl.constexpr,
    OWN: tl.constexpr,
    CLIP: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    PAIRED: tl.constexpr,
    PAGE: tl.constexpr,
    STRIDE: tl.constexpr,
):
    """Norm, clip, rotation and the write of projected heads, each to its place: a unit is one head
    of one token, `h` [units, 1] counts query heads, key heads, value heads of token `t` [units, 1].

    The first PAIRED dims of the heads come as pairs a and b [units, >= PAIRED / 2], the others as x
    [units, >= DIM - PAIRED]; what there is none of may be anything. Pairs beyond ROTARY are not
    turned. All units take the same instructions, what does not apply to one is masked.
    """
    HALF: tl.constexpr = PAIRED // 2
    NORM: tl.constexpr = (q_norm_ptr is not None) or (k_norm_ptr is not None)
    is_q = h < HEADS
    normed = is_q if q_norm_ptr is not None else is_q & False
    if k_norm_ptr is not None:
        normed = normed | ((h >= HEADS) & (h < HEADS + KV_HEADS))
    slot = tl.load(slots_ptr + t, exists & (h >= HEADS), 0)
    if PAIRED > 0:
        pair = tl.arange(0, a.shape[1])[None, :]
        in_pairs = exists & (pair < HALF)
    if PAIRED < DIM:
        column = PAIRED + tl.arange(0, x.shape[1])[None, :]
        in_rest = exists & (column < DIM)
    if NORM:
        mean = tl.zeros(t.shape, tl.float32)
        square = tl.zeros(t.shape, tl.float32)
        if CENTRE:
            if PAIRED > 0:
                mean += tl.sum(tl.where(in_pairs, a + b, 0.0), axis=1, keep_dims=True)
            if PAIRED < DIM:
                mean += tl.sum(tl.where(in_rest, x, 0.0), axis=1, keep_dims=True)
            mean = tl.where(normed, mean / DIM, 0.0)
        if PAIRED > 0:
            both = (a - mean) * (a - mean) + (b - mean) * (b - mean)
            square += tl.sum(tl.where(in_pairs, both, 0.0), axis=1, keep_dims=True)
        if PAIRED < DIM:
            one = (x - mean) * (x - mean)
            square += tl.sum(tl.where(in_rest, one, 0.0), axis=1, keep_dims=True)
        scale = tl.where(normed, tl.rsqrt(square / DIM + EPS), 1.0)
        if PAIRED > 0:
            first = 2 * pair if INTERLEAVED else pair
            second = 2 * pair + 1 if INTERLEAVED else pair + HALF
            inside = pair < HALF
            wa = head_weights(q_norm_ptr, k_norm_ptr, h, first, inside, OWN, HEADS, KV_HEADS, DIM)
            a = (a - mean) * scale * wa
            wb = head_weights(q_norm_ptr, k_norm_ptr, h, second, inside, OWN, HEADS, KV_HEADS, DIM)
            b = (b - mean) * scale * wb
        if PAIRED < DIM:
            inside = column < DIM
            w = head_weights(q_norm_ptr, k_norm_ptr, h, column, inside, OWN, HEADS, KV_HEADS, DIM)
            x = (x - mean) * scale * w
    to_q = (t * HEADS + h).to(tl.int64) * DIM
    to_kv = (slot // PAGE).to(tl.int64) * STRIDE + ((h - HEADS) * PAGE + slot % PAGE) * DIM
    if PAIRED > 0:
        if CLIP > 0.0:
            a, b = clipped(a, CLIP), clipped(b, CLIP)
        turned = in_pairs & (h < HEADS + KV_HEADS)
        if ROTARY < PAIRED:
            turned = turned & (pair < ROTARY // 2)
        a, b = rotate(table_ptr, t, pair, turned, a, b, ROTARY // 2)
        store_pairs(q_ptr, to_q, pair, in_pairs & is_q, a, b, HALF, INTERLEAVED)
        store_pairs(kv_ptr, to_kv, pair, in_pairs & (h >= HEADS), a, b, HALF, INTERLEAVED)
    if PAIRED < DIM:
        if CLIP > 0.0:
            x = clipped(x, CLIP)
        tl.store(q_ptr + to_q + column, x.to(q_ptr.dtype.element_ty), in_rest & is_q)
        tl.store(kv_ptr + to_kv + column, narrowed(x, kv_ptr), in_rest & (h >= HEADS))


@triton.jit
def rope_kv_kernel(
    live_ptr,
    qkv_ptr,
    table_ptr,
    q_norm_ptr,
    k_norm_ptr,
    slots_ptr,
    kv_ptr,
    q_ptr,
    EPS: tl.constexpr,
    CENTRE: tl.constexpr,
    OWN: tl.constexpr,
    CLIP: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROTARY: tl.constexpr,
    PAGE: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    REST: tl.constexpr,
):
    """Heads of every kind are in flight together and no program waits for another."""
    ALL: tl.constexpr = HEADS + 2 * KV_HEADS
    unit = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    pdl.wait()
    units = tl.load(live_ptr) * ALL
    if tl.program_id(0) * ROWS < units:
        exists = unit < units
        a, b, x = load_head(
            qkv_ptr, unit.to(tl.int64) * DIM, exists, DIM, ROTARY, PAIRS, REST, INTERLEAVED, ""
        )
        write_heads(
            a,
            b,
            x,
            unit // ALL,
            unit % ALL,
            exists,
            table_ptr,
            q_norm_ptr,
            k_norm_ptr,
            slots_ptr,
            kv_ptr,
            q_ptr,
            EPS,
            CENTRE,
            OWN,
            CLIP,
            INTERLEAVED,
            HEADS,
            KV_HEADS,
            DIM,
            ROTARY,
            ROTARY,
            PAGE,
            STRIDE,
        )
    pdl.release()


@triton.jit
def mla_kv_write_kernel(
    live_ptr,
    x_ptr,
    norm_ptr,
    table_ptr,
    slots_ptr,
    kv_ptr,
    EPS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LATENT: tl.constexpr,
    ROTARY: tl.constexpr,
    PAGE: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """A row of x is the latent, to be normalised, then the key, to be rotated."""
    WIDTH: tl.constexpr = LATENT + ROTARY
    HALF: tl.constexpr = ROTARY // 2
    column = tl.arange(0, BLOCK)[None, :]
    w = tl.load(norm_ptr + column, column < LATENT, 0.0).to(tl.float32)
    pdl.wait()
    tokens = tl.load(live_ptr)
    if tl.program_id(0) * ROWS < tokens:
        t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
        exists = t < tokens
        at = t.to(tl.int64) * WIDTH
        slot = tl.load(slots_ptr + t, exists, 0)
        to = (slot // PAGE).to(tl.int64) * STRIDE + slot % PAGE * WIDTH
        mask = exists & (column < LATENT)
        x = tl.load(x_ptr + at + column, mask, 0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / LATENT + EPS)
        tl.store(kv_ptr + to + column, narrowed(x * scale * w, kv_ptr), mask)
        pair = tl.arange(0, PAIRS)[None, :]
        mask = exists & (pair < HALF)
        a, b = load_pairs(x_ptr, at + LATENT, pair, mask, HALF, INTERLEAVED, "")
        a, b = rotate(table_ptr, t, pair, mask, a, b, HALF)
        store_pairs(kv_ptr, to + LATENT, pair, mask, a, b, HALF, INTERLEAVED)
    pdl.release()
