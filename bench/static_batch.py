"""A static batch through the real engine loop: scheduler, paged KV, plan and sampling, no server.

`StaticBatch` opens an artifact and times batches of equal prompts; `bench.latency` prints them, the
peer comparison uses the same. A decode step counts when every sequence of the batch got a token.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bench.errors import BenchError
from bench.windows import WINDOW
from runtime.artifact import Artifact
from runtime.core.loop import EngineLoop
from runtime.core.options import EngineOptions
from runtime.device.base import Session, open_session
from runtime.device.cpu import CpuSession
from runtime.device.cuda import CudaSession
from runtime.request import Request, SamplingParams

# Steps after a pause that do not count: the one that ended meanwhile, the one that may have to wake
# threads, and those that turn the caches over, as a read's first passes do (on a Zen 5 the second
# and third step after a read take 3 to 7 % more than the rest).
WARM_STEPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Seconds. `prefill`: until every sequence had its first token; `decode`: each full step, but
    for the `WARM_STEPS` after a pause."""

    prefill: float
    decode: list[float]


class TooLarge(BenchError):
    """The artifact's sizes do not allow this batch."""


class StaticBatch:
    def __init__(self, session: Session, loop: EngineLoop) -> None:
        self.session, self.loop = session, loop
        self._next_id = 0

    @classmethod
    def open(
        cls,
        artifact: Artifact,
        *,
        threads: int | None = None,
        policy: str = "fcfs",
        prefix_cache: bool = False,
    ) -> StaticBatch:
        session = open_session(artifact, threads=threads)
        if isinstance(session, CudaSession):
            session.complete()  # a step on a larger plan than its own is not what is measured
        # One batch at a time: the limits of a server on waiting work are out of place.
        options = EngineOptions(
            artifact=str(artifact.path),
            threads=threads,
            policy=policy,
            prefix_cache=prefix_cache,
            waiting_requests=1 << 20,
            waiting_tokens=1 << 40,
            queue_wait_s=None,
            request_s=None,
        )
        return cls(session, EngineLoop(session, options, eos=()))

    def slack(self, batch: int, input_len: int) -> int:
        """Tokens that the first sequences may generate while the last prompts are prefilled."""
        return -(-batch * input_len // self.session.capacity.max_tokens) + 4

    def check(self, batch: int, input_len: int, output_len: int) -> None:
        capacity = self.session.capacity
        if batch > capacity.max_seqs:
            raise TooLarge(f"max batch size limit of {capacity.max_seqs}")
        length = input_len + output_len + self.slack(batch, input_len)
        if length > capacity.context:
            raise TooLarge(f"context limit of {capacity.context}, {length} needed")
        pages = batch * -(-length // capacity.page_size)
        if pages > capacity.pages:
            raise TooLarge(f"KV pool of {capacity.pages} pages, {pages} needed")

    def prompts(self, batch: int, input_len: int, seed: int) -> list[list[int]]:
        rng = np.random.default_rng(seed)
        return rng.integers(0, self.session.capacity.vocab, (batch, input_len)).tolist()

    def run(
        self,
        prompts: list[list[int]],
        output_len: int,
        pause: Callable[[], None] | None = None,
        every: int = WINDOW,
    ) -> Run:
        """Prefill, then `output_len - 1` full decode steps; the cache is left as it is. `pause` is
        called before the decode, after `every` so many steps that count, and at the end; its time
        is in no figure. No step runs then, or on a CPU session one that what `pause` has the
        session's threads do comes after.
        """
        batch = len(prompts)
        self.check(batch, len(prompts[0]), output_len)
        sampling = SamplingParams(
            max_new_tokens=output_len + self.slack(batch, len(prompts[0])),
            temperature=0.0,
            ignore_eos=True,
        )
        ids = range(self._next_id, self._next_id + batch)
        self._next_id += batch
        waiting = set(ids)
        start = time.perf_counter()
        for id, tokens in zip(ids, prompts, strict=True):
            self.loop.add(Request(id=id, tokens=tokens, sampling=sampling))
        longest, last = 0.0, start
        while waiting:
            waiting -= self._step()
            longest, last = max(longest, time.perf_counter() - last), time.perf_counter()
        prefilled = last
        decode: list[float] = []
        steps = cold = due = 0
        while steps < output_len - 1:
            if pause is not None and len(decode) == due:
                self._let_end(longest)
                pause()
                longest, last, cold = 0.0, time.perf_counter(), WARM_STEPS
                due += every
            tokens_of = self._step()
            now = time.perf_counter()
            seconds, last = now - last, now
            longest = max(longest, seconds)
            if len(tokens_of) < batch:
                continue
            steps += 1
            if cold:
                cold -= 1
            else:
                decode.append(seconds)
        if pause is not None:
            self._let_end(longest)
            pause()
        for id in ids:
            self.loop.abort(id)
        while self.loop.has_work:
            self.loop.step()
        return Run(prefill=prefilled - start, decode=decode)

    def _let_end(self, longest: float) -> None:
        """With overlap one step runs on, for `longest` seconds at most. On a CPU session what is
        called next waits for it in line, and the threads stay awake."""
        if not isinstance(self.session, CpuSession):
            time.sleep(longest)

    def _step(self) -> set[int]:
        """One step of the loop: which sequences got a token."""
        got = set()
        for event in self.loop.step():
            if event.finish is not None:
                raise BenchError(
                    f"sequence {event.id} ended early ({event.finish.reason}): "
                    f"{event.finish.message or 'no message'}"
                )
            if event.tokens:
                got.add(event.id)
        if not self.loop.has_work:
            raise BenchError("the engine has no work left but the batch is not done")
        return got

    def close(self) -> None:
        self.loop.close()


def step_bytes(artifact: Artifact, batch: int, context: float) -> float:
    """Bytes a decode step must read: every weight once (of an untied embedding table next to
    nothing), and the keys and values of `batch` contexts.
    """
    manifest = artifact.manifest
    tensors = manifest.tensors[0]
    untied = any(t.name.startswith("head.") for t in tensors)
    weights = sum(t.size for t in tensors if not (untied and t.name.startswith("embed.")))
    kv = manifest.state.page_bytes / manifest.state.page_size
    return weights + batch * context * kv
