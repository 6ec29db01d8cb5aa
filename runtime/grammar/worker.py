"""The grammar process: `python -m runtime.grammar.worker SOCKET TOKENIZER MASKS OPTIONS`, three
descriptors and WorkerOptions as JSON.

Started by an engine's first constrained request (client.py). It follows every constrained sequence:
hears its tokens, writes the mask of its next one into shared memory. A compile runs in a child
first (trial.py), then here in a thread, so that sequences under way never wait for one. What goes
wrong with a grammar concerns its request; what goes wrong with this process ends the constrained
requests and nothing else.
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
import threading
from collections import deque

import msgspec
import numpy as np
from llguidance import LLExecutor, LLTokenizer
from llguidance import LLMatcher as Matcher
from llguidance.numpy import fill_next_token_bitmask, fill_next_token_bitmask_par

from runtime.device.base import I32
from runtime.grammar.cache import GrammarCache
from runtime.grammar.compiler import GrammarError, compile_matcher, failure, load_tokenizer
from runtime.grammar.messages import (
    COMPLETE,
    FAILED,
    GOES_ON,
    Advance,
    Advanced,
    Compile,
    Compiled,
    Started,
    ToWorker,
    WorkerOptions,
)
from runtime.grammar.trial import Trial, limit_memory
from runtime.ipc import BadFrame, Channel
from runtime.lifetime import die_with_parent
from runtime.request import Grammar

POLL_S = 0.001  # while a grammar compiles
THREADS = 8  # that compute masks
MEMORY = 2 << 30  # of this process beyond what it takes idle


class Job:
    """A grammar on its way: tried in a child, then compiled here."""

    def __init__(self, wanted: Compile, tokenizer: LLTokenizer, options: WorkerOptions) -> None:
        self.id, self.grammar = wanted.id, wanted.grammar
        self._tokenizer = tokenizer
        self._trial = Trial(tokenizer, wanted.grammar, options)
        self._thread: threading.Thread | None = None
        self._error: GrammarError | None = None
        self._matcher: Matcher | None = None
        self.bytes = 0

    def poll(self) -> Matcher | None:
        """Raises GrammarError. Where it returns a matcher, its thread has ended."""
        if self._thread is None:
            text = self._trial.poll()
            if text is not None:
                self._thread = threading.Thread(target=self._build, args=(text,))
                self._thread.start()
            return None
        if self._thread.is_alive():
            return None
        self._thread.join()
        if self._matcher is None:
            raise self._error or GrammarError("it cannot be compiled")  # the log says more
        return self._matcher

    def _build(self, text: str) -> None:
        before = resident()
        try:
            self._matcher = compile_matcher(self._tokenizer, text)
        except GrammarError as error:
            self._error = error
        self.bytes = max(resident() - before, 0)


class Worker:
    """`masks`: [slots, words]."""

    def __init__(
        self, channel: Channel, tokenizer: LLTokenizer, options: WorkerOptions, masks: I32
    ) -> None:
        self._channel = channel
        self._tokenizer = tokenizer
        self._options = options
        self._masks = masks
        self._cache = GrammarCache(options.cache)
        self._matchers: dict[int, Matcher] = {}
        self._waiting: deque[Compile] = deque()
        self._job: Job | None = None
        self._executor: LLExecutor | None = None

    def serve(self) -> None:
        """Until the engine closes its end."""
        while True:
            for message in self._channel.receive(POLL_S if self._job else 3600.0):
                if isinstance(message, Compile):
                    self._waiting.append(message)
                elif isinstance(message, Advance):
                    self._channel.send(Advanced(states=self._advance(message)))
                else:
                    for id_ in message.ids:
                        self._matchers.pop(id_, None)
            self._work()

    def _work(self) -> None:
        """One compile at a time; a new one starts when no thread of another is left."""
        if self._job is not None:
            try:
                matcher = self._job.poll()
            except GrammarError as error:
                self._end(self._job.id, self._job.grammar, str(error), 0)
                self._job = None
            else:
                if matcher is None:
                    return
                self._end(self._job.id, self._job.grammar, matcher, self._job.bytes)
                self._job = None
        while self._waiting and self._job is None:
            wanted = self._waiting.popleft()
            known = self._cache.get(wanted.grammar)
            if known is None:
                self._job = Job(wanted, self._tokenizer, self._options)
            else:
                self._tell(wanted.id, known)

    def _end(self, id_: int, grammar: Grammar, entry: Matcher | str, size: int) -> None:
        self._cache.put(grammar, entry, size)
        self._tell(id_, entry)

    def _tell(self, id_: int, entry: Matcher | str) -> None:
        if isinstance(entry, str):
            self._channel.send(Compiled(id=id_, error=entry))
        else:
            self._matchers[id_] = entry.deep_copy()
            self._channel.send(Compiled(id=id_))

    def _advance(self, message: Advance) -> list[tuple[int, str]]:
        states: list[tuple[int, str]] = []
        wanted: list[tuple[int, Matcher, int]] = []
        for id_, token, slot in message.rows:
            matcher = self._matchers.get(id_)
            if matcher is None:
                states.append((FAILED, "the grammar worker was restarted"))
            elif token >= 0 and not matcher.consume_token(token):
                states.append((FAILED, failure(matcher)))
            elif matcher.is_stopped():
                states.append((COMPLETE, ""))
            else:
                wanted.append((len(states), matcher, slot))
                states.append((GOES_ON, ""))
        self._fill([(matcher, slot) for _, matcher, slot in wanted])
        for index, matcher, _ in wanted:
            if matcher.is_error():
                states[index] = FAILED, failure(matcher)
        return states

    def _fill(self, rows: list[tuple[Matcher, int]]) -> None:
        if len(rows) == 1:
            fill_next_token_bitmask(rows[0][0], self._masks, rows[0][1])
        elif rows:
            if self._executor is None:
                self._executor = LLExecutor(min(os.cpu_count() or 1, THREADS))
            fill_next_token_bitmask_par(self._executor, rows, self._masks)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


def main(arguments: list[str]) -> None:
    fd, document, table = (int(a) for a in arguments[:3])
    options = msgspec.json.decode(arguments[3], type=WorkerOptions)
    channel = Channel(socket.socket(fileno=fd), ToWorker)
    words = -(-options.vocab // 32)
    shared = mmap.mmap(table, options.slots * words * 4)
    masks = np.frombuffer(shared, np.int32).reshape(options.slots, words)
    try:
        try:
            with os.fdopen(document, "rb") as file:
                tokenizer = load_tokenizer(file.read(), options.vocab, options.eos)
        except (ValueError, RuntimeError) as error:
            channel.send(Started(error=str(error).partition("\n")[0][:300]))
            return
        channel.send(Started())
        limit_memory(MEMORY)
        Worker(channel, tokenizer, options, masks).serve()
    except (EOFError, BadFrame):
        return  # the engine closed the socket: that is how it ends us


if __name__ == "__main__":
    die_with_parent()
    main(sys.argv[1:])
