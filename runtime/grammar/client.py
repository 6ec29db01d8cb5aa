"""The engine's side of its grammar worker.

Comes in: grammars of requests, tokens of their sequences. Goes out: masks of the tokens that may
come next. `open` and `poll` never wait for the worker, `advance` does: a step needs the masks. The
worker is started by the first request that needs it; when it ends, its sequences fail and the next
request starts another. Used by the engine loop.
"""

from __future__ import annotations

import logging
import mmap
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from runtime.device.base import I32
from runtime.grammar.messages import (
    FAILED,
    Advance,
    Advanced,
    Compile,
    Compiled,
    Forget,
    FromWorker,
    Started,
    WorkerOptions,
)
from runtime.ipc import BadFrame, Channel
from runtime.request import Grammar

if TYPE_CHECKING:
    import subprocess

    from runtime.artifact import Artifact

log = logging.getLogger("headstart.grammar")

START_S = 60.0
COMPILE_SLACK_S = 10.0  # beyond the child's own bound: the compile itself, on a busy machine
ADVANCE_S = 3.0  # less than what makes an engine count as stalled

ENDED = "The grammar worker ended; try again."

Outcome = tuple[int, str | None, int]  # request id, why not, status


def grammars_of(artifact: Artifact, slots: int) -> Grammars:
    model = artifact.manifest.model
    options = WorkerOptions(vocab=model.vocab, eos=model.eos_token_ids, slots=slots)
    return Grammars(lambda: artifact.text("tokenizer.json"), options)


class Grammars:
    """`tokenizer` reads tokenizer.json, None: the model has none."""

    def __init__(self, tokenizer: Callable[[], bytes | None], options: WorkerOptions) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self._child: subprocess.Popen[bytes] | None = None
        self._channel: Channel | None = None
        self._started = False
        self._unable: str | None = None  # why no grammar can be served
        self._queue: deque[Compile] = deque()
        self._sent: Compile | None = None  # one at a time: a send never waits for a reader
        self._deadline = 0.0
        self._outcomes: list[Outcome] = []
        self._advanced: Advanced | None = None
        self.masks: I32 = np.zeros((options.slots, -(-options.vocab // 32)), np.int32)

    def open(self, id_: int, grammar: Grammar) -> None:
        """`poll` says when the sequence `id_` can be followed."""
        if self._child is not None and self._child.poll() is not None:
            self._lose()  # it ended while nobody needed it
        if self._unable is None and self._channel is None:
            self._start()
        if self._unable is not None:
            self._outcomes.append((id_, self._unable, 400))
            return
        self._queue.append(Compile(id=id_, grammar=grammar))
        try:
            self._send_next()
        except EOFError:
            self._lose()

    def poll(self, wait: float) -> list[Outcome]:
        """Outcomes of `open`, after at most `wait` seconds."""
        if self._channel is not None and (self._queue or self._sent):
            try:
                self._receive(wait)
                if time.monotonic() > self._deadline:
                    raise TimeoutError
            except (EOFError, BadFrame, TimeoutError):
                self._lose()
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def advance(self, rows: list[tuple[int, int, int]]) -> list[tuple[int, str]]:
        """(GOES_ON | COMPLETE | FAILED, the failure's text) for each (id, token or -1, slot); the
        rows `masks[slot]` of those that go on are valid afterwards."""
        if not rows:
            return []
        deadline = time.monotonic() + ADVANCE_S
        try:
            if self._channel is None:
                raise EOFError
            self._channel.send(Advance(rows=rows))
            while self._advanced is None:
                if time.monotonic() > deadline:
                    raise TimeoutError
                self._receive(ADVANCE_S)
        except (EOFError, BadFrame, TimeoutError):
            self._lose()
            return [(FAILED, ENDED)] * len(rows)
        states, self._advanced = self._advanced.states, None
        return states

    def forget(self, ids: list[int]) -> None:
        """Their sequences have ended."""
        for wanted in [w for w in self._queue if w.id in ids]:
            self._queue.remove(wanted)
        if self._channel is not None and self._started:  # before, it neither knows them nor reads
            try:
                self._channel.send(Forget(ids=ids))
            except EOFError:
                self._lose()

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None

    # --- inside ---------------------------------------------------------------------------------

    def _start(self) -> None:
        import subprocess  # engines without grammars never need it

        document = self._tokenizer()
        if document is None:
            self._unable = "This model has no tokenizer: it cannot be constrained by a grammar."
            return
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        text, table = os.memfd_create("tokenizer"), os.memfd_create("masks")
        try:
            with os.fdopen(os.dup(text), "wb") as file:
                file.write(document)
            os.lseek(text, 0, os.SEEK_SET)
            os.ftruncate(table, self.masks.nbytes)
            shared = mmap.mmap(table, self.masks.nbytes)
            masks = np.frombuffer(shared, np.int32).reshape(self.masks.shape)
            masks[:] = self.masks  # a step may still need those of a worker that has ended
            self.masks = masks
            fds = (theirs.fileno(), text, table)
            self._child = subprocess.Popen(
                [
                    *(sys.executable, "-m", "runtime.grammar.worker", *map(str, fds)),
                    msgspec.json.encode(self._options).decode(),
                ],
                pass_fds=fds,
                stdin=subprocess.DEVNULL,
            )
        finally:
            theirs.close()
            os.close(text)
            os.close(table)
        self._channel = Channel(ours, FromWorker)
        self._started = False
        self._deadline = time.monotonic() + START_S

    def _receive(self, wait: float) -> None:
        assert self._channel is not None
        for message in self._channel.receive(wait):
            if isinstance(message, Advanced):
                self._advanced = message
            elif isinstance(message, Compiled):
                refusal = None
                if message.error is not None and self._sent is not None:
                    refusal = f"{self._sent.grammar.kind} is refused: {message.error}"
                self._sent = None
                self._outcomes.append((message.id, refusal, 400))
            elif isinstance(message, Started):
                self._started = True
                if message.error is not None:
                    self._give_up(message.error)
                    return
        self._send_next()

    def _send_next(self) -> None:
        if self._started and self._sent is None and self._queue and self._channel is not None:
            self._sent = self._queue.popleft()
            self._deadline = time.monotonic() + self._options.seconds + COMPILE_SLACK_S
            self._channel.send(self._sent)

    def _give_up(self, why: str) -> None:
        """This model's tokenizer cannot be constrained: say so from now on."""
        log.error("grammars cannot be served error=%s", why)
        self._unable = f"This model's tokenizer cannot be constrained by a grammar: {why}"
        self._outcomes += [(wanted.id, self._unable, 400) for wanted in self._queue]
        self._queue.clear()
        self.close()

    def _lose(self) -> None:
        """The worker is gone or stuck: whoever waits for it hears so."""
        log.warning("grammar worker ended")
        self.close()
        lost = [*self._queue, *([self._sent] if self._sent else ())]
        self._outcomes += [(wanted.id, ENDED, 500) for wanted in lost]
        self._queue.clear()
        self._sent = self._advanced = None
