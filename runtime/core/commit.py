"""Results of a step back to the sequences, and what the clients hear of it.

Comes in: a step as scheduled and the device's output, one or more steps later. Goes out: events.
Rows whose sequence has left its slot meanwhile (finished one step ago, preempted, aborted) are
dropped: what was computed for them is speculation that did not come true. Called by the engine
loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.core.sequence import Chunk, Sequence, Step
from runtime.device.base import F32, StepOutput
from runtime.request import Event, Finish, TopLogprobs

if TYPE_CHECKING:
    from runtime.core.scheduler import Scheduler

UNUSABLE = {  # StepOutput.status: message and HTTP status
    1: ("The model produced numbers that are not finite for this request.", 500),
    2: ("The grammar, logit_bias and min_new_tokens together leave no token.", 400),
}

HEARD = 64  # steps whose tokens are kept until they are written to the history together


def commit_step(scheduler: Scheduler, step: Step, output: StepOutput) -> list[Event]:
    if output.embedding is not None:
        return _commit_vectors(scheduler, step, output, output.embedding)
    events = _commit_rows(scheduler, step, output) if len(step.rows) else []
    row = len(step.rows)
    for chunk in step.chunks:
        if scheduler.slots.life[chunk.slot] == chunk.life:
            event = _commit_chunk(scheduler, chunk, output, row)
            if event is not None:
                events.append(event)
        row += chunk.score + chunk.samples
    return events


def _commit_rows(scheduler: Scheduler, step: Step, output: StepOutput) -> list[Event]:
    """The common case is one plain token for each of many sequences: a list of tokens, and one
    small object per event.
    """
    rows, slots = step.rows, scheduler.slots
    n = len(rows)
    tokens, status, ids = output.token[:n].tolist(), output.status[:n].tolist(), rows.ids
    wanted: Iterable[int] = range(n)
    full: set[int] = set()
    if scheduler.rows is rows:  # nobody has left, and nobody can have got all it may
        rows.heard.append(tokens)
        if len(rows.heard) == HEARD:
            slots.settle(rows)
    else:
        here = np.flatnonzero(slots.life.take(rows.slots) == rows.life)
        index = rows.slots[here]
        slots.hear(index, output.token[None, here])
        full = set(here[slots.known.take(index) >= slots.limit.take(index)].tolist())
        wanted = here.tolist()
    events = {i: Event(id=ids[i], tokens=[tokens[i]]) for i in wanted}
    scheduler.count.generation_tokens += len(events)
    for i in rows.special:
        if i in events:
            events[i] = Event(id=ids[i], **_news(rows.seqs[i], output, i))
    if full or rows.special or any(status) or not scheduler.eos.isdisjoint(tokens):
        for i in wanted:
            seq = rows.seqs[i]
            if i in full or status[i] or tokens[i] in seq.stops or seq.verdict is not None:
                events[i] = _finished(scheduler, seq, events[i], tokens[i], status[i])
    return list(events.values())


def _commit_vectors(
    scheduler: Scheduler, step: Step, output: StepOutput, vectors: F32
) -> list[Event]:
    """An embedding model: one vector per sequence, which is right once its prompt is complete."""
    events = []
    for row, chunk in enumerate(step.chunks):
        bad = int(output.status[row])
        if scheduler.slots.life[chunk.slot] == chunk.life and (chunk.final or bad):
            vector = vectors[row].astype("<f4").tobytes()
            event = Event(id=chunk.seq.request.id, embedding=vector, queue_s=chunk.seq.tell_queue())
            events.append(_finished(scheduler, chunk.seq, event, -1, bad))
    return events


def _commit_chunk(scheduler: Scheduler, chunk: Chunk, output: StepOutput, row: int) -> Event | None:
    seq, slots = chunk.seq, scheduler.slots
    last = row + chunk.score
    if output.status[row : last + chunk.samples].any():
        bad = output.status[row : last + chunk.samples]
        return _finished(scheduler, seq, Event(id=seq.request.id), -1, int(bad[bad > 0].min()))
    if chunk.score:
        seq.prompt_logprobs += output.logprob[row:last].tolist()
        seq.prompt_top += [_top(seq, output, i) for i in range(row, last)]
    if not chunk.final:
        return None
    request = seq.request
    news: dict[str, Any] = {}
    token = -1
    if chunk.samples:
        token = int(output.token[last])
        known = int(slots.known[chunk.slot])
        slots.history[chunk.slot, known] = token
        slots.known[chunk.slot] = known + 1
        scheduler.count.generation_tokens += 1
        news = _news(seq, output, last)
    if not seq.started:  # a second time, after a preemption, these are old news
        seq.started = True
        news["cached_tokens"] = seq.cached
        news["queue_s"] = seq.tell_queue()
        if seq.scores:
            news["prompt_logprobs"] = seq.prompt_logprobs
            if request.top_logprobs:
                news["prompt_top_logprobs"] = seq.prompt_top
    event = Event(id=request.id, **news)
    ended = token in seq.stops or seq.verdict is not None
    if ended or slots.known[chunk.slot] >= slots.limit[chunk.slot]:
        return _finished(scheduler, seq, event, token, 0)
    return event


def _news(seq: Sequence, output: StepOutput, row: int) -> dict[str, Any]:
    news: dict[str, Any] = {"tokens": [int(output.token[row])]}
    if seq.request.logprobs:
        news["logprobs"] = [float(output.logprob[row])]
        if seq.request.top_logprobs:
            news["top_logprobs"] = [_top(seq, output, row)]
    return news


def _top(seq: Sequence, output: StepOutput, row: int) -> TopLogprobs:
    k = seq.request.top_logprobs
    logprobs, ids = output.top_logprobs[row, :k].tolist(), output.top_ids[row, :k].tolist()
    return list(zip(logprobs, ids, strict=True))


def _finished(scheduler: Scheduler, seq: Sequence, event: Event, token: int, status: int) -> Event:
    """The sequence's last event: `event` with the finish, or the finish alone when the numbers
    cannot be trusted. A sequence at the end of its rope's range goes on after being computed again.
    """
    stopped = token in seq.stops
    verdict = seq.verdict
    ended = status or stopped or verdict is not None
    if not ended and scheduler.slots.known[seq.slot] < seq.limit:
        scheduler.restart(seq)
        return event
    if status:
        message, code = UNUSABLE[status]
        scheduler.end(seq, keep=False)
        event = Event(id=event.id, queue_s=seq.tell_queue())
        finish = Finish(reason="abort", message=message, status=code)
    else:
        scheduler.end(seq)
        finish = Finish(reason="stop", matched=token) if stopped else Finish(reason="length")
        finish = finish if stopped or verdict is None else verdict
    scheduler.count.aborted += finish.reason == "abort"
    return Event(
        id=event.id,
        tokens=event.tokens,
        logprobs=event.logprobs,
        top_logprobs=event.top_logprobs,
        prompt_logprobs=event.prompt_logprobs,
        prompt_top_logprobs=event.prompt_top_logprobs,
        embedding=event.embedding,
        cached_tokens=seq.cached,
        retractions=seq.retractions,
        queue_s=event.queue_s,
        finish=finish,
    )
