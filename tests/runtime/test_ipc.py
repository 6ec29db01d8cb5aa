"""Frames: whatever the cuts, messages arrive whole; whatever the bytes, at worst BadFrame."""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
import struct
import threading

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import EngineDead
from runtime.ipc import BadFrame, Channel, EngineProtocol, Framed, Framer
from runtime.request import (
    Abort,
    Control,
    Event,
    Events,
    FromEngine,
    Request,
    SamplingParams,
    ToEngine,
)

MESSAGES = [
    Request(
        id=1, tokens=list(range(300)), sampling=SamplingParams(logit_bias={3: -1.5}), salt=b"x"
    ),
    Abort(id=2),
    Control(id=3, verb="stats"),
]


def frames(messages: list[object]) -> bytes:
    framed = Framed()
    return b"".join(bytes(framed.frame(m)) for m in messages)


def framer(limit: int = 1 << 20) -> Framer:
    return Framer(msgspec.msgpack.Decoder(ToEngine), limit)


@given(cuts=st.lists(st.integers(0, 1500), max_size=12))
def test_messages_arrive_whole_however_the_bytes_are_cut(cuts: list[int]) -> None:
    data = frames(MESSAGES)
    edges = sorted({0, len(data), *(min(c, len(data)) for c in cuts)})
    reader, got = framer(), []
    for a, b in itertools.pairwise(edges):
        got += reader.feed(data[a:b])
    assert got == MESSAGES


def test_too_long_a_frame_is_refused_before_it_is_kept() -> None:
    with pytest.raises(BadFrame, match="at most 100"):
        framer(100).feed(struct.pack("<I", 101))
    with pytest.raises(BadFrame):
        framer().feed(b"\xff\xff\xff\xff")


@settings(max_examples=300)
@given(body=st.binary(max_size=200))
def test_hostile_bodies_are_bad_frames(body: bytes) -> None:
    try:
        messages = framer().feed(struct.pack("<I", len(body)) + body)
    except BadFrame:
        return
    assert all(isinstance(m, ToEngine) for m in messages)


def test_every_flipped_byte_is_a_message_or_a_bad_frame() -> None:
    rng = random.Random(0)
    data = bytearray(frames(MESSAGES))
    for at in range(len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.randrange(8)
        try:
            for message in framer().feed(damaged):
                assert isinstance(message, ToEngine)
        except BadFrame:
            pass


def test_deep_nesting_is_a_bad_frame() -> None:
    body = b"\x91" * 100_000
    with pytest.raises(BadFrame):
        framer().feed(struct.pack("<I", len(body)) + body)


def test_channel_sends_more_than_a_socket_holds_and_sees_the_end() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    big = Events(events=[Event(id=i, tokens=list(range(1000))) for i in range(500)])
    received: list[object] = []

    def read() -> None:
        reader = Framer(msgspec.msgpack.Decoder(FromEngine))
        while not received:
            received.extend(reader.feed(theirs.recv(4096)))

    thread = threading.Thread(target=read)
    thread.start()
    channel.send(big)
    thread.join()
    assert received == [big]
    assert channel.receive(0) == []
    theirs.sendall(frames([Abort(id=5)]))
    assert channel.receive(1.0) == [Abort(id=5)]
    theirs.close()
    with pytest.raises(EOFError):
        channel.receive(1.0)
    with pytest.raises(EOFError):
        for _ in range(3):
            channel.send(big)
    channel.close()


async def test_protocol_hands_messages_over_and_tells_of_the_end_once() -> None:
    ours, theirs = socket.socketpair()
    got: list[object] = []
    lost: list[bool] = []
    protocol = EngineProtocol(got.append, lambda: lost.append(True))
    loop = asyncio.get_running_loop()
    await loop.create_connection(lambda: protocol, sock=ours)
    engine = Channel(theirs)
    protocol.send(MESSAGES[0])
    await asyncio.sleep(0.01)
    assert engine.receive(1.0) == [MESSAGES[0]]
    engine.send(Events(events=[Event(id=1, tokens=[4])]))
    await asyncio.sleep(0.05)
    assert got == [Events(events=[Event(id=1, tokens=[4])])]
    engine.close()
    await asyncio.sleep(0.05)
    assert lost == [True]
    with pytest.raises(EngineDead):
        protocol.send(Abort(id=1))


async def test_protocol_ends_a_connection_that_sends_no_frames() -> None:
    ours, theirs = socket.socketpair()
    lost = asyncio.Event()
    protocol = EngineProtocol(lambda message: None, lost.set)
    await asyncio.get_running_loop().create_connection(lambda: protocol, sock=ours)
    with theirs:
        theirs.sendall(b"\xff" * 64)
        await asyncio.wait_for(lost.wait(), 2.0)
