"""Request bodies: read with a clock running, parsed without trust.

Comes in: an aiohttp request. Goes out: the parsed JSON object, or `InvalidRequest` with 400, 408,
413 or 415. Called by every route that takes a body.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import msgspec
from aiohttp import web

from runtime.errors import InvalidRequest

DEPTH = 64
KEYS_PER_OBJECT = 4096
CONTAINERS = 65_536
STRINGS = 131_072
BODY_RATE = 8 << 10  # bytes per second, once GRACE is over
GRACE_S = 10.0

# The closing quote is optional and the quantifiers possessive: one pass, whatever the bytes are.
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?(\s*+:)?', re.DOTALL)
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def body_limit(context: int) -> int:
    return min((1 << 20) + 16 * context, 64 << 20)


async def read_json(request: web.Request, *, most: int, idle_s: float) -> Any:
    if request.content_type != "application/json":
        raise InvalidRequest("The content type must be application/json.", status=415)
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise InvalidRequest("Compressed bodies are not accepted.", status=415)
    return parse_json(await _read(request, most, idle_s))


async def _read(request: web.Request, most: int, idle_s: float) -> bytes:
    if (request.content_length or 0) > most:
        raise _too_large(most)
    loop = asyncio.get_running_loop()
    start = loop.time()
    chunks: list[bytes] = []
    size = 0
    while not request.content.at_eof():
        allowed = GRACE_S + size / BODY_RATE - (loop.time() - start)
        try:
            async with asyncio.timeout(min(idle_s, allowed)):
                chunk = await request.content.readany()
        except TimeoutError:
            raise InvalidRequest("The body arrived too slowly.", status=408) from None
        except web.RequestPayloadError:
            raise InvalidRequest("The body ended early or is malformed.") from None
        size += len(chunk)
        if size > most:
            raise _too_large(most)
        chunks.append(chunk)
    return b"".join(chunks)


def parse_json(data: bytes) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN, no endless nesting."""
    if data.count(b'"') > 2 * STRINGS:
        raise InvalidRequest(f"The body has more than {STRINGS} strings.")
    strings = list(_STRING.finditer(data))
    _check_nesting(_STRING.sub(b"", data))
    try:
        body = msgspec.json.decode(data)
    except (ValueError, RecursionError, OverflowError):  # msgspec's errors are ValueErrors
        raise InvalidRequest("The body is not valid JSON.") from None
    keys = [match.group() for match in strings if match.group(1)]
    if len(keys) > KEYS_PER_OBJECT or len(set(keys)) != len(keys) or b"\\" in b"".join(keys):
        _check_keys(data)
    return body


def _check_nesting(skeleton: bytes) -> None:
    brackets = skeleton.translate(None, _NOT_BRACKETS)
    if len(brackets) > 2 * CONTAINERS:
        raise InvalidRequest(f"The body has more than {CONTAINERS} arrays and objects.")
    depth = 0
    for bracket in brackets:
        depth += 1 if bracket in b"[{" else -1
        if depth > DEPTH:
            raise InvalidRequest(f"The body is nested deeper than {DEPTH} levels.")


def _check_keys(data: bytes) -> None:
    """The slow, exact check: only for bodies in which two keys look alike somewhere."""

    def unique(pairs: list[tuple[str, Any]]) -> None:
        if len(pairs) > KEYS_PER_OBJECT:
            raise InvalidRequest(f"An object has more than {KEYS_PER_OBJECT} keys.")
        if len({key for key, _ in pairs}) != len(pairs):
            raise InvalidRequest("An object has the same key twice.")

    try:
        json.loads(data, object_pairs_hook=unique)
    except (ValueError, RecursionError):  # already accepted above, so a matter of limits
        raise InvalidRequest("The body is not valid JSON.") from None


def _too_large(most: int) -> InvalidRequest:
    return InvalidRequest(f"The body is larger than {most} bytes.", status=413)
