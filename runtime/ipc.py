"""Frames between the HTTP process and the engine process, over one inherited socket pair.

A frame is a little-endian u32 length and a msgpack map with a type tag (runtime/request.py).
`Channel` is the engine's end (plain socket, poll), `EngineProtocol` the HTTP process's (an asyncio
protocol, without importing asyncio here: the worker's start is measured). A frame that is too long
or does not decode ends the connection: the peers are one release.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from runtime.errors import EngineDead
from runtime.request import FromEngine, ToEngine

if TYPE_CHECKING:
    import asyncio

MAX_FRAME = 64 << 20
MAX_UNSENT = 256 << 20  # towards an engine that does not read
READ = 1 << 20
_LENGTH = struct.Struct("<I")

M = TypeVar("M")


class BadFrame(Exception):
    """The peer sent something that is no frame."""


class Framer(Generic[M]):
    """Bytes in, messages out. Holds at most one incomplete frame."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[M], limit: int = MAX_FRAME) -> None:
        self._decoder = decoder
        self._limit = limit
        self._rest = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> list[M]:
        if self._rest:
            self._rest += data
            data = self._rest
        messages: list[M] = []
        at, size = 0, len(data)
        with memoryview(data) as view:
            while size - at >= 4:
                (length,) = _LENGTH.unpack_from(view, at)
                if length > self._limit:
                    raise BadFrame(f"a frame of {length} bytes, at most {self._limit} are allowed")
                end = at + 4 + length
                if end > size:
                    break
                try:
                    messages.append(self._decoder.decode(view[at + 4 : end]))
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                    raise BadFrame(
                        f"a frame that does not decode: {type(error).__name__}"
                    ) from error
                at = end
            rest = bytearray(view[at:])
        self._rest = rest
        return messages


class Framed:
    """Encodes messages into frames, reusing one buffer."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer = bytearray()

    def frame(self, message: object) -> bytearray:
        """Valid until the next call."""
        self._encoder.encode_into(message, self._buffer, 4)
        _LENGTH.pack_into(self._buffer, 0, len(self._buffer) - 4)
        return self._buffer


class Channel:
    """The engine's end. `receive` waits at most `timeout`; `send` blocks when the reader is slow,
    which holds back the engine.
    """

    def __init__(self, sock: socket.socket, incoming: Any = ToEngine) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._framer: Framer[Any] = Framer(msgspec.msgpack.Decoder(incoming))
        self._framed = Framed()
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(sock, select.POLLOUT)

    def receive(self, timeout: float) -> list[Any]:
        """Messages that have come; EOFError when the peer is gone."""
        if not self._readable.poll(timeout * 1e3):
            return []
        messages: list[Any] = []
        while True:
            try:
                data = self._sock.recv(READ)
            except BlockingIOError:
                return messages
            except ConnectionError as error:
                raise EOFError from error
            if not data:
                raise EOFError
            messages += self._framer.feed(data)
            if len(data) < READ:
                return messages

    def send(self, message: object) -> None:
        view = memoryview(self._framed.frame(message))
        try:
            while view:
                try:
                    view = view[self._sock.send(view) :]
                except BlockingIOError:
                    self._writable.poll()
        except ConnectionError as error:
            raise EOFError from error
        finally:
            view.release()

    def close(self) -> None:
        self._sock.close()


class EngineProtocol:
    """The HTTP process's end, to be given to `loop.create_connection`. `receive` gets every
    message, `lost` is called once when the engine is gone, whoever closed the connection.
    """

    def __init__(
        self,
        receive: Callable[[FromEngine], None],
        lost: Callable[[], None],
    ) -> None:
        self._receive = receive
        self._lost = lost
        self._framer: Framer[FromEngine] = Framer(msgspec.msgpack.Decoder(FromEngine))
        self._framed = Framed()
        self._transport: asyncio.Transport | None = None

    def send(self, message: ToEngine) -> None:
        transport = self._transport
        if transport is None or transport.is_closing():
            raise EngineDead("The engine is not running; try again.")
        if transport.get_write_buffer_size() > MAX_UNSENT:
            raise EngineDead("The engine does not take requests; try again.")
        transport.write(bytes(self._framed.frame(message)))

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    # asyncio calls these

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        try:
            messages = self._framer.feed(data)
        except BadFrame:
            if self._transport is not None:
                self._transport.abort()  # `lost` follows
            return
        for message in messages:
            self._receive(message)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._lost()

    def pause_writing(self) -> None:
        """Nothing waits for the engine to read: MAX_UNSENT bounds what is kept."""

    def resume_writing(self) -> None:
        """See pause_writing."""
