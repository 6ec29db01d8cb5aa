"""The HTTP process's side of the engine socket: length-prefixed msgpack frames over asyncio.

Comes in: bytes. Goes out: decoded messages to `receive`, end of file to `lost`. Used by link.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from runtime.request import FromEngine, ToEngine

_decode = msgspec.msgpack.Decoder(FromEngine).decode
_encode = msgspec.msgpack.Encoder().encode


class EngineProtocol(asyncio.Protocol):
    def __init__(
        self, receive: Callable[[FromEngine], None], lost: Callable[[], None]
    ) -> None:
        self._receive = receive
        self._lost = lost
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        start = 0
        while len(buffer) - start >= 4:
            end = start + 4 + int.from_bytes(buffer[start : start + 4], "little")
            if len(buffer) < end:
                break
            self._receive(_decode(memoryview(buffer)[start + 4 : end]))
            start = end
        if start:
            del buffer[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._lost()

    def send(self, message: ToEngine) -> None:
        if self._transport is not None:
            body = _encode(message)
            self._transport.write(len(body).to_bytes(4, "little") + body)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
