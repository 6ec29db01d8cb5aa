"""Answers under way: one `Job` per HTTP request, gathering or streaming the sequences it asked for.

Events come straight from the engine link, inside its read callback. A streaming job turns each into
bytes and writes them to the transport there and then: no queue, no task wakes per token. The
handler task sleeps until the end, or until a disconnect cancels it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from aiohttp import HttpVersion11, web

from runtime.http.connection import Connection
from runtime.http.link import EngineLink
from runtime.http.replies import stream_error
from runtime.metrics import RequestMetrics
from runtime.request import Event
from runtime.text.sequence import Sequence

DONE = b"data: [DONE]\n\n"


class Encoder(Protocol):
    """One API's way to tell the news of one sequence; remembers what it has told."""

    def chunk(self, seq: Sequence, final: bool) -> bytes | None:
        """SSE bytes for what is new; None when there is nothing worth telling yet."""
        ...


class Job:
    """All sequences of one HTTP request. `done` is set when each has finished, or by the first
    failure: an answer is all or nothing. `error`: that failure, message and status.
    """

    def __init__(
        self,
        link: EngineLink,
        metrics: RequestMetrics,
        sequences: list[Sequence],
        *,
        deadline_s: float,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.link = link
        self.metrics = metrics
        self.sequences = sequences
        self.error: tuple[str, int] | None = None
        self.done: asyncio.Future[None] = loop.create_future()
        self._open = len(sequences)
        self._tracks: list[Track] = []
        self._timer = loop.call_later(deadline_s, self._expire)

    def submit(self, make: Callable[[Sequence], Track]) -> None:
        self._tracks = [make(seq) for seq in self.sequences]
        for track in self._tracks:
            self.link.submit(track.seq.request, track)
            self.metrics.received(track.seq)

    def finished(self, seq: Sequence) -> None:
        self._open -= 1
        self.error = self.error or seq.error
        if (self.error or not self._open) and not self.done.done():
            self.done.set_result(None)
        self.metrics.finished(seq)

    def close(self) -> None:
        """Whatever still runs has lost its client: aborted, and nobody hears of it."""
        self._timer.cancel()
        for seq in self.sequences:
            if seq.finish is None:
                self.link.abort(seq.request.id)
                self.metrics.abandoned()

    def fail(self, message: str, status: int) -> None:
        """End it from our side: its client is told."""
        for track in self._tracks:
            if not track.over:
                self.link.abort(track.seq.request.id)
                track.on_failure(message, status)
        self.link.flush()

    def _expire(self) -> None:
        self.fail("Request running timeout reached.", 504)


class Track:
    """The link between one sequence and its job; this one tells nothing before the end. `over`: the
    job knows of the end."""

    __slots__ = ("job", "over", "seq")

    def __init__(self, job: Job, seq: Sequence) -> None:
        self.job = job
        self.seq = seq
        self.over = False

    def on_event(self, event: Event) -> None:
        seq = self.seq
        if event.queue_s is not None:
            self.job.metrics.admitted(event.queue_s)
        if event.tokens:
            self.job.metrics.tokens(seq, len(event.tokens))
        seq.feed(event)
        if seq.finish is None:
            self.progress()
        else:
            if seq.stopped_by_text:
                self.job.link.abort(seq.request.id)
            self.end()

    def on_failure(self, message: str, status: int) -> None:
        """Also when it had finished, but its end could not be told."""
        if not self.over:
            self.seq.fail(message, status)
            self.end()

    def progress(self) -> None:
        pass

    def end(self) -> None:
        self.over = True
        self.job.finished(self.seq)


class StreamTrack(Track):
    """Tells the news through a stream, at most every `interval` tokens after the first."""

    __slots__ = ("_encoder", "_stream", "_told")

    def __init__(self, job: Job, seq: Sequence, stream: EventStream, encoder: Encoder) -> None:
        super().__init__(job, seq)
        self._stream = stream
        self._encoder = encoder
        self._told = 0
        stream.tracks.append(self)

    def progress(self) -> None:
        seq, stream = self.seq, self._stream
        count = len(seq.ids)
        if stream.paused or (self._told and count - self._told < seq.interval):
            return
        chunk = self._encoder.chunk(seq, False)
        if chunk is not None:
            self._told = count
            stream.send(chunk)

    def end(self) -> None:
        seq = self.seq
        if seq.error is not None:
            self._stream.fail(*seq.error)
        else:
            chunk = self._encoder.chunk(seq, True)
            if chunk is not None:
                self._stream.send(chunk)
        super().end()


class EventStream:
    """A server-sent event response, opened by the first news so that an early error gets its
    status.
    """

    def __init__(self, request: web.Request, link: EngineLink) -> None:
        connection = request.protocol
        assert isinstance(connection, Connection)
        self._request = request
        self._connection = connection
        self._link = link
        self._parts: list[bytes] = []
        self._chunked = request.version >= HttpVersion11
        self._response: web.StreamResponse | None = None
        self._failed = False
        self.tracks: list[StreamTrack] = []
        self.news: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def paused(self) -> bool:
        """The client reads too slowly: news is kept in the sequences until it catches up."""
        return self._connection.paused

    def send(self, chunk: bytes) -> None:
        """Queued until the engine's frame is handed out, then written in one piece. Nothing follows
        an error."""
        if self._failed:
            return
        if not self._parts:
            self._link.dirty.append(self.flush)
        self._parts.append(chunk)

    def fail(self, message: str, status: int) -> None:
        self.send(stream_error(message, status))
        self._failed = True

    def flush(self) -> None:
        if self._response is None:
            if not self.news.done():
                self.news.set_result(None)
            return
        transport = self._connection.transport
        if self._parts and transport is not None and not transport.is_closing():
            data = b"".join(self._parts)
            if self._chunked:
                data = b"%x\r\n%b\r\n" % (len(data), data)
            transport.write(data)
        self._parts.clear()

    async def open(self) -> None:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
        )
        if self._chunked:
            response.enable_chunked_encoding()
        else:
            response.force_close()
        writer = await response.prepare(self._request)
        assert writer is not None
        writer.send_headers()
        self._response = response
        self._connection.on_resume = self._resume
        self.flush()

    async def close(self, last: bytes) -> web.StreamResponse:
        assert self._response is not None
        self.flush()
        self._connection.on_resume = None
        await self._response.write_eof(last)
        return self._response

    def _resume(self) -> None:
        for track in self.tracks:
            if track.seq.finish is None:
                track.progress()
        self._link.flush()
