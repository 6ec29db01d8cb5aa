"""The engine loop in a thread of this process: what `runtime.engine.Engine` runs on.

Comes in: requests and controls from any thread. Goes out: each request's events, to its `Inbox`, in
batches: as they come for a stream, all at once for an answer nobody reads before its end. Blocks
when there is nothing to do.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

from runtime.core.loop import EngineLoop
from runtime.errors import EngineDead
from runtime.request import Abort, Control, ControlReply, Event, Request, ToEngine

log = logging.getLogger("headstart.engine")

PAUSE_S = 1.0  # idle for so long: the books are checked

Deliver = Callable[[list[Event] | EngineDead], None]


class Inbox:
    """Where the events of a group of requests go. `deliver` is called in the engine's thread.
    `live`: every step; otherwise once, when the last of them has finished.
    """

    def __init__(self, requests: list[Request], deliver: Deliver, *, live: bool) -> None:
        self.open = {request.id for request in requests}
        self.deliver = deliver
        self.live = live
        self.kept: list[Event] = []


class Driver:
    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop
        self._inboxes: dict[int, Inbox] = {}
        self._controls: dict[int, queue.SimpleQueue[ControlReply | EngineDead]] = {}
        self._messages: queue.SimpleQueue[ToEngine] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of `_dead` and of what is promised an answer
        self._dead: EngineDead | None = None
        self._next_control = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, requests: list[Request], deliver: Deliver, *, live: bool) -> None:
        inbox = Inbox(requests, deliver, live=live)
        with self._lock:
            if self._dead is not None:
                raise self._dead
            for request in requests:
                self._inboxes[request.id] = inbox
        for request in requests:
            self._messages.put(request)

    def abort(self, ids: list[int]) -> None:
        """Their owner wants nothing more of them."""
        with self._lock:
            known = [i for i in ids if self._inboxes.pop(i, None) is not None]
        for i in known:
            self._messages.put(Abort(id=i))

    def control(self, verb: str) -> ControlReply:
        answer: queue.SimpleQueue[ControlReply | EngineDead] = queue.SimpleQueue()
        with self._lock:
            if self._dead is not None:
                raise self._dead
            self._next_control += 1
            number = self._next_control
            self._controls[number] = answer
        self._messages.put(Control(id=number, verb=verb))
        reply = answer.get()
        if isinstance(reply, EngineDead):
            raise reply
        return reply

    def close(self) -> None:
        """Ends the thread; what is in flight is lost and told so."""
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._messages.put(Control(id=0, verb="shutdown"))
            self._thread.join()

    # --- in the engine's thread -----------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._loop.stopping:
                self._receive()
                if self._loop.has_work:
                    self._hand_out(self._loop.step())
                self._answer()
            self._end(EngineDead("The engine was shut down."))
        except Exception as error:
            log.exception("engine fault")
            self._end(EngineDead(f"The engine ended: {error}"))
        self._loop.close()

    def _receive(self) -> None:
        """What has come; blocks without work, checking the books once per pause."""
        loop, messages = self._loop, self._messages
        if not loop.has_work:
            try:
                loop.receive(messages.get(timeout=PAUSE_S))
            except queue.Empty:
                loop.idle()
                loop.receive(messages.get())
        while not messages.empty():
            loop.receive(messages.get())

    def _hand_out(self, events: list[Event]) -> None:
        batches: dict[Inbox, list[Event]] = {}
        with self._lock:
            for event in events:
                inbox = self._inboxes.get(event.id)
                if inbox is None:
                    continue
                if inbox.live:
                    batches.setdefault(inbox, []).append(event)
                else:
                    inbox.kept.append(event)
                if event.finish is not None:
                    del self._inboxes[event.id]
                    inbox.open.discard(event.id)
                    if not inbox.open and not inbox.live:
                        batches[inbox] = inbox.kept
        for inbox, batch in batches.items():
            inbox.deliver(batch)

    def _answer(self) -> None:
        for reply in self._loop.replies:
            with self._lock:
                answer = self._controls.pop(reply.id, None)
            if answer is not None:
                answer.put(reply)
        self._loop.replies.clear()

    def _end(self, dead: EngineDead) -> None:
        with self._lock:
            self._dead = dead
            inboxes = dict.fromkeys(self._inboxes.values())
            answers = list(self._controls.values())
            self._inboxes.clear()
            self._controls.clear()
        for inbox in inboxes:
            inbox.deliver(dead)
        for answer in answers:
            answer.put(dead)
