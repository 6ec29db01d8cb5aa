"""OpenAI's `/v1/completions`, and what it shares with chat: usage, finish reasons, chunk bytes.

Comes in: OpenAI bodies. Goes out: OpenAI objects or chunk streams, over the same `Call` and
`Sequence` as the native route.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from aiohttp import web

from runtime.errors import InvalidRequest
from runtime.http.openai_schema import CommonBody, CompletionBody, read_body, sampling
from runtime.http.replies import encode, json_reply
from runtime.http.server import Server
from runtime.request import MAX_TOP_LOGPROBS
from runtime.text.call import Call, Logprobs, Prompt, salt
from runtime.text.generate import (
    call_name,
    check_count,
    read_rids,
    refuse_embedding,
    split_prompts,
)
from runtime.text.model import TextModel
from runtime.text.schema import show
from runtime.text.sequence import Sequence

COMPLETION_TOKENS = 16  # OpenAI's default


async def completions(server: Server, request: web.Request) -> web.StreamResponse:
    body = read_body(await server.read_body(request), CompletionBody)
    refuse_embedding(server.model)
    model = check_model(server, body.model)
    call = _call(server.model, body, request["tenant"])
    sequences = await server.sequences(call)
    head = Head(f"cmpl-{call.prompts[0].rid}", "text_completion", model)
    echoes = _echoes(server, body, call)
    n = call.prompts[0].sampling.n
    if call.stream:
        return await server.stream(
            request,
            call,
            sequences,
            lambda seq: _CompletionEncoder(server, body, head, seq, echoes[seq.index // n]),
            lambda: head.usage_chunk(sequences, n) if body.include_usage else b"",
        )
    await server.gather(call, sequences)
    choices = [_choice(server, body, seq, echoes[seq.index // n]) for seq in sequences]
    return json_reply(head.object(choices=choices, usage=usage(sequences, n)))


class Head:
    """The fields every object of one answer begins with."""

    def __init__(self, id_: str, kind: str, model: str) -> None:
        self._fields = {"id": id_, "object": kind, "created": int(time.time()), "model": model}
        self.open = b"data: " + encode(self._fields)[:-1]

    def object(self, **more: Any) -> dict[str, Any]:
        return self._fields | more

    def usage_chunk(self, sequences: list[Sequence], n: int) -> bytes:
        return self.open + b',"choices":[],"usage":%b}\n\n' % encode(usage(sequences, n))


def usage(sequences: Iterable[Sequence], n: int) -> dict[str, Any]:
    """Prompts count once, whatever their n."""
    seqs = list(sequences)
    prompt = sum(len(seq.request.tokens) for seq in seqs[::n])
    completion = sum(len(seq.ids) for seq in seqs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(seq.cached_tokens for seq in seqs[::n])},
    }


def finish(seq: Sequence) -> tuple[str, int | str | None]:
    assert seq.finish is not None
    return seq.finish["type"], seq.finish.get("matched")


def usage_suffix(body: CommonBody, seq: Sequence) -> bytes:
    """The usage field of a chunk that is not the last: OpenAI sends null when usage was asked
    for.
    """
    if body.continuous_usage:
        return b',"usage":' + encode(usage([seq], 1))
    return b',"usage":null' if body.include_usage else b""


def check_model(server: Server, wanted: str | None) -> str:
    name = server.model.name
    if wanted not in (None, "", "default", name):
        raise InvalidRequest(
            f"The model {show(wanted)} does not exist; this server has {name}.",
            param="model",
            status=404,
        )
    return name


async def models(server: Server, request: web.Request) -> web.StreamResponse:
    return json_reply({"object": "list", "data": [_model_card(server)]})


async def one_model(server: Server, request: web.Request) -> web.StreamResponse:
    if request.match_info["id"] == server.model.name:
        return json_reply(_model_card(server))
    error = {
        "message": f"The model {show(request.match_info['id'])} does not exist.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    return json_reply({"error": error}, status=404)


def _model_card(server: Server) -> dict[str, Any]:
    return {
        "id": server.model.name,
        "object": "model",
        "created": int(server.metrics.started),
        "owned_by": "headstart",
        "root": server.model.name,
        "parent": None,
        "max_model_len": server.model.context,
    }


def _call(model: TextModel, body: CompletionBody, tenant: bytes) -> Call:
    limits = model.limits
    sources, _ = split_prompts(body.prompt, "prompt")
    check_count(len(sources), model, "prompt")
    most = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    drawn = sampling(body, most=most, defaults={}, vocab=model.vocab, limits=limits)
    top = body.logprobs
    if top is not None and not 0 <= top <= MAX_TOP_LOGPROBS:
        raise InvalidRequest(
            f"logprobs must be in [0, {MAX_TOP_LOGPROBS}], got {show(top)}.", param="logprobs"
        )
    wanted = Logprobs(
        wanted=top is not None, start=0 if body.echo and top is not None else -1, top=top or 0
    )
    rids = read_rids(body.rid, len(sources), single=len(sources) == 1)
    prompts = [
        Prompt(
            source=source,
            rid=rid,
            sampling=drawn,
            logprobs=wanted,
            priority=body.priority or 0,
            salt=salt(tenant, body.extra_key, body.cache_salt),
        )
        for source, rid in zip(sources, rids, strict=True)
    ]
    name = call_name(body.rid)
    return Call(prompts=prompts, single=False, stream=bool(body.stream), name=name)


def _echoes(server: Server, body: CompletionBody, call: Call) -> list[str]:
    """Per prompt, the text that precedes the completion."""
    tokenizer = server.model.tokenizer
    if not body.echo or tokenizer is None:
        return [""] * len(call.prompts)
    return [
        p.source if isinstance(p.source, str) else tokenizer.decode(p.source) for p in call.prompts
    ]


def _choice(server: Server, body: CompletionBody, seq: Sequence, echo: str) -> dict[str, Any]:
    reason, matched = finish(seq)
    return {
        "index": seq.index,
        "text": echo + seq.text,
        "logprobs": _logprobs(server, seq, 0, "", bool(body.echo))
        if seq.request.logprobs
        else None,
        "finish_reason": reason,
        "matched_stop": matched,
    }


def _logprobs(server: Server, seq: Sequence, start: int, before: str, echo: bool) -> dict[str, Any]:
    """From output token `start` on; `before` is the text already told, for the offsets."""
    tokenizer = server.model.tokenizer
    text = tokenizer.token_text if tokenizer else str
    ids = seq.ids[start:]
    logprobs: list[float | None] = list(seq.logprobs[start:])
    top = list(seq.top[start:])
    if echo and start == 0:
        ids = seq.request.tokens + ids
        logprobs = seq.prompt_logprobs + logprobs
        top = [t or [] for t in seq.prompt_top] + top
    tokens = [text(i) for i in ids]
    offsets, offset = [], len(before)
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {
        "text_offset": offsets,
        "token_logprobs": logprobs,
        "tokens": tokens,
        "top_logprobs": [{text(i): p for p, i in pairs} for pairs in top]
        if seq.request.top_logprobs
        else None,
    }


class _CompletionEncoder:
    __slots__ = ("_before", "_body", "_close", "_echo", "_open", "_server", "_tokens", "_told")

    def __init__(
        self, server: Server, body: CompletionBody, head: Head, seq: Sequence, echo: str
    ) -> None:
        self._server = server
        self._body = body
        self._echo = echo
        self._before = echo
        self._told = 0  # characters
        self._tokens = 0
        self._open = head.open + b',"choices":[{"index":%d,"text":' % seq.index
        self._close = b',"logprobs":null,"finish_reason":null,"matched_stop":null}]'

    def chunk(self, seq: Sequence, final: bool) -> bytes | None:
        text = seq.text[self._told :]
        if not text and not final:
            return None
        if self._echo:
            text, self._echo = self._echo + text, ""
        close = self._close if not final and not seq.request.logprobs else self._ending(seq, final)
        self._told = len(seq.text)
        return b"".join((self._open, encode(text), close, usage_suffix(self._body, seq), b"}\n\n"))

    def _ending(self, seq: Sequence, final: bool) -> bytes:
        logprobs = None
        if seq.request.logprobs:
            # The first chunk begins with the tokens of the prompt.
            told = self._before + seq.text[: self._told] if self._tokens else ""
            logprobs = _logprobs(self._server, seq, self._tokens, told, bool(self._body.echo))
            self._tokens = len(seq.ids)
        reason, matched = finish(seq) if final else (None, None)
        fields = {"logprobs": logprobs, "finish_reason": reason, "matched_stop": matched}
        return b"," + encode(fields)[1:] + b"]"
