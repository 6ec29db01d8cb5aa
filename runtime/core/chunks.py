"""Prompt chunks of a step: how much of which prompt is computed next, and which of its logits are
wanted.

Comes in: the scheduler and a step that holds the decode rows. Goes out: chunks and state edits
added to the step, within what is left of its budgets of tokens, logit rows and edits. Called by
`Scheduler.schedule`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.core.edits import first_edits, lift_ban
from runtime.core.sequence import DECODE, Chunk, Sequence, Slots, Step

if TYPE_CHECKING:
    from runtime.core.scheduler import Scheduler


def add_chunks(scheduler: Scheduler, step: Step) -> None:
    slots, capacity = scheduler.slots, scheduler.capacity
    budget = scheduler.policy.max_step_tokens - len(step.rows)
    edits = capacity.edits - sum(len(e) for e in step.edits)
    # One logit row is kept for each prompt: its last token's, or one to score by.
    rows = capacity.max_seqs - len(step.rows) - len(scheduler.prefilling)
    for seq in scheduler.prefilling:
        if budget <= 0:
            return
        if capacity.whole and seq.prefill > budget:
            continue  # a later step has room: admission refused what no step holds
        chunk = next_chunk(seq, slots, budget, rows)
        if chunk.samples and seq.edits:
            ban = must_ban(seq)
            first = first_edits(seq, seq.slot, slots.seen(seq.slot), ban)
            if len(first) > edits:
                # The last token waits for a step with room for what must be known before sampling.
                shorten(chunk)
            else:
                edits -= len(first)
                step.edits.append(first)
                if ban:
                    scheduler.banned[seq] = None
        if chunk.end > chunk.start:
            rows -= max(chunk.score - (not chunk.final), 0)
            budget -= chunk.end - chunk.start
            step.chunks.append(chunk)


def next_chunk(seq: Sequence, slots: Slots, budget: int, rows: int) -> Chunk:
    """As much of the prompt as `budget` tokens and, where it is scored, `rows` logit rows beyond
    its own allow.
    """
    slot = seq.slot
    start = int(slots.length[slot])
    chunk = Chunk(
        seq=seq,
        slot=slot,
        life=int(slots.life[slot]),
        start=start,
        end=min(seq.prefill, start + budget),
    )
    if seq.scores and seq.score_next < seq.prompt_size:
        # The row of token p scores prompt position p + 1.
        chunk.score_at = seq.score_next
        first, last = seq.score_next - 1, seq.prompt_size - 1
        own = 0 if chunk.end == seq.prefill else 1
        if min(chunk.end, last) - first > rows + own:
            chunk.end = min(first + rows + 1, seq.prefill - 1)
        chunk.score = max(min(chunk.end, last) - first, 0)
    chunk.final = chunk.end == seq.prefill
    chunk.samples = chunk.final and seq.request.sampling.max_new_tokens > 0
    return chunk


def shorten(chunk: Chunk) -> None:
    chunk.end -= 1
    chunk.final = chunk.samples = False
    if chunk.score:
        chunk.score = min(chunk.score, chunk.end - (chunk.score_at - 1))


def must_ban(seq: Sequence) -> bool:
    """min_new_tokens forbids a stop token as the first output after this prompt (which may hold
    earlier outputs).
    """
    return bool(seq.ban) and seq.prefill - seq.prompt_size < seq.request.sampling.min_new_tokens


def lift_bans(scheduler: Scheduler, step: Step) -> None:
    """Of decoding sequences whose next row samples output number min_new_tokens or a later one."""
    if scheduler.rows is not None:
        scheduler.slots.settle(scheduler.rows)
    for seq in list(scheduler.banned):
        number = int(scheduler.slots.length[seq.slot]) + 1 - seq.prompt_size  # counted from 0
        if seq.state == DECODE and number >= seq.request.sampling.min_new_tokens:
            step.edits.append(lift_ban(seq, seq.slot))
            del scheduler.banned[seq]
