"""One client connection: aiohttp's protocol with the time limits, caps and error bodies it lacks.

`Connections` makes one per accepted socket and closes those whose headers do not arrive in time.
Protocol errors are answered in our error shape instead of aiohttp's echo of the client's bytes.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections import Counter
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from aiohttp import http_exceptions, web
from aiohttp.web_protocol import RequestHandler

from conf.schema import LimitsConfig
from runtime.http.replies import STATUS_HEADERS, error_body, error_reply

LINE = 8190
HEADERS = 64
KEEPALIVE_S = 75.0
SWEEP_S = 0.5
NEVER = float("inf")
RESET = struct.pack("ii", 1, 0)  # linger for no time

_NO_ACCESS_LOG = logging.getLogger("headstart.aiohttp")  # app.py writes the access log
_NO_ACCESS_LOG.disabled = True


class Connections:
    """All open connections of the server; also the factory handed to `loop.create_server`."""

    def __init__(self, server: web.Server, limits: LimitsConfig) -> None:
        self._server = server
        self.limits = limits
        self.open: set[Connection] = set()
        self.per_address: Counter[str] = Counter()
        self._loop = asyncio.get_running_loop()
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)

    def __call__(self) -> Connection:
        return Connection(self, self._server, self._loop)

    def close(self) -> None:
        self._sweeper.cancel()

    def _sweep(self) -> None:
        self._sweeper = self._loop.call_later(SWEEP_S, self._sweep)
        now = self._loop.time()
        for connection in list(self.open):
            if now - connection.head_since > self.limits.header_s:
                connection.refuse("The request headers arrived too slowly.", 408)
            elif now - connection.paused_since > self.limits.send_stall_s:
                # Not close(): that would wait for the client to read what is buffered.
                connection.abort()


class Connection(RequestHandler):
    """`head_since`: when the client began to owe us a request head, `paused_since`: when it stopped
    reading; infinite otherwise. `on_resume` is called when it reads again."""

    def __init__(
        self, all_: Connections, server: web.Server, loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=KEEPALIVE_S,
            access_log=_NO_ACCESS_LOG,
            max_line_size=LINE,
            max_field_size=LINE,
            max_headers=HEADERS,
            auto_decompress=False,
            lingering_time=2.0,
        )
        self._all = all_
        self._address = ""
        self.head_since = NEVER
        self.paused_since = NEVER
        self.on_resume: Callable[[], None] | None = None

    @property
    def paused(self) -> bool:
        return self.paused_since != NEVER

    def pause_writing(self) -> None:
        self.paused_since = self._loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        self.paused_since = NEVER
        super().resume_writing()
        if self.on_resume is not None:
            self.on_resume()

    def abort(self) -> None:
        """A reset, not an orderly end: what the kernel holds for a client that does not read is
        given back at once, and the client notices."""
        if self.transport is not None:
            sock = self.transport.get_extra_info("socket")
            if sock is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        everyone, limits = self._all, self._all.limits
        peer = transport.get_extra_info("peername")
        self._address = str(peer[0]) if peer else ""
        self.head_since = self._loop.time()
        everyone.open.add(self)
        everyone.per_address[self._address] += 1
        if len(everyone.open) > limits.connections:
            self.refuse("The server has too many connections.", 503)
        elif everyone.per_address[self._address] > limits.connections_per_address:
            self.refuse("This address has too many connections.", 429)

    def connection_lost(self, exc: BaseException | None) -> None:
        everyone = self._all
        if self in everyone.open:
            everyone.open.discard(self)
            everyone.per_address[self._address] -= 1
            if not everyone.per_address[self._address]:
                del everyone.per_address[self._address]
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        before = self._request_count
        super().data_received(data)
        if self._request_count > before:
            self.head_since = NEVER
        elif self.head_since == NEVER and self._current_request is None:
            self.head_since = self._loop.time()

    def refuse(self, message: str, status: int) -> None:
        """Answer without a request, and close."""
        transport = self.transport
        if transport is not None and not transport.is_closing():
            body = error_body(message, status)
            headers = {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                "Connection": "close",
                **STATUS_HEADERS.get(status, {}),
            }
            lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has already begun")
        if isinstance(exc, http_exceptions.LineTooLong):
            status, text = 431, "The request line or a header is too long."
        elif status == 400:
            text = "The request is not valid HTTP."
        elif status == 504:
            text = "The request took too long."
        else:
            status, text = 500, "Internal error."
        reply = error_reply(text, status)
        reply.force_close()
        return reply

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        # aiohttp's own refusals (Expect, upgrade) would echo the request.
        if isinstance(resp, web.HTTPException):
            resp = error_reply("The request cannot be served.", resp.status)
        return await super().finish_response(request, resp, start_time)

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Protocol errors are the client's; the middleware logs ours."""
