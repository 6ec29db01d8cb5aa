"""The HTTP process's end of the engine: sends requests, hands events to their owners, keeps it
alive.

`EngineLink` owns the child process and the socket. Death is seen as end of file on the socket, a
stall by the heartbeat; either way every request in flight hears of it once and a new engine is
started. Routes call `submit` and `abort`; serve.py starts and stops it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, cast

from runtime.errors import EngineDead
from runtime.ipc import EngineProtocol
from runtime.request import (
    Abort,
    Control,
    ControlReply,
    Event,
    Events,
    Failed,
    FromEngine,
    Ready,
    Request,
    Stats,
)
from runtime.spawn import EngineProcess

log = logging.getLogger("headstart.engine")

STALL_STEPS = 20  # times the p99 step
BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
SETTLED_S = 60.0  # ready for so long: the next failure starts the backoff anew
CAN_START = 3  # of BACKOFF_S, the most that an engine which does get ready is made to wait
START_S = 60.0  # to become ready again, or this many times what the first one took
START_TIMES = 10
LOST = "The engine ended while this request was running; try again."


class Owner(Protocol):
    """Whoever waits for the events of one request."""

    def on_event(self, event: Event) -> None: ...

    def on_failure(self, message: str, status: int) -> None: ...


class EngineLink:
    def __init__(
        self, spawn: Callable[[], EngineProcess], first: EngineProcess, *, step_s: float
    ) -> None:
        self._spawn = spawn
        self._step_s = step_s  # no progress for so long is a stall, whatever the steps took
        self.process = first
        self._protocol: EngineProtocol | None = None
        self._owners: dict[int, Owner] = {}
        self._controls: dict[int, asyncio.Future[ControlReply]] = {}
        self._control_ids = itertools.count(1)
        self._step_ms: deque[float] = deque(maxlen=1000)
        self._progress = time.monotonic()
        self._ready_at = 0.0
        self._failures = 0
        self._closing = False
        self._restarting: asyncio.Task[None] | None = None
        self.capacity: Ready | None = None  # of the last engine that was ready
        self.up = False
        self.failed: Failed | None = None
        self.stats: Stats | None = None
        self.throughput = 0.0  # tokens generated per second between the last two heartbeats
        self._beat_at = 0.0
        self.restarts = 0
        self.changed = asyncio.Event()  # set whenever `up` or `failed` changes
        self.dirty: list[Callable[[], None]] = []  # streams to flush once a frame is handed out

    async def start(self) -> None:
        await self._connect(self.process)
        self._watchdog = asyncio.create_task(self._watch())

    @property
    def in_flight(self) -> int:
        return len(self._owners)

    def submit(self, request: Request, owner: Owner) -> None:
        if not self.up or self._protocol is None:
            raise EngineDead("The engine is starting; try again.")
        if not self._owners:
            self._progress = time.monotonic()
        self._protocol.send(request)
        self._owners[request.id] = owner

    def abort(self, request: int) -> None:
        """The owner hears nothing more."""
        if self._owners.pop(request, None) is not None:
            self._send_abort(request)

    def abort_softly(self, request: int) -> None:
        """The owner hears the engine's own end of it."""
        if request in self._owners:
            self._send_abort(request)

    def _send_abort(self, request: int) -> None:
        if self._protocol is not None:
            with suppress(EngineDead):  # then there is nothing left to abort
                self._protocol.send(Abort(id=request))

    def flush(self) -> None:
        """Write what the streams gathered since the last call."""
        for flush in self.dirty:
            flush()
        self.dirty.clear()

    async def control(self, verb: str, timeout: float = 10.0) -> ControlReply:
        if not self.up or self._protocol is None:
            raise EngineDead("The engine is starting; try again.")
        number = next(self._control_ids)
        reply = self._controls[number] = asyncio.get_running_loop().create_future()
        self._protocol.send(Control(id=number, verb=verb))
        try:
            async with asyncio.timeout(timeout):
                return await reply
        except TimeoutError:
            raise EngineDead("The engine did not answer in time; try again.") from None
        finally:
            self._controls.pop(number, None)

    async def close(self) -> None:
        self._closing = True
        self._watchdog.cancel()
        if self._restarting is not None:
            self._restarting.cancel()
        if self._protocol is not None:
            self._protocol.close()  # end of file tells the engine to go
        if not await asyncio.to_thread(self.process.wait, 2.0):
            self.process.kill()

    # --- from the engine ------------------------------------------------------------------------

    async def _connect(self, process: EngineProcess) -> None:
        protocol = EngineProtocol(self._receive, self._lost)
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: cast(asyncio.Protocol, protocol), sock=process.socket)
        self._protocol = protocol
        self._progress = time.monotonic()

    def _receive(self, message: FromEngine) -> None:
        if isinstance(message, Events):
            self._progress = time.monotonic()
            owners = self._owners
            for event in message.events:
                owner = owners.get(event.id)
                if owner is not None:
                    if event.finish is not None:
                        del owners[event.id]
                    self._tell(owner, event)
            self.flush()
        elif isinstance(message, Stats):
            self._heartbeat(message)
        elif isinstance(message, Ready):
            self._set_ready(message)
        elif isinstance(message, ControlReply):
            waiting = self._controls.get(message.id)
            if waiting is not None and not waiting.done():
                waiting.set_result(message)
        else:
            self.failed = message
            log.error("engine failed message=%s exit_code=%d", message.message, message.exit_code)
            self.changed.set()

    def _tell(self, owner: Owner, event: Event) -> None:
        """A fault in the text layer is its request's, not the connection's."""
        try:
            owner.on_event(event)
        except Exception:
            log.exception("bug while handling an event")
            self.abort(event.id)
            owner.on_failure("Internal error.", 500)

    def _heartbeat(self, stats: Stats) -> None:
        before = self.stats
        if before is None or stats.steps > before.steps or not stats.running + stats.waiting:
            self._progress = time.monotonic()
            self._step_ms.append(stats.last_step_ms)
        now = time.monotonic()
        if before is not None and now > self._beat_at:
            made = stats.generation_tokens - before.generation_tokens
            self.throughput = made / (now - self._beat_at)
        self.stats, self._beat_at = stats, now

    def _set_ready(self, ready: Ready) -> None:
        self.capacity = ready
        self.failed = None
        self.stats, self.throughput = None, 0.0
        self.up = True
        self._ready_at = time.monotonic()
        self._failures = min(self._failures, CAN_START)
        phases = " ".join(f"{name}={seconds:.3f}" for name, seconds in ready.phases.items())
        log.info("engine ready pid=%d pages=%d %s", self.process.pid, ready.pages, phases)
        self.changed.set()

    # --- its death ------------------------------------------------------------------------------

    def _lost(self) -> None:
        """End of file: the engine is gone or has said why it goes."""
        if self.up and time.monotonic() - self._ready_at > SETTLED_S:
            self._failures = 0
        self.up = False
        self._protocol = None
        owners, self._owners = self._owners, {}
        for owner in owners.values():
            owner.on_failure(LOST, 503)
        self.flush()
        for waiting in self._controls.values():
            if not waiting.done():
                waiting.set_exception(EngineDead(LOST))
        self._controls.clear()
        self.changed.set()
        if not self._closing:
            log.error("engine lost pid=%d in_flight=%d", self.process.pid, len(owners))
            # The very first engine's failure is the server's: serve.py ends with its exit code.
            if self.capacity is not None:
                self._restarting = asyncio.create_task(self._restart())
            elif self.failed is None:
                self.failed = Failed(message="the engine ended while starting", exit_code=1)
                self.changed.set()

    async def _restart(self) -> None:
        self.process.kill()
        await asyncio.to_thread(self.process.wait, 5.0)
        while True:
            await asyncio.sleep(BACKOFF_S[min(self._failures, len(BACKOFF_S) - 1)])
            self._failures += 1
            self.restarts += 1
            try:
                self.process = self._spawn()
                await self._connect(self.process)
            except OSError as error:  # no process, no descriptor: the machine is short of something
                log.error("engine restart failed error=%s", error.strerror)
            else:
                log.info("engine restart pid=%d attempt=%d", self.process.pid, self._failures)
                return

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(0.25)
            if self.up and self.stalled():
                log.error("engine stalled pid=%d limit_s=%.1f", self.process.pid, self.stall_s())
                self.process.kill()  # its socket closes, and the rest follows
            elif not self.up and time.monotonic() - self._progress > self._start_s():
                log.error("engine start stalled pid=%d", self.process.pid)
                self.process.kill()

    def _start_s(self) -> float:
        """The first one may take as long as it needs: nobody knows yet what is long."""
        if self.capacity is None or self._protocol is None:
            return float("inf")
        return max(START_S, START_TIMES * self.capacity.phases.get("ready", 0.0))

    def stall_s(self) -> float:
        steps = sorted(self._step_ms)
        p99 = steps[int(len(steps) * 0.99)] if steps else 0.0
        return max(self._step_s, STALL_STEPS * p99 / 1e3)

    def stalled(self) -> bool:
        return time.monotonic() - self._progress > self.stall_s()
