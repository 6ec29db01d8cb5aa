"""What every route needs, in one object: the model's text layer, the engine, limits, keys,
counters.

`Server` turns a checked `Call` into a finished answer: tokenize off the loop when long, submit,
then gather or stream. native.py and openai.py differ only in what they read and write.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

from conf.schema import ServeConfig
from runtime.errors import EngineDead, InvalidRequest
from runtime.http.body import body_limit, read_json
from runtime.http.link import EngineLink
from runtime.http.render import Renderer
from runtime.http.stream import DONE, Encoder, EventStream, Job, StreamTrack, Track
from runtime.metrics import RequestMetrics
from runtime.text.call import Call, Prompt
from runtime.text.model import TextModel, tokenize
from runtime.text.schema import show
from runtime.text.sequence import Sequence

INLINE = 1024  # characters or ids that are quick enough to tokenize on the event loop

DEADLINE_SLACK_S = 1.0  # the engine's own deadline comes first

Tokenize = Callable[[str | list[int]], list[int]]


class Server:
    def __init__(
        self,
        config: ServeConfig,
        model: TextModel,
        link: EngineLink,
        renderer: Renderer | None,
        *,
        info: dict[str, Any],
        defaults: dict[str, Any],
        metrics: RequestMetrics,
    ) -> None:
        self.config = config
        self.model = model
        self.link = link
        self.renderer = renderer
        self.info = info  # /server_info and /model_info draw on it
        self.defaults = defaults  # sampling defaults of the model, for chat
        self.metrics = metrics
        self.draining = False
        self.jobs: set[Job] = set()
        self._rids: dict[str, set[int]] = {}  # the client's name of a request -> ours

    @property
    def accepting(self) -> bool:
        return self.link.up and not self.draining

    async def read_body(self, request: web.Request) -> object:
        limits = self.config.limits
        most = body_limit(self.model.context)
        return await read_json(request, most=most, idle_s=limits.body_idle_s)

    async def sequences(self, call: Call, encode: Tokenize | None = None) -> list[Sequence]:
        self._check_size(call)
        encode = encode or (lambda source: tokenize(self.model, source))
        sources = [prompt.source for prompt in call.prompts]
        if sum(map(len, sources)) <= INLINE:
            tokens = [encode(source) for source in sources]
        else:
            tokens = await asyncio.to_thread(lambda: [encode(source) for source in sources])
        return call.build(self.model, tokens)

    def _check_size(self, call: Call) -> None:
        """A call that an idle engine would refuse for want of room is not worth trying again."""
        budget = sum(p.sampling.n for p in call.prompts)
        most = self.model.limits.prompts_per_request
        if budget > most:
            raise InvalidRequest(f"prompts x n must be at most {most}, got {budget}.", param="n")
        ready = self.link.capacity
        room = ready.max_seqs + ready.waiting_requests if ready else budget
        if budget > room:
            raise InvalidRequest(
                f"prompts x n are {budget}, this server runs and queues {room} at once; send fewer "
                "or raise limits.waiting_requests.",
                param="n",
            )

    async def gather(self, call: Call, sequences: list[Sequence]) -> None:
        """Returns when every sequence has ended; raises what ended one of them early."""
        with self._job(call, sequences) as job:
            job.submit(lambda seq: Track(job, seq))
            await job.done
        if job.error is not None:
            raise RequestEnded(*job.error)

    async def stream(
        self,
        request: web.Request,
        call: Call,
        sequences: list[Sequence],
        encoder: Callable[[Sequence], Encoder],
        epilogue: Callable[[], bytes] | None = None,
    ) -> web.StreamResponse:
        stream = EventStream(request, self.link)
        with self._job(call, sequences) as job:
            job.submit(lambda seq: StreamTrack(job, seq, stream, encoder(seq)))
            await stream.news
            if job.error is not None:
                raise RequestEnded(*job.error)
            await stream.open()
            await job.done
            last = epilogue() if epilogue and job.error is None else b""
            return await stream.close(last + DONE)

    def abort(self, rid: str | None) -> None:
        """By the client's name, exactly; None: everything."""
        if rid is None:
            ids = {id_ for ids in self._rids.values() for id_ in ids}
        else:
            ids = set(self._rids.get(rid, ()))
        for id_ in ids:
            self.link.abort_softly(id_)

    @contextmanager
    def _job(self, call: Call, sequences: list[Sequence]) -> Iterator[Job]:
        names: Counter[str] = Counter()
        own = {call.name} if call.name else set()
        for name in own | {seq.rid for seq in sequences} | {p.rid for p in call.prompts}:
            if name in self._rids:
                raise InvalidRequest(f"Duplicate request ID detected: {show(name)}", param="rid")
            names[name] = 1
        for prompt, group in zip(call.prompts, _by_prompt(call.prompts, sequences), strict=True):
            ids = {seq.request.id for seq in group}
            self._rids[prompt.rid] = ids
            for seq in group:
                self._rids.setdefault(seq.rid, {seq.request.id})
        for name in own:
            self._rids.setdefault(name, {seq.request.id for seq in sequences})
        slack = self.config.limits.request_s + DEADLINE_SLACK_S
        job = Job(self.link, self.metrics, sequences, deadline_s=slack)
        self.jobs.add(job)
        try:
            yield job
        finally:
            job.close()
            self.jobs.discard(job)
            for name in names:
                self._rids.pop(name, None)


class RequestEnded(EngineDead):
    """The engine ended a request early; `status` is what its client gets."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def _by_prompt(prompts: list[Prompt], sequences: list[Sequence]) -> Iterator[list[Sequence]]:
    start = 0
    for prompt in prompts:
        n = prompt.sampling.n
        yield sequences[start : start + n]
        start += n
