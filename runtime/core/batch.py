"""A `Step` as the arrays a session takes.

Comes in: what the scheduler decided, and the slots it decided on (lengths already moved on). Goes
out: a `StepInput`, valid until the next call: while the same sequences decode, it is kept on `Rows`
and handed out again. Called by the engine loop; sessions copy what they are given.
"""

from __future__ import annotations

from itertools import accumulate

import numpy as np

from runtime.core.sequence import LOGPROB, Chunk, Index, Rows, Slots, Step
from runtime.device.base import I32, StepInput

NO_EDITS = np.zeros((0, 4), np.int32)
SPARE = 16  # columns of page tables kept for pages to come
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "frequency", "presence", "repetition", "seed")


def build(step: Step, slots: Slots) -> StepInput:
    edits = np.concatenate(step.edits) if step.edits else NO_EDITS
    rows = step.rows
    if rows.table is None:
        _lay_out(rows, slots)
    elif rows.grown:
        _add_pages(rows, slots, rows.table)
    if step.chunks:
        return _mixed(step, slots, edits)
    if rows.given is None:
        rows.given = _decoding(rows, slots)
    given = rows.given
    given.pages = rows.pages
    given.rope_variant = slots.rope_variants(rows.slots, rows.positions)
    given.edits = edits
    given.row_mask = given.masks = None
    return given


def _lay_out(rows: Rows, slots: Slots) -> None:
    """Page tables, with columns for pages to come, and kv slots."""
    used = _columns(slots, rows.slots)
    rows.table = slots.table[rows.slots, : used + SPARE]
    rows.pages = rows.table[:, :used]
    columns, offsets = divmod(rows.positions, slots.page_size)
    rows.kv_slots[:] = rows.table[rows.starts[:-1], columns] * slots.page_size + offsets


def _add_pages(rows: Rows, slots: Slots, table: I32) -> None:
    used = rows.pages.shape[1]
    for row, page in rows.grown:
        column = int(rows.positions[row]) // slots.page_size
        if column == table.shape[1]:
            _lay_out(rows, slots)
            return
        table[row, column] = page
        rows.kv_slots[row] = page * slots.page_size  # its first
        used = max(used, column + 1)
    rows.pages = table[:, :used]


def _decoding(rows: Rows, slots: Slots) -> StepInput:
    """Without what `build` adds to each step."""
    params = _params(slots, rows.slots)
    return StepInput(
        tokens=rows.tokens,
        positions=rows.positions,
        kv_slots=rows.kv_slots,
        seq_start=rows.starts,
        seq_len=rows.seq_len,
        pages=[],
        row_token=rows.starts[:-1],
        edits=NO_EDITS,
        kept=params,
        **params,
    )


def _columns(slots: Slots, index: Index) -> int:
    """Pages of the sequence that has most of them."""
    return int(slots.room[index].max(initial=0)) // slots.page_size


def _mixed(step: Step, slots: Slots, edits: I32) -> StepInput:
    rows, chunks = step.rows, step.chunks
    seqs = np.concatenate([rows.slots, np.array([c.slot for c in chunks], np.intp)])
    positions = [np.arange(c.start, c.end, dtype=np.int32) for c in chunks]
    sizes = [c.end - c.start for c in chunks]
    starts = list(accumulate(sizes, initial=len(rows)))
    return StepInput(
        tokens=np.concatenate(
            [rows.tokens, *(slots.history[c.slot, c.start : c.end] for c in chunks)]
        ),
        positions=np.concatenate([rows.positions, *positions]),
        kv_slots=np.concatenate(
            [
                rows.kv_slots,
                *(_kv_slots(slots, c.slot, p) for c, p in zip(chunks, positions, strict=True)),
            ]
        ),
        seq_start=np.concatenate([rows.starts[:-1], np.array(starts, np.int32)]),
        seq_len=np.concatenate([rows.seq_len, np.array([c.end for c in chunks], np.int32)]),
        pages=slots.table[seqs, : _columns(slots, seqs)],
        rope_variant=_rope_variants(slots, rows, chunks, positions),
        edits=edits,
        **_mixed_rows(rows, chunks, starts, slots),
    )


def _rope_variants(
    slots: Slots, rows: Rows, chunks: list[Chunk], positions: list[I32]
) -> I32 | None:
    parts = [slots.rope_variants(rows.slots, rows.positions)]
    for chunk, at in zip(chunks, positions, strict=True):
        parts.append(slots.rope_variants(np.array([chunk.slot]), at))
    return None if parts[0] is None else np.concatenate([p for p in parts if p is not None])


def _kv_slots(slots: Slots, slot: int, positions: I32) -> I32:
    size = slots.page_size
    return slots.table[slot, positions // size] * size + positions % size


def _mixed_rows(
    rows: Rows, chunks: list[Chunk], starts: list[int], slots: Slots
) -> dict[str, np.ndarray]:
    """Decode rows as they are; then for each chunk its scoring rows and its sampling row (an
    embedding model has neither)."""
    token, slot, target = [rows.starts[:-1]], [rows.slots], [np.full(len(rows), -1, np.int32)]
    scoring: list[tuple[int, Chunk]] = []  # first row of a chunk's scoring rows
    row = len(rows)
    for chunk, start in zip(chunks, starts, strict=False):
        if chunk.score:
            at = start - chunk.start + chunk.score_at - 1
            token.append(np.arange(at, at + chunk.score, dtype=np.int32))
            history = slots.history[chunk.slot]
            target.append(history[chunk.score_at : chunk.score_at + chunk.score])
            scoring.append((row, chunk))
        if chunk.samples:
            token.append(np.array([start + chunk.end - chunk.start - 1], np.int32))
            target.append(np.array([-1], np.int32))
        count = chunk.score + chunk.samples
        slot.append(np.full(count, chunk.slot, np.intp))
        row += count
    params = _params(slots, np.concatenate(slot))
    for first, chunk in scoring:
        end = first + chunk.score
        params["row_flags"][first:end] = LOGPROB
        params["row_top"][first:end] = chunk.seq.request.top_logprobs
    params["row_token"] = np.concatenate(token)
    params["row_target"] = np.concatenate(target)
    return params


def _params(slots: Slots, index: Index) -> dict[str, np.ndarray]:
    params = {name: getattr(slots, name)[index] for name in SAMPLING}
    params["row_slot"] = index.astype(np.int32)
    params["row_target"] = np.full(len(index), -1, np.int32)
    params["row_flags"] = slots.flags[index]
    params["row_top"] = slots.top[index]
    return params
