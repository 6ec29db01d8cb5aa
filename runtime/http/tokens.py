"""`/tokenize` and `/detokenize`: prompts and chats to token ids, and ids to text.

Comes in: a prompt, or messages as the chat route takes them. Goes out: exactly the ids that route
would use.
"""

from __future__ import annotations

import asyncio

import msgspec
from aiohttp import web

from runtime.errors import InvalidRequest
from runtime.http.chat import chat_ids
from runtime.http.openai_schema import ChatBody, read_body
from runtime.http.replies import json_reply
from runtime.http.server import Server
from runtime.text.model import check_ids
from runtime.text.schema import convert


async def tokenize_text(server: Server, request: web.Request) -> web.StreamResponse:
    body = await server.read_body(request)
    if isinstance(body, dict) and "messages" in body:
        chat = read_body(body, ChatBody)
        ids = await chat_ids(server, chat)
    else:
        plain = convert(body, TokenizeBody)
        tokenizer = server.model.tokenizer
        if tokenizer is None:
            raise InvalidRequest("This model has no tokenizer.", param="prompt")
        special = plain.add_special_tokens is not False
        ids = await asyncio.to_thread(tokenizer.encode, plain.prompt, add_special_tokens=special)
    return json_reply({"tokens": ids, "count": len(ids), "max_model_len": server.model.context})


async def detokenize(server: Server, request: web.Request) -> web.StreamResponse:
    body = convert(await server.read_body(request), DetokenizeBody)
    tokenizer = server.model.tokenizer
    if tokenizer is None:
        raise InvalidRequest("This model has no tokenizer.", param="tokens")
    if body.tokens:
        check_ids(body.tokens, server.model.vocab, "tokens")
    skip = body.skip_special_tokens is not False
    return json_reply({"text": tokenizer.decode(body.tokens, skip_special_tokens=skip)})


class TokenizeBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    prompt: str
    model: str | None = None
    add_special_tokens: bool | None = None


class DetokenizeBody(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    tokens: list[int]
    model: str | None = None
    skip_special_tokens: bool | None = None
