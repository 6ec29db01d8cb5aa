"""Sampling, second: histograms of rows with a threshold (sample_scan.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.cuda.code import pdl
from kernels.cuda.code.sampling import (
    GREEDY_BELOW,
    LEAD,
    REALS,
    REFERENCE,
    SCALE,
    bin_of,
    row_of,
    row_values,
)


@triton.jit
def count_kernel(
    live_ptr,
    logits_ptr,
    row_slot_ptr,
    row_target_ptr,
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
    counts_ptr,
    bias_ptr,
    bins_ptr,
    reals_ptr,
    VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,
    STATE: tl.constexpr,
    MASK: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    BINS: tl.constexpr,
):
    """A fixed grid goes through the chunks of all rows and takes those of rows with a threshold."""
    HALF: tl.constexpr = BINS // 2
    pdl.wait()
    work = tl.load(live_ptr + 2) * SPLITS
    for start in range(0, work, tl.num_programs(0)):
        part = start + tl.program_id(0)
        r = tl.minimum(part, work - 1) // SPLITS
        k = tl.load(top_k_ptr + r)
        temperature = tl.load(temperature_ptr + r)
        filtered = (k > 0) & (k < VOCAB)
        filtered = filtered | (tl.load(top_p_ptr + r) < 1.0) | (tl.load(min_p_ptr + r) > 0.0)
        drawn = (tl.load(row_target_ptr + r) < 0) & (temperature >= GREEDY_BELOW)
        if (part < work) & drawn & filtered:
            row = row_of(
                r,
                True,
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
            column = part % SPLITS * CHUNK + tl.arange(0, CHUNK)
            inside = column < VOCAB
            lead = tl.arange(0, LEAD)
            exists = lead < VOCAB
            y = tl.load(row[0] + lead, exists, float("-inf"))
            reference = tl.max(y, axis=0)
            mean = tl.sum(tl.where(exists, y, 0.0), axis=0) / tl.minimum(LEAD, VOCAB)
            # 32 bins to a factor of e, more where the logits are so even that many share a bin
            scale = tl.maximum(32.0 / temperature, 200.0 / tl.maximum(reference - mean, 1e-6))
            _x, z = row_values(row, column, inside)
            bin = tl.where(z > float("-inf"), bin_of(z, reference, scale, BINS), 0)
            b = tl.arange(0, HALF)
            # A histogram takes two registers for every 32 bins: half of them at a time. The bound
            # is no constant, or the loop would be unrolled into one piece again.
            for first in range(0, tl.where(work > 0, BINS, 0), HALF):
                here = (bin >= first) & (bin < first + HALF) & (bin > 0)
                others = CHUNK - tl.sum(here.to(tl.int32), axis=0)
                bins = tl.histogram(tl.where(here, bin - first, 0), HALF)
                bins -= tl.where(b == 0, others, 0)
                at = bins_ptr + part.to(tl.int64) * BINS + first
                tl.store(at + b, bins.to(tl.int16))
            tl.store(reals_ptr + r * REALS + REFERENCE, reference)  # every chunk, the same
            tl.store(reals_ptr + r * REALS + SCALE, scale)
    pdl.release()
