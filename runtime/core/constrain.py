"""Grammars in a step: the masks of its constrained rows, and what their tokens made of them.

Comes in: a step before it is submitted, its output afterwards. A constrained sequence's next mask
depends on its last token, so the loop collects a step with such rows before it schedules the next.
Called by the engine loop.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from runtime.core.sequence import Sequence, Step
from runtime.device.base import StepInput, StepOutput
from runtime.grammar.client import Grammars
from runtime.grammar.messages import COMPLETE, GOES_ON
from runtime.request import Finish

Row = tuple[int, Sequence, int, int]  # logit row, its sequence, the slot and its life


def constrained_rows(step: Step) -> list[Row]:
    return [*_decoding(step), *_starting(step)]


def _decoding(step: Step) -> Iterator[Row]:
    for i in step.rows.constrained:
        seq = step.rows.seqs[i]
        yield i, seq, int(step.rows.slots[i]), int(step.rows.life[i])


def _starting(step: Step) -> Iterator[Row]:
    row = len(step.rows)
    for chunk in step.chunks:
        row += chunk.score + chunk.samples
        if chunk.samples and chunk.seq.constrained:
            yield row - 1, chunk.seq, chunk.slot, chunk.life


def constrain(grammars: Grammars, step: Step, given: StepInput) -> bool:
    """Adds the masks; True if there are any. Those of decoding rows came with their last tokens."""
    starting = list(_starting(step))
    if not starting and not step.rows.constrained:
        return False
    states = grammars.advance([(seq.request.id, -1, slot) for _, seq, slot, _ in starting])
    for (_, seq, _, _), (state, why) in zip(starting, states, strict=True):
        _judge(seq, state, why)
    rows = [row for row in constrained_rows(step) if row[1].verdict is None]
    given.row_mask = np.full(len(given.row_token), -1, np.int32)
    given.row_mask[[row for row, *_ in rows]] = np.arange(len(rows), dtype=np.int32)
    given.masks = grammars.masks[[slot for _, _, slot, _ in rows]]
    return True


def advance(grammars: Grammars, step: Step, output: StepOutput, lives: np.ndarray) -> None:
    """Tells the grammars the tokens of this step; sequences that end by them get their verdict."""
    rows = []
    for row, seq, slot, life in constrained_rows(step):
        token = int(output.token[row])
        wanted = lives[slot] == life and seq.verdict is None and not output.status[row]
        if wanted and token not in seq.stops:
            rows.append((seq, (seq.request.id, token, slot)))
    for (seq, _), (state, why) in zip(rows, grammars.advance([r for _, r in rows]), strict=True):
        _judge(seq, state, why)


def _judge(seq: Sequence, state: int, why: str) -> None:
    if state == COMPLETE:
        seq.verdict = Finish(reason="stop")
    elif state != GOES_ON:
        message = f"The grammar cannot be followed: {why}"
        seq.verdict = Finish(reason="abort", message=message, status=500)
