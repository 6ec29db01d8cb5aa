"""`/encode` and OpenAI's `/v1/embeddings`.

Comes in: texts or token ids. Goes out: their vectors, as numbers or as base64 of float32. A large
answer is written vector by vector, so that other requests are served in between.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterable
from typing import Any, Literal

import msgspec
from aiohttp import web

from runtime.errors import InvalidRequest
from runtime.http.openai import check_model
from runtime.http.openai_schema import IGNORED
from runtime.http.replies import encode
from runtime.http.server import Server
from runtime.text.call import salt
from runtime.text.encode import (
    embedding_of,
    encode_call,
    encoded,
    read_dimensions,
    read_encode,
    vector,
)
from runtime.text.generate import check_count, read_priority, read_rids, split_prompts
from runtime.text.schema import check_unsupported, convert

BREATH = 1 << 15  # numbers written before others have their turn


class EmbeddingsBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    rid: str | list[str] | None = None
    priority: int | None = None
    extra_key: str | None = None
    cache_salt: str | None = None


async def encode_route(server: Server, request: web.Request) -> web.StreamResponse:
    body = await server.read_body(request)
    call, dimensions = read_encode(body, server.model, request["tenant"])
    info = embedding_of(server.model)
    sequences = await server.sequences(call)
    await server.gather(call, sequences)
    answers = (encoded(seq, info, dimensions) for seq in sequences)
    if call.single:
        return _reply(encode(next(answers)))
    return _reply(b"[" + await _joined(answers, info.dim) + b"]")


async def embeddings(server: Server, request: web.Request) -> web.StreamResponse:
    raw = await server.read_body(request)
    info = embedding_of(server.model)
    if not isinstance(raw, dict):
        raise InvalidRequest("The body must be a JSON object.")
    known = {k: v for k, v in raw.items() if k not in IGNORED}
    body = convert(check_unsupported(known, {"lora_path": ("",)}), EmbeddingsBody)
    model = check_model(server, body.model)
    sources, single = split_prompts(body.input, "input")
    count = len(sources)
    check_count(count, server.model, "input")
    dimensions = read_dimensions(body.dimensions, server.model)
    call = encode_call(
        sources,
        rids=read_rids(body.rid, count, single=single),
        priority=read_priority(body.priority),
        salts=[salt(request["tenant"], body.extra_key, body.cache_salt)] * count,
        single=single,
    )
    sequences = await server.sequences(call)
    await server.gather(call, sequences)
    as_text = body.encoding_format == "base64"

    def item(index: int) -> dict[str, Any]:
        found = vector(sequences[index], info, dimensions)
        shown = base64.b64encode(found.tobytes()).decode() if as_text else found.tolist()
        return {"object": "embedding", "index": index, "embedding": shown}

    data = await _joined(map(item, range(count)), info.dim)
    total = sum(len(seq.request.tokens) for seq in sequences)
    rest = {"model": model, "usage": {"prompt_tokens": total, "total_tokens": total}}
    return _reply(b'{"object":"list","data":[' + data + b"]," + encode(rest)[1:])


async def _joined(objects: Iterable[dict[str, Any]], dim: int) -> bytes:
    parts = []
    for n, one in enumerate(objects, 1):
        parts.append(encode(one))
        if n % (BREATH // dim + 1) == 0:
            await asyncio.sleep(0)
    return b",".join(parts)


def _reply(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")
