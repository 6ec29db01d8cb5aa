"""What runs next: pure policy over plain data, with no clock and no device of its own (`now` is
passed in).

Comes in: requests, aborts and, through commit.py, results. Goes out: a `Step`, and `outbox` events
of requests that ended without one. A step holds one row per decoding sequence and prompt chunks in
what is left of the token budget. Called by the engine loop: `add`/`abort`, `schedule(now)`; then
commit.py with the step's output.

    waiting ──admit──► prefill ──last chunk──► decode ──all submitted──► drain ──results──► done
       ▲                  │                      │
       └─────preempt──────┴──────────────────────┘      abort and finish: from anywhere to done
"""

from __future__ import annotations

import random

import numpy as np

from runtime.core.chunks import add_chunks, lift_bans
from runtime.core.holdings import Holdings
from runtime.core.pages import PageLeak
from runtime.core.policy import Counters, Policy
from runtime.core.queue import PATIENCE, WaitingLine
from runtime.core.sequence import DECODE, DONE, DRAIN, PREFILL, WAITING, Rows, Sequence, Step
from runtime.device.base import Capacity
from runtime.request import Event, Finish, Request

GROWTH_TOKENS = 512  # outputs are expected to grow by at most so much before others end
EXPIRY_EVERY_S = 0.05
RETRY_STEPS = 16  # between fruitless rounds of admission when nobody left

QUEUE_FULL = "The request queue is full."
WAITED = "Request waiting timeout reached."
RAN = "Request running timeout reached."


class Scheduler:
    """`secret` keys the prefix cache; `seeds` chooses seeds for requests without one."""

    def __init__(
        self,
        capacity: Capacity,
        policy: Policy,
        *,
        eos: tuple[int, ...],
        secret: bytes,
        seeds: random.Random,
    ) -> None:
        self.capacity = capacity
        self.policy = policy
        self.eos = frozenset(eos)
        self.held = Holdings(capacity, secret=secret, prefix_cache=policy.prefix_cache)
        self.slots = self.held.slots
        self.running = self.held.running
        self.prefilling: dict[Sequence, None] = {}
        self.waiting = WaitingLine(policy.order)
        self.live: dict[int, Sequence] = {}  # by request id
        self.outbox: list[Event] = []
        self.unconstrained: list[int] = []  # sequences with a grammar that ended: nobody needs it
        self.count = Counters()
        self.banned: dict[Sequence, None] = {}  # their stop tokens are banned on the device now
        self._ban_edits = 0  # of all that run: bounded, so that all bans can be lifted in one step
        self.rows: Rows | None = None  # None: the decoding sequences changed
        self._seeds = seeds
        self._arrivals = 0
        self._orders = 0
        self._growth = 0.25  # share of the possible growth that admission keeps free
        self._admission_open = True  # something changed since the last fruitless round
        self._next_expiry = 0.0

    # --- requests come and go -------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        return bool(self.live or self.outbox)

    def add(self, request: Request, now: float) -> None:
        """A request that passed `admission.check`."""
        policy, sampling = self.policy, request.sampling
        if request.id in self.live:
            self._refuse(request, "The request id is in use.", 400)
            return
        free = max(policy.max_running - len(self.running), 0)  # admitted with the next step
        if self.waiting.full(policy, len(request.tokens), free):
            self._refuse(request, QUEUE_FULL, 429)
            return
        stops = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stops |= self.eos
        seq = Sequence(
            request,
            arrival=self._arrivals,
            arrived=now,
            seed=self._seeds.getrandbits(63) if sampling.seed is None else sampling.seed,
            stops=stops,
            wait_deadline=now + (policy.queue_wait_s or float("inf")),
            deadline=now + (policy.request_s or float("inf")),
        )
        self._arrivals += 1
        self.count.prompt_tokens += seq.prompt_size
        if sampling.max_new_tokens == 0 and not seq.scores and not self.capacity.embedding:
            self.outbox.append(Event(id=request.id, finish=Finish(reason="length")))
            return
        self.live[request.id] = seq
        self._queue(seq)

    def abort(self, request: int, message: str = "Aborted", status: int | None = None) -> None:
        """Ends a request wherever it is; unknown ids are ignored."""
        seq = self.live.get(request)
        if seq is not None:
            self.count.aborted += 1
            finish = Finish(reason="abort", message=message, status=status)
            self.end(seq)
            self.outbox.append(
                Event(
                    id=request,
                    cached_tokens=seq.cached,
                    retractions=seq.retractions,
                    queue_s=seq.tell_queue(),
                    finish=finish,
                )
            )

    def end(self, seq: Sequence, *, keep: bool = True) -> None:
        """The one way out of the books, from any state. `keep`: its pages may serve others."""
        if seq.state == WAITING:
            self.waiting.remove(seq)
        else:
            self._leave(seq, keep=keep)
        seq.state = DONE
        del self.live[seq.request.id]
        if seq.constrained:
            self.unconstrained.append(seq.request.id)

    def flush(self) -> bool:
        """Forgets cached prefixes; refused while sequences run on them."""
        if self.running:
            return False
        self.held.pool.flush()
        return True

    def check(self) -> None:
        """The books agree; raises PageLeak."""
        self.held.check()
        if len(self.live) != len(self.running) + len(self.waiting):
            raise PageLeak(
                f"{len(self.live)} requests, {len(self.running)} running, {len(self.waiting)} "
                "waiting"
            )
        if not self.running and (self.prefilling or self.banned or self._ban_edits):
            raise PageLeak("nothing runs, but prompts or bans are on the books")

    # --- a step ---------------------------------------------------------------------------------

    def schedule(self, now: float) -> Step | None:
        if now >= self._next_expiry:
            self._expire(now)
        retractions = self.count.retractions
        rows = self._grow()
        if len(self.waiting) and self.count.retractions == retractions:
            self._admit(now)
        step = Step(rows=rows)
        if self.banned:
            lift_bans(self, step)
        if self.prefilling:
            add_chunks(self, step)
        if not len(rows) and not step.chunks:
            return None
        self._advance(step)
        return step

    def _grow(self) -> Rows:
        """The decode rows, each with room for one more token; the youngest sequences give way where
        pages run out.
        """
        while True:
            rows = self.rows
            if rows is None:
                decoding = [s for s in self.running if s.state == DECODE]
                rows = self.rows = Rows(decoding, self.slots)
            rows.grown, full = [], rows.full
            if not full:
                return rows
            pages = self.held.grow([rows.seqs[i] for i in full])
            if pages is not None:
                rows.grown = list(zip(full, pages, strict=True))
                return rows
            if len(self.running) == 1:
                raise PageLeak("one sequence alone does not fit the pool that admitted it")
            movable = [s for s in self.running if s.state != DRAIN]  # the others end by themselves
            self._preempt(max(movable, key=lambda s: (-s.request.priority, s.order)))

    def _advance(self, step: Step) -> None:
        """The step will run: lengths move on, finished prompts become decoders, complete pages
        become findable.
        """
        rows, slots = step.rows, self.slots
        self.count.steps += 1
        self._growth = max(self._growth * 0.998, 0.05)
        if len(rows):
            rows.advance()
            if rows.left <= 0:
                self._regroup()
                for seq in rows.seqs:
                    if slots.length[seq.slot] >= slots.limit[seq.slot] - 1:
                        seq.state = DRAIN
        for chunk in step.chunks:
            seq, slot = chunk.seq, chunk.slot
            slots.length[slot] = chunk.end
            seq.score_next = max(seq.score_next, chunk.score_at + chunk.score)
            if self.held.publish(seq, chunk.start, chunk.end):
                self._admission_open = True
            if chunk.final:
                del self.prefilling[seq]
                more = chunk.samples and chunk.end < slots.limit[slot] - 1
                seq.state = DECODE if more else DRAIN
                self._regroup()

    def _regroup(self) -> None:
        """Other sequences decode from the next step on."""
        if self.rows is not None:
            self.slots.settle(self.rows)
            self.rows = None

    # --- admission and preemption ---------------------------------------------------------------

    def _admit(self, now: float) -> None:
        free = self.policy.max_running - len(self.running)
        if free <= 0 or not (self._admission_open or self.count.steps % RETRY_STEPS == 0):
            return
        self._admission_open = False
        preferred = self.waiting.candidates(self.held.matched)
        entered = 0
        for seq in preferred:
            if not self._enter(seq, now):
                if seq.passed >= PATIENCE:
                    return  # what comes free is kept for it
                continue
            for other in preferred:
                if other.state == WAITING and other.arrival < seq.arrival:
                    other.passed += 1
            entered += 1
            if entered == free:
                return
        self._admission_open = entered == len(preferred)  # there may be more behind them

    def _enter(self, seq: Sequence, now: float) -> bool:
        if self.held.comes_soon(seq):
            return False
        if self._ban_edits and self._ban_edits + len(seq.ban) > self.capacity.edits:
            return False
        if not self.held.enter(seq, self._reserve(seq) if self.running else 0):
            return False
        self.waiting.remove(seq)
        if seq.order < 0:
            seq.cached = int(self.slots.length[seq.slot])
            self.count.cached_tokens += seq.cached
            seq.queue_s = now - seq.arrived
        seq.prefill = len(seq.tokens)
        seq.tokens = seq.tokens[:0]
        self._orders += 1
        seq.order = self._orders
        seq.state = PREFILL
        self.prefilling[seq] = None
        self._ban_edits += len(seq.ban)
        return True

    def _reserve(self, seq: Sequence) -> int:
        """Pages kept free so that what runs, and this one, can grow for a while."""
        index = np.fromiter((s.slot for s in self.running), np.intp, len(self.running))
        left = self.slots.limit[index] - self.slots.room[index]
        growth = int(left.clip(0, GROWTH_TOKENS).sum())
        growth += min(seq.limit - len(seq.tokens), GROWTH_TOKENS)
        return int(growth * self._growth) // self.capacity.page_size + 1

    def _preempt(self, seq: Sequence) -> None:
        seq.retractions += 1
        self.count.retractions += 1
        self._growth = min(self._growth + 0.2, 1.0)
        self.restart(seq)

    def restart(self, seq: Sequence) -> None:
        """Back to the line, to be computed again: commit drops what was in flight for it."""
        self._regroup()
        tokens = self.slots.seen(seq.slot)
        self._leave(seq, keep=True)
        seq.state = WAITING
        seq.tokens = tokens
        if seq.scores:
            start = seq.request.prompt_logprobs_from
            seq.score_next = max(start + len(seq.prompt_logprobs), 1)
        self._queue(seq)

    def _leave(self, seq: Sequence, *, keep: bool) -> None:
        self._regroup()
        self.held.leave(seq, keep=keep)
        self.prefilling.pop(seq, None)
        self.banned.pop(seq, None)
        self._ban_edits -= len(seq.ban)
        self._admission_open = True

    def _queue(self, seq: Sequence) -> None:
        self.held.name_prefixes(seq)
        self.waiting.put(seq)
        self._admission_open = True

    def _refuse(self, request: Request, message: str, status: int) -> None:
        self.count.aborted += 1
        finish = Finish(reason="abort", message=message, status=status)
        self.outbox.append(Event(id=request.id, finish=finish))

    def _expire(self, now: float) -> None:
        self._next_expiry = now + EXPIRY_EVERY_S
        for seq in [*self.waiting, *self.running]:
            if now >= seq.deadline:
                self.abort(seq.request.id, RAN, 504)
            elif seq.order < 0 and now >= seq.wait_deadline:
                self.abort(seq.request.id, WAITED, 504)
