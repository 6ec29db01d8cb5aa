"""Mixtures of experts: routing, the order of pairs, one matrix product per expert, the weighted
sum. No float atomics anywhere: a token's result does not depend on who finishes first."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code import pdl
from kernels.cuda.code.linear_ends import store
from kernels.cuda.code.product import product


@triton.jit
def route_kernel(
    live_ptr,
    logits_ptr,
    bias_ptr,
    ids_ptr,
    weights_ptr,
    LIVE: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    CHOICES: tl.constexpr,
    SCORE: tl.constexpr,
    KEPT: tl.constexpr,
    GROUP_BEST: tl.constexpr,
    RENORMALISE: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One token per program; its experts as [groups, experts of a group]. The largest value is
    taken CHOICES times, the lower index first among equals."""
    pdl.wait()
    token = tl.program_id(0)
    if token < tl.load(live_ptr + LIVE):
        LOWEST: tl.constexpr = float("-inf")
        group = tl.arange(0, BLOCK_G)
        place = tl.arange(0, BLOCK_S)
        expert = group[:, None] * SIZE + place[None, :]
        real = (group < GROUPS)[:, None] & (place < SIZE)[None, :]
        at = logits_ptr + token.to(tl.int64) * (GROUPS * SIZE) + expert
        score = tl.load(at, real, LOWEST).to(tl.float32)
        if SCORE == "softmax":
            score = tl.exp(score - tl.max(tl.max(score, 1), 0))
            score = score / tl.sum(tl.sum(score, 1), 0)
        elif SCORE == "sigmoid":
            score = tl.sigmoid(score)
        choice = score
        if bias_ptr is not None:
            choice += tl.load(bias_ptr + expert, real, 0.0).to(tl.float32)
        choice = tl.where(real, choice, LOWEST)
        if GROUPS > 1:
            worth = tl.zeros((BLOCK_G,), tl.float32)
            rest = choice
            for _ in tl.static_range(GROUP_BEST):
                top = tl.max(rest, 1)
                worth += top
                first = tl.min(tl.where(rest == top[:, None], place[None, :], BLOCK_S), 1)
                rest = tl.where(place[None, :] == first[:, None], LOWEST, rest)
            kept = group < 0
            for _ in tl.static_range(KEPT):
                most = tl.max(worth, 0)
                # those kept stand at -inf too, behind every other index
                first = tl.min(tl.where((worth == most) & (kept == 0), group, BLOCK_G), 0)
                kept = kept | (group == first)
                worth = tl.where(group == first, LOWEST, worth)
            choice = tl.where(kept[:, None], choice, LOWEST)
        j = tl.arange(0, BLOCK_K)
        ids = tl.zeros((BLOCK_K,), tl.int32)
        weights = tl.zeros((BLOCK_K,), tl.float32)
        left = real
        for i in tl.static_range(CHOICES):
            top = tl.max(tl.max(tl.where(left, choice, LOWEST), 1), 0)
            same = tl.where(left & (choice == top), expert, GROUPS * SIZE - 1)
            chosen = tl.min(tl.min(same, 1), 0)
            weight = tl.sum(tl.sum(tl.where(real & (expert == chosen), score, 0.0), 1), 0)
            ids = tl.where(j == i, chosen, ids)
            weights = tl.where(j == i, weight, weights)
            left = left & (expert != chosen)
        if SCORE == "chosen":
            weights = tl.where(j < CHOICES, weights, LOWEST)
            weights = tl.exp(weights - tl.max(weights, 0))
            weights = weights / tl.sum(weights, 0)
        if RENORMALISE:
            weights = weights / (tl.sum(weights, 0) + 1e-20)
        to = token * CHOICES + j
        tl.store(ids_ptr + to, ids, j < CHOICES)
        tl.store(weights_ptr + to, weights * SCALE, j < CHOICES)
    pdl.release()


@triton.jit
def order_kernel(
    live_ptr,
    ids_ptr,
    order_ptr,
    starts_ptr,
    LIVE: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One expert per program: how many pairs go to lower experts, then its own in their order."""
    pdl.wait()
    expert = tl.program_id(0)
    pairs = tl.load(live_ptr + LIVE) * CHOICES
    lane = tl.arange(0, BLOCK)
    lower = tl.zeros((BLOCK,), tl.int32)
    for first in tl.range(0, pairs, BLOCK):
        ids = tl.load(ids_ptr + first + lane, first + lane < pairs, EXPERTS)
        lower += (ids < expert).to(tl.int32)
    start = tl.sum(lower, 0)
    tl.store(starts_ptr + expert, start)
    if expert == EXPERTS - 1:
        tl.store(starts_ptr + EXPERTS, pairs)
    for first in tl.range(0, pairs, BLOCK):
        ids = tl.load(ids_ptr + first + lane, first + lane < pairs, EXPERTS)
        mine = (ids == expert).to(tl.int32)
        tl.store(order_ptr + start + tl.cumsum(mine, 0) - mine, first + lane, mine != 0)
        start += tl.sum(mine, 0)
    pdl.release()


@triton.jit
def experts_kernel(
    live_ptr,
    x_ptr,
    order_ptr,
    starts_ptr,
    w,
    scale_ptr,
    bias_ptr,
    out_ptr,
    EXPERTS: tl.constexpr,
    SHARE: tl.constexpr,
    OUTPUTS: tl.constexpr,
    K: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    W_TMA: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SUPER: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One tile of one expert's pairs per program: tiles never hold two experts, and experts
    without a pair have none. SHARE pairs read the same row of x (k choices of a token, or 1)."""
    TYPE: tl.constexpr = tl.bfloat16 if HALF else tl.float32
    TILES_N: tl.constexpr = (OUTPUTS + BLOCK_N - 1) // BLOCK_N
    ROWS: tl.constexpr = OUTPUTS * 2 if GATED else OUTPUTS  # of one expert's weight
    pdl.wait()
    if tl.load(live_ptr) > 0:
        experts = tl.arange(0, BLOCK_E)
        starts = tl.load(starts_ptr + experts, experts < EXPERTS, 0)
        ends = tl.load(starts_ptr + experts + 1, experts < EXPERTS, 0)
        tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
        upto = tl.cumsum(tiles, 0)
        tiles_m = tl.sum(tiles, 0)
        program = tl.program_id(0)
        if program < tiles_m * TILES_N:
            # SUPER row tiles beside each other: those of one expert share its weights in the cache
            first = program // (SUPER * TILES_N) * SUPER
            beside = tl.minimum(tiles_m - first, SUPER)
            inside = program % (SUPER * TILES_N)
            tile = first + inside % beside
            n0 = inside // beside * BLOCK_N
            expert = tl.sum((upto <= tile).to(tl.int32), 0)
            it = experts == expert
            before = tl.sum(tl.where(it, upto - tiles, 0), 0)
            end = tl.sum(tl.where(it, ends, 0), 0)
            at = tl.sum(tl.where(it, starts, 0), 0) + (tile - before) * BLOCK_M
            at = at + tl.arange(0, BLOCK_M)
            here = at < end
            pair = tl.load(order_ptr + at, here, 0)
            n = n0 + tl.arange(0, BLOCK_N)
            STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
            row = expert * ROWS
            acc, acc_up, square = product(
                x_ptr,
                (pair // SHARE).to(tl.int64) * K,
                0,
                here,
                w,
                scale_ptr,
                None,
                row + n0,
                row + OUTPUTS + n0,
                n < OUTPUTS,
                0,
                STEPS * BLOCK_K,
                K,
                BITS,
                GROUP,
                GATED,
                False,
                W_TMA,
                TYPE,
                BLOCK_N,
                BLOCK_M,
                BLOCK_K,
                STAGES,
            )
            row_scale_ptr = None
            if BITS == 0 and scale_ptr is not None:
                row_scale_ptr = scale_ptr + row
            if bias_ptr is not None:
                bias_ptr += row
            store(
                acc,
                acc_up,
                square,
                pair,
                here,
                n,
                row_scale_ptr,
                bias_ptr,
                None,
                None,
                out_ptr,
                OUTPUTS,
                False,
                K,
                0.0,
                ACT,
                GATED,
                1.0,
                0.0,
            )
    pdl.release()


@triton.jit
def combine_kernel(
    live_ptr,
    y_ptr,
    weights_ptr,
    shared_ptr,
    gate_ptr,
    residual_ptr,
    out_ptr,
    LIVE: tl.constexpr,
    CHOICES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of a token per program; choices are added in their order."""
    pdl.wait()
    BLOCKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    t = tl.program_id(0) // BLOCKS
    if t < tl.load(live_ptr + LIVE):
        column = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
        mask = column < WIDTH
        total = tl.zeros((BLOCK,), tl.float32)
        row = t.to(tl.int64)
        for j in tl.static_range(CHOICES):
            y = tl.load(y_ptr + (row * CHOICES + j) * WIDTH + column, mask, 0.0).to(tl.float32)
            total += tl.load(weights_ptr + t * CHOICES + j) * y
        if shared_ptr is not None:
            shared = tl.load(shared_ptr + row * WIDTH + column, mask, 0.0).to(tl.float32)
            if gate_ptr is not None:
                shared = shared * tl.sigmoid(tl.load(gate_ptr + t).to(tl.float32))
            total += shared
        if residual_ptr is not None:
            total += tl.load(residual_ptr + row * WIDTH + column, mask, 0.0).to(tl.float32)
        tl.store(out_ptr + row * WIDTH + column, total.to(out_ptr.dtype.element_ty), mask)
    pdl.release()
