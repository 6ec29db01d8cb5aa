"""Every promise of `StepInput`, checked.

Comes in: a step and the capacity it must respect. Goes out: nothing, or ValueError naming the
broken promise. The null device checks every step with it, so the tests of everything above a device
rest on it.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from runtime.device.base import I32, TOP, Capacity, StepInput

Index = npt.NDArray[np.int64]


def need(ok: bool | np.bool_, what: str) -> None:
    if not ok:
        raise ValueError(f"step breaks its contract: {what}")


def check_step(step: StepInput, capacity: Capacity) -> None:
    _check_sizes(step, capacity)
    _check_sequences(step, capacity)
    _check_rows(step, capacity)


def owners(step: StepInput) -> Index:
    """The sequence of each token."""
    lengths = np.diff(step.seq_start)
    return np.repeat(np.arange(len(lengths)), lengths)


def pages_at(step: StepInput, owner: Index, columns: npt.NDArray[np.generic]) -> Index:
    """Page table entries, one per pair of sequence and column."""
    if isinstance(step.pages, np.ndarray):
        need(int(columns.max()) < step.pages.shape[1], "a page table is too short")
        return step.pages[owner, columns].astype(np.int64)
    return np.array([step.pages[s][k] for s, k in zip(owner, columns, strict=True)], np.int64)


def check_sharing(step: StepInput, page_size: int) -> None:
    """A page that is written belongs to one sequence of the step."""
    users: dict[int, set[int]] = {}
    for s, length in enumerate(step.seq_len.tolist()):
        for page in step.pages[s][: -(-length // page_size)].tolist():
            users.setdefault(page, set()).add(s)
    written = (step.kv_slots // page_size).tolist()
    for page, s in zip(written, owners(step).tolist(), strict=True):
        need(users[page] == {s}, f"page {page} is written while others read it")


def _check_sizes(step: StepInput, c: Capacity) -> None:
    n, s, r, e = len(step.tokens), len(step.seq_len), len(step.row_token), len(step.edits)
    need(0 < n <= c.max_tokens, f"{n} tokens in a step of at most {c.max_tokens}")
    need(0 < s <= c.max_seqs, f"{s} sequences in a step of at most {c.max_seqs}")
    need(r <= c.max_seqs, f"{r} logit rows in a step of at most {c.max_seqs}")
    need(not (c.embedding and r), f"{r} logit rows of an embedding model")
    need(e <= c.edits, f"{e} edits in a step of at most {c.edits}")
    need(len(step.pages) == s and len(step.seq_start) == s + 1, "arrays of unequal length")
    starts = step.seq_start
    need(starts[0] == 0 and starts[-1] == n, "sequences that do not tile the tokens")
    need((np.diff(starts) > 0).all(), "a sequence without a token")


def _check_sequences(step: StepInput, c: Capacity) -> None:
    starts, positions = step.seq_start, step.positions
    need(((step.tokens >= -c.slots) & (step.tokens < c.vocab)).all(), "a token out of range")
    need(((step.seq_len > 0) & (step.seq_len <= c.context)).all(), "a length out of range")
    need((positions[starts[1:] - 1] + 1 == step.seq_len).all(), "a length that is no last position")
    need(not c.whole or (positions[starts[:-1]] == 0).all(), "a sequence that is not whole")
    owner = owners(step)
    first = starts[:-1][owner]
    steps = np.arange(len(positions)) - first
    need((positions == positions[first] + steps).all(), "positions with a gap")
    pages = pages_at(step, owner, positions // c.page_size)
    need(((pages >= 0) & (pages < c.pages)).all(), "a page out of range")
    slots = pages * c.page_size + positions % c.page_size
    need((slots == step.kv_slots).all(), "kv slots off the page table")
    need(len(np.unique(slots)) == len(slots), "two tokens in one kv slot")
    _check_rope(step, c, first)


def _check_rope(step: StepInput, c: Capacity, first: I32) -> None:
    """`first`: of each token, its sequence's first."""
    rows, rule = step.rope_variant, c.rope_rule
    if rows is None or rule is None:
        need(rows is None and rule is None, "rows of rope frequencies come where a rule is")
        return
    need(len(rows) == len(step.tokens), "arrays of unequal length")
    if rule.of == "token":
        longer = [rule.row(n) for n in (step.positions + 1).tolist()]
        need((rows == np.maximum(rows[first], longer)).all(), "a token with another's rope")
        return
    need(((rows >= 0) & (rows <= len(rule.bounds))).all(), "a row of rope out of range")
    need((rows == rows[first]).all(), "a sequence of several ropes")
    if rule.of == "sequence":
        # More only while a prompt is incomplete.
        least = [rule.row(n) for n in step.seq_len.tolist()]
        need((rows[step.seq_start[:-1]] >= least).all(), "a rope too short for its sequence")


def _check_rows(step: StepInput, c: Capacity) -> None:
    n = len(step.tokens)
    need(((step.row_token >= 0) & (step.row_token < n)).all(), "a row of no token")
    need(((step.row_slot >= 0) & (step.row_slot < c.slots)).all(), "a slot out of range")
    need((step.row_target < c.vocab).all(), "a target out of range")
    need(((step.row_top >= 0) & (step.row_top <= TOP)).all(), "too many top logprobs")
    _check_masks(step, c)
    sampled = step.row_slot[step.row_target < 0]
    need(len(np.unique(sampled)) == len(sampled), "two samples for one slot")
    edits = step.edits[:, :2]
    need(((edits >= 0) & (edits < (c.slots, c.vocab))).all(), "an edit out of range")


def _check_masks(step: StepInput, c: Capacity) -> None:
    if step.row_mask is None or step.masks is None:
        need(step.row_mask is None and step.masks is None, "masks and their rows come together")
        return
    m, words = step.masks.shape
    need(words == -(-c.vocab // 32), f"masks of {words} words for {c.vocab} tokens")
    need(len(step.row_mask) == len(step.row_token), "arrays of unequal length")
    used = step.row_mask[step.row_mask >= 0]
    need((used < m).all() and len(np.unique(used)) == m <= c.max_seqs, "masks without their rows")
