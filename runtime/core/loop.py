"""The engine loop: receive, schedule, submit step n, collect step n-1, emit. Everything above the
device and below processes.

Comes in: a session, options, requests and aborts. Goes out: events and control replies. `worker.py`
drives it over a socket, `runtime/engine.py` in a thread; both call `step` while `has_work` and
`idle` when there is none.
"""

from __future__ import annotations

import logging
import os
import random
import time
from collections import deque
from collections.abc import Callable

from runtime.core.admission import check, check_whole
from runtime.core.batch import build
from runtime.core.commit import commit_step
from runtime.core.constrain import advance, constrain, constrained_rows
from runtime.core.options import EngineOptions
from runtime.core.policy import resolve_policy
from runtime.core.scheduler import QUEUE_FULL, WAITED, Scheduler
from runtime.core.sequence import Step
from runtime.device.base import Session, Ticket
from runtime.errors import InvalidRequest
from runtime.grammar.client import Grammars
from runtime.request import Abort, Control, ControlReply, Event, Finish, Request, Stats, ToEngine

log = logging.getLogger("headstart.engine")

COMPILE_POLL_S = 0.002  # how long a message may wait while only grammars are under way


def ignore(phase: str) -> None:
    """Nobody times the phases of a step."""


class EngineLoop:
    """`mark` hears the end of each phase of a step: between (two steps: the caller's work, events
    handed out), schedule, build, submit, collect (waiting and copying out), commit.
    """

    def __init__(
        self,
        session: Session,
        options: EngineOptions,
        *,
        eos: tuple[int, ...],
        grammars: Grammars | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.session = session
        self.grammars = grammars
        self.replies: list[ControlReply] = []
        self.stopping = False
        self.scheduler = Scheduler(
            session.capacity,
            resolve_policy(options, session.capacity),
            eos=eos,
            secret=os.urandom(32),
            seeds=random.Random(options.seed),
        )
        self._eos = len(eos)
        self._clock = clock
        self.mark: Callable[[str], None] = ignore
        self._depth = 1 if options.overlap else 0
        self._in_flight: deque[tuple[Step, Ticket]] = deque()
        self._compiling: dict[int, tuple[Request, float]] = {}  # with its deadline
        self._drain: Control | None = None
        self._flushes: list[Control] = []
        self._checked = True
        self._last_step_s = 0.0

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work or bool(self._in_flight) or bool(self._compiling)

    @property
    def in_flight(self) -> int:
        """Steps that are submitted and not collected."""
        return len(self._in_flight)

    def receive(self, message: ToEngine) -> None:
        if isinstance(message, Request):
            self.add(message)
        elif isinstance(message, Abort):
            self.abort(message.id)
        else:
            self.control(message)

    def add(self, request: Request) -> None:
        """Refusals are events too: whatever is wrong with a request concerns that request."""
        try:
            check(request, self.session.capacity, self._eos)
            check_whole(request, self.session.capacity, self.scheduler.policy.max_step_tokens)
            if self._drain is not None:
                raise InvalidRequest("The server is shutting down.", status=503)
            if request.sampling.grammar is None:
                self.scheduler.add(request, self._clock())
            else:
                self._compile(request)
        except InvalidRequest as error:
            self._refuse(request, str(error), error.status)
        except Exception:
            log.exception("admission failed request=%d", request.id)
            self._refuse(request, "The engine could not admit this request.", 500)

    def abort(self, request: int) -> None:
        if self._compiling.pop(request, None) is not None:
            assert self.grammars is not None
            self.grammars.forget([request])  # others wait behind it
            self._end_early(request, "Aborted", None)
        self.scheduler.abort(request)

    def control(self, control: Control) -> None:
        """The answer appears in `replies`, for `drain` once everything has ended."""
        verb, ok, message = control.verb, True, ""
        if verb == "drain":
            self._drain = control
            self._finish_drain()
            return
        if verb == "flush_cache":
            self._flush(control)
            return
        if verb == "shutdown":
            self.stopping = True
        elif verb != "stats":
            ok, message = False, f"unknown control verb {verb[:32]!r}"
        self.replies.append(ControlReply(id=control.id, ok=ok, message=message, stats=self.stats()))

    def step(self) -> list[Event]:
        """One step: submit n, collect n - 1. Raises what the device or the books raise: then the
        engine must end.
        """
        scheduler, flying, mark = self.scheduler, self._in_flight, self.mark
        mark("between")
        self._checked = False
        if self._compiling:
            self._admit_compiled(0.0 if flying or scheduler.has_work else COMPILE_POLL_S)
        step, depth = scheduler.schedule(self._clock()), self._depth
        mark("schedule")
        if step is not None:
            given = build(step, scheduler.slots)
            if self.grammars is not None and constrain(self.grammars, step, given):
                depth = 0  # the next masks depend on this step's tokens
            mark("build")
            flying.append((step, self.session.submit(given)))
            mark("submit")
        events = scheduler.outbox
        while flying and (step is None or len(flying) > depth):
            news = self._collect(*flying.popleft())
            events = events + news if events else news
            if step is None:
                break
        if scheduler.outbox:
            scheduler.outbox = []
        if self.grammars is not None and scheduler.unconstrained:
            self.grammars.forget(scheduler.unconstrained)
            scheduler.unconstrained = []
        if self._drain is not None:
            self._finish_drain()
        if self._flushes:
            waiting, self._flushes = self._flushes, []
            for control in waiting:
                self._flush(control)
        return events

    def _collect(self, step: Step, ticket: Ticket) -> list[Event]:
        output = self.session.collect(ticket)
        self._last_step_s = output.seconds
        self.mark("collect")
        if self.grammars is not None and constrained_rows(step):
            advance(self.grammars, step, output, self.scheduler.slots.life)
        events = commit_step(self.scheduler, step, output)
        self.mark("commit")
        return events

    def idle(self) -> None:
        """Called when there has been no work for a while: the books are checked once per pause."""
        if not self._checked and not self.has_work:
            self.scheduler.check()
            self._checked = True

    def stats(self) -> Stats:
        s, pool, count = self.scheduler, self.scheduler.held.pool, self.scheduler.count
        return Stats(
            steps=count.steps,
            running=len(s.running),
            waiting=len(s.waiting),
            waiting_tokens=s.waiting.tokens,
            waiting_grammars=len(self._compiling),
            pages_total=pool.total,
            pages_used=pool.used,
            pages_cached=pool.cached,
            page_size=s.capacity.page_size,
            prompt_tokens=count.prompt_tokens,
            cached_tokens=count.cached_tokens,
            generation_tokens=count.generation_tokens,
            retractions=count.retractions,
            aborted=count.aborted,
            evicted_pages=pool.evicted,
            last_step_ms=self._last_step_s * 1e3,
        )

    def close(self) -> None:
        if self.grammars is not None:
            self.grammars.close()
        self.session.close()

    # --- grammars -------------------------------------------------------------------------------

    def _compile(self, request: Request) -> None:
        """The request waits for its grammar, then joins the line."""
        grammar, policy = request.sampling.grammar, self.scheduler.policy
        assert grammar is not None
        if self.grammars is None:
            raise InvalidRequest("This engine has no tokenizer: it takes no grammars.")
        if request.id in self._compiling or request.id in self.scheduler.live:
            raise InvalidRequest("The request id is in use.")
        if len(self._compiling) >= policy.waiting_requests:
            raise InvalidRequest(QUEUE_FULL, status=429)
        deadline = self._clock() + (policy.queue_wait_s or float("inf"))
        self.grammars.open(request.id, grammar)
        self._compiling[request.id] = request, deadline

    def _admit_compiled(self, wait: float) -> None:
        """Requests whose grammars are compiled, or will not be. `wait`: seconds, when there is
        nothing else to do."""
        assert self.grammars is not None
        forget = []
        now = self._clock()
        for id_, why, status in self.grammars.poll(wait):
            request, _ = self._compiling.pop(id_, (None, 0.0))
            if request is None:  # aborted meanwhile
                forget.append(id_)
            elif why is not None:
                self._end_early(id_, why, status)
            else:
                self.scheduler.add(request, now)
                if id_ not in self.scheduler.live:  # refused, or nothing to generate
                    forget.append(id_)
        for id_ in [i for i, (_, deadline) in self._compiling.items() if now >= deadline]:
            del self._compiling[id_]
            forget.append(id_)
            self._end_early(id_, WAITED, 504)
        if forget:
            self.grammars.forget(forget)

    def _end_early(self, request: int, message: str, status: int | None) -> None:
        self.scheduler.count.aborted += 1
        finish = Finish(reason="abort", message=message, status=status)
        self.scheduler.outbox.append(Event(id=request, finish=finish))

    def _flush(self, control: Control) -> None:
        """Refused while there are requests; what has ended may still be in a step, which is waited
        for."""
        busy = bool(self.scheduler.live or self._compiling)
        if self._in_flight and not busy:
            self._flushes.append(control)
            return
        ok = not busy and self.scheduler.flush()
        message = "" if ok else "Requests are running or waiting; the cache is in use."
        reply = ControlReply(id=control.id, ok=ok, message=message, stats=self.stats())
        self.replies.append(reply)

    def _finish_drain(self) -> None:
        if self._drain is not None and not self.has_work and self._drain.id >= 0:
            self.replies.append(ControlReply(id=self._drain.id, ok=True, stats=self.stats()))
            self._drain = Control(id=-1, verb="drain")  # answered; new work stays refused

    def _refuse(self, request: Request, message: str, status: int) -> None:
        finish = Finish(reason="abort", message=message, status=status)
        self.scheduler.outbox.append(Event(id=request.id, finish=finish))
