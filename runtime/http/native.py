"""SGLang's native routes: `/generate` and the controls around it.

The request and response objects are those of runtime/text/generate.py; this file adds streaming
bytes, which are pre-built for the common case and equal to the encoded object in every case.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import msgspec
from aiohttp import web

from runtime.errors import EngineDead, InvalidRequest
from runtime.http.replies import encode, json_reply
from runtime.http.server import Server
from runtime.request import Ready
from runtime.text.encode import read_encode
from runtime.text.generate import read_generate
from runtime.text.schema import convert, show
from runtime.text.sequence import Sequence

FLUSH_POLL_S = 0.05


async def generate(server: Server, request: web.Request) -> web.StreamResponse:
    body = await server.read_body(request)
    call = read_generate(body, server.model, request["tenant"])
    sequences = await server.sequences(call)
    if call.stream:
        delta = server.config.incremental_stream
        many = not call.single
        return await server.stream(request, call, sequences, lambda seq: _encoder(seq, delta, many))
    await server.gather(call, sequences)
    answers = [seq.response() for seq in sequences]
    return json_reply(answers[0] if call.single else answers)


class AbortBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    rid: str | None = None
    abort_all: bool | None = None


async def abort_request(server: Server, request: web.Request) -> web.StreamResponse:
    body = await server.read_body(request)
    wanted = convert(body, AbortBody)
    if wanted.abort_all:
        server.abort(None)
    elif wanted.rid:
        server.abort(wanted.rid)
    return web.Response()


async def flush_cache(server: Server, request: web.Request) -> web.StreamResponse:
    """`?timeout=`: seconds to wait for the running requests, 0 by default."""
    patience = _seconds(request.query.get("timeout", "0"), server.config.limits.request_s)
    deadline = time.monotonic() + patience
    while not (await server.link.control("flush_cache")).ok:
        if time.monotonic() >= deadline:
            raise InvalidRequest("Cache not flushed: requests are running or waiting.")
        await asyncio.sleep(FLUSH_POLL_S)
    return web.Response(text="Cache flushed.\n")


def _seconds(given: str, most: float) -> float:
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds <= most:
        raise InvalidRequest(
            f"timeout must be a number of seconds in [0, {most:g}], got {show(given)}.",
            param="timeout",
        )
    return seconds


async def model_info(server: Server, request: web.Request) -> web.StreamResponse:
    return json_reply(server.info["model"])


async def server_info(server: Server, request: web.Request) -> web.StreamResponse:
    link = server.link
    states = {
        "up": link.up,
        "restarts": link.restarts,
        "stats": link.stats,
        "capacity": link.capacity,
        "in_flight": link.in_flight,
    }
    return json_reply(
        {**server.info["server"], **_resolved(link.capacity), "internal_states": [states]}
    )


def _resolved(capacity: Ready | None) -> dict[str, Any]:
    """What the engine made of options that leave it the choice; nothing before it is ready."""
    if capacity is None:
        return {}
    tokens = capacity.pages * capacity.page_size
    return {
        "kv_tokens": tokens,
        "max_total_num_tokens": tokens,
        "max_running": capacity.max_seqs,
        "max_step_tokens": capacity.max_step_tokens,
        "max_waiting": capacity.waiting_requests,
        "startup_time": capacity.phases.get("ready"),
    }


async def health(server: Server, request: web.Request) -> web.StreamResponse:
    """By the engine's heartbeat: never by a generation, which would be one more thing to go
    wrong.
    """
    if not server.accepting or server.link.stalled():
        raise EngineDead("Draining." if server.draining else "The engine is not ready.")
    return web.Response()


async def health_generate(server: Server, request: web.Request) -> web.StreamResponse:
    probe = {
        "input_ids": [0],
        "sampling_params": {"max_new_tokens": 1, "temperature": 0, "ignore_eos": True},
    }
    if server.model.embedding is None:
        call = read_generate(probe, server.model)
    else:
        call, _ = read_encode({"input_ids": [0]}, server.model)
    await server.gather(call, await server.sequences(call))
    return web.Response()


class _ObjectEncoder:
    """Any stream: the whole response object, encoded anew for every message."""

    def __init__(self, seq: Sequence, delta: bool, many: bool) -> None:
        self._delta = delta
        self._many = many
        self._text = 0
        self._ids = 0

    def chunk(self, seq: Sequence, final: bool) -> bytes | None:
        if seq.holding and not final:
            return None
        message = seq.response()
        if self._many:
            message["index"] = seq.index
        if self._delta:
            if "text" in message:
                message["text"] = seq.text[self._text :]
            message["output_ids"] = seq.ids[self._ids :]
            meta = message["meta_info"]
            if self._ids and "input_token_logprobs" in meta:
                meta["input_token_logprobs"] = meta["input_top_logprobs"] = []
            for key in ("output_token_logprobs", "output_top_logprobs"):
                if key in meta:
                    meta[key] = meta[key][self._ids :]
            self._text, self._ids = len(seq.text), len(seq.ids)
        return b"data: " + encode(message) + b"\n\n"


class _TextEncoder:
    """The common stream (no log-probabilities): escaped text and ids grow by what is new; only the
    counters around them are written anew."""

    __slots__ = (
        "_delta",
        "_escaped",
        "_ids",
        "_ids_told",
        "_last",
        "_middle",
        "_tail",
        "_text_told",
    )

    def __init__(self, seq: Sequence, delta: bool, many: bool) -> None:
        self._delta = delta
        self._escaped = b""
        self._ids = b""
        self._text_told = 0
        self._ids_told = 0
        self._middle = (
            b'],"meta_info":{"id":%b,"finish_reason":null,"prompt_tokens":%d,"weight_version":"default",'
            b'"num_retractions":%%d,"completion_tokens":%%d,"cached_tokens":%%d,"reasoning_tokens":0}'
            % (encode(seq.rid).replace(b"%", b"%%"), len(seq.request.tokens))
        )
        self._tail = b',"index":%d}\n\n' % seq.index if many else b"}\n\n"
        self._last = _ObjectEncoder(seq, delta, many)

    def chunk(self, seq: Sequence, final: bool) -> bytes | None:
        if final:
            self._last._text, self._last._ids = self._text_told, self._ids_told
            return self._last.chunk(seq, True)
        if seq.holding:
            return None
        count = len(seq.ids)
        new_ids = b",".join(b"%d" % i for i in seq.ids[self._ids_told :])
        new_text = encode(seq.text[self._text_told :])[1:-1]
        self._text_told, self._ids_told = len(seq.text), count
        if self._delta:
            text, ids = new_text, new_ids
        else:
            text = self._escaped = self._escaped + new_text
            ids = self._ids = self._ids + b"," + new_ids if self._ids else new_ids
        counts = self._middle % (seq.retractions, count, seq.cached_tokens)
        return b"".join((b'data: {"text":"', text, b'","output_ids":[', ids, counts, self._tail))


def _encoder(seq: Sequence, delta: bool, many: bool) -> _ObjectEncoder | _TextEncoder:
    plain = seq.has_text and not seq.request.logprobs and not seq.show_prompt_ids
    return (_TextEncoder if plain else _ObjectEncoder)(seq, delta, many)
