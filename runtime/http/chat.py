"""OpenAI's `/v1/chat/completions`.

Comes in: messages. Goes out: chat completion objects or chunk streams. The template runs in its own
process (render.py); spellings of control tokens inside messages stay text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from aiohttp import web

from runtime.errors import InvalidRequest
from runtime.http.openai import Head, check_model, finish, usage, usage_suffix
from runtime.http.openai_schema import ChatBody, Message, read_body, sampling
from runtime.http.replies import encode, json_reply
from runtime.http.server import INLINE, Server
from runtime.request import MAX_TOP_LOGPROBS
from runtime.text.call import Call, Logprobs, Prompt, salt
from runtime.text.chat import KWARGS
from runtime.text.generate import read_rids, refuse_embedding
from runtime.text.model import prompt_too_long
from runtime.text.sampling import Sampling
from runtime.text.schema import convert, show
from runtime.text.sequence import Sequence

TOOLS = 128


async def chat_completions(server: Server, request: web.Request) -> web.StreamResponse:
    body = read_body(await server.read_body(request), ChatBody)
    refuse_embedding(server.model)
    model = check_model(server, body.model)
    drawn, wanted = _sampling(server, body), _wanted(body)
    rid = read_rids(body.rid, 1, single=True)[0]
    call = Call(
        prompts=[
            Prompt(
                source=await chat_ids(server, body),
                rid=rid,
                sampling=drawn,
                logprobs=wanted,
                priority=body.priority or 0,
                salt=salt(request["tenant"], body.extra_key, body.cache_salt),
            )
        ],
        single=False,
        stream=bool(body.stream),
    )
    sequences = await server.sequences(call)
    if call.stream:
        head = Head(f"chatcmpl-{rid}", "chat.completion.chunk", model)
        return await server.stream(
            request,
            call,
            sequences,
            lambda seq: _ChatEncoder(server, body, head, seq),
            lambda: head.usage_chunk(sequences, drawn.n) if body.include_usage else b"",
        )
    await server.gather(call, sequences)
    head = Head(f"chatcmpl-{rid}", "chat.completion", model)
    choices = [_choice(server, seq) for seq in sequences]
    return json_reply(head.object(choices=choices, usage=usage(sequences, drawn.n)))


async def chat_ids(server: Server, body: ChatBody) -> list[int]:
    """The prompt's token ids, rendered in the template process and tokenized off the loop when
    long.
    """
    tokenizer, renderer = server.model.tokenizer, server.renderer
    if tokenizer is None or renderer is None:
        raise InvalidRequest(
            "This model has no chat template; use /v1/completions or /generate.", param="messages"
        )
    limit = server.config.limits.messages
    if not 0 < len(body.messages) <= limit:
        raise InvalidRequest(
            f"messages must hold 1 to {limit} messages, got {len(body.messages)}.", param="messages"
        )
    messages = [_message(message, i) for i, message in enumerate(body.messages)]
    if body.tools is not None and len(body.tools) > TOOLS:
        raise InvalidRequest(f"at most {TOOLS} tools are allowed, got {len(body.tools)}")
    if body.tools and not renderer.knows_tools:
        raise InvalidRequest(
            "This model's chat template has no place for tools; leave tools out.", param="tools"
        )
    kwargs = dict(body.chat_template_kwargs or {})
    for name in kwargs.keys() - KWARGS:
        raise InvalidRequest(
            f"Unknown parameter: chat_template_kwargs.{show(name)}.", param="chat_template_kwargs"
        )
    if body.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", body.reasoning_effort)
    given = [messages, body.tools, kwargs]
    texts = list(_strings(given))
    if sum(map(len, texts)) <= INLINE:
        guard = tokenizer.guard(texts)
    else:
        guard = await asyncio.to_thread(tokenizer.guard, texts)
    marked = _map_strings(given, lambda text: tokenizer.marked(text, guard)) if guard.hit else given
    prompt = await renderer.render(
        {
            "messages": marked[0],
            "tools": marked[1] or None,
            "kwargs": marked[2],
            "add_generation_prompt": body.add_generation_prompt is not False,
            "continue_final_message": bool(body.continue_final_message),
        },
        size=sum(map(len, texts)),
    )
    if prompt_too_long(prompt, server.model):
        raise InvalidRequest(
            f"The messages ({len(prompt)} characters) are longer than the model's context length "
            f"({server.model.context} tokens).",
            param="messages",
        )
    if len(prompt) <= INLINE and not guard.hit:  # the first hit makes a second backend
        return tokenizer.encode_chat(prompt, guard)
    return await asyncio.to_thread(tokenizer.encode_chat, prompt, guard)


def _message(raw: dict[str, Any], index: int) -> dict[str, Any]:
    """As templates want it: content is one text, arguments of tool calls are objects."""
    where = f"messages[{index}]"
    message = convert(raw, Message, where)
    out = raw | {"content": message.content or ""}
    if isinstance(message.content, list):
        out["content"] = " ".join(_part(part, where) for part in message.content)
    if isinstance(raw.get("tool_calls"), list):
        out["tool_calls"] = [_tool_call(call) for call in raw["tool_calls"]]
    return out


def _part(part: dict[str, Any], where: str) -> str:
    text = part.get("text")
    if part.get("type") != "text" or not isinstance(text, str):
        raise InvalidRequest(
            f"{where}.content may only hold text parts; this model takes no media.",
            param="messages",
        )
    return text


def _tool_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        return call | {
            "function": function | {"arguments": msgspec.json.decode(function["arguments"])}
        }
    except (ValueError, RecursionError):
        return call  # not JSON: the template gets the text the model once wrote


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        # Not the fields' own names; what a client names itself (tool parameters) can hold a
        # spelling too.
        return {change(key): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_strings(item, change) for item in value]
    return value


def _sampling(server: Server, body: ChatBody) -> Sampling:
    most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    return sampling(
        body,
        most=most,
        defaults=server.defaults,
        vocab=server.model.vocab,
        limits=server.model.limits,
    )


def _wanted(body: ChatBody) -> Logprobs:
    top = body.top_logprobs or 0
    if not 0 <= top <= MAX_TOP_LOGPROBS:
        raise InvalidRequest(
            f"top_logprobs must be in [0, {MAX_TOP_LOGPROBS}], got {show(top)}.",
            param="top_logprobs",
        )
    if top and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true.", param="top_logprobs")
    return Logprobs(wanted=bool(body.logprobs), top=top)


def _choice(server: Server, seq: Sequence) -> dict[str, Any]:
    reason, matched = finish(seq)
    return {
        "index": seq.index,
        "message": {
            "role": "assistant",
            "content": seq.text,
            "reasoning_content": None,
            "tool_calls": None,
        },
        "logprobs": _logprobs(server, seq, 0) if seq.request.logprobs else None,
        "finish_reason": reason,
        "matched_stop": matched,
    }


def _logprobs(server: Server, seq: Sequence, start: int) -> dict[str, Any]:
    """From output token `start` on."""
    tops = seq.top[start:] if seq.request.top_logprobs else [[]] * (len(seq.ids) - start)
    content = [
        _token(server, token, logprob) | {"top_logprobs": [_token(server, i, p) for p, i in top]}
        for token, logprob, top in zip(seq.ids[start:], seq.logprobs[start:], tops, strict=False)
    ]
    return {"content": content, "refusal": None}


def _token(server: Server, token: int, logprob: float) -> dict[str, Any]:
    tokenizer, detokenizers = server.model.tokenizer, server.model.detokenizers
    if tokenizer is None or detokenizers is None:
        return {"token": "", "logprob": logprob, "bytes": None}
    text, data = tokenizer.token_text(token), detokenizers.token_bytes(token)
    return {"token": text, "logprob": logprob, "bytes": list(data)}


class _ChatEncoder:
    """The first chunk carries the role, as OpenAI's does."""

    __slots__ = ("_body", "_close", "_first", "_open", "_server", "_tokens", "_told")

    def __init__(self, server: Server, body: ChatBody, head: Head, seq: Sequence) -> None:
        self._server = server
        self._body = body
        self._told = 0  # characters
        self._tokens = 0
        self._open = head.open + b',"choices":[{"index":%d,"delta":{"content":' % seq.index
        self._close = b'},"logprobs":null,"finish_reason":null,"matched_stop":null}]'
        self._first = b"".join(
            (
                head.open,
                b',"choices":[{"index":%d,"delta":{"role":"assistant","content":""' % seq.index,
                self._close,
                usage_suffix(body, seq),
                b"}\n\n",
            )
        )

    def chunk(self, seq: Sequence, final: bool) -> bytes | None:
        first, self._first = self._first, b""
        text = seq.text[self._told :]
        if not text and not final:
            return first or None
        self._told = len(seq.text)
        close = self._close if not final and not seq.request.logprobs else self._ending(seq, final)
        suffix = usage_suffix(self._body, seq)
        return b"".join((first, self._open, encode(text), close, suffix, b"}\n\n"))

    def _ending(self, seq: Sequence, final: bool) -> bytes:
        logprobs = None
        if seq.request.logprobs:
            logprobs = _logprobs(self._server, seq, self._tokens)
            self._tokens = len(seq.ids)
        reason, matched = finish(seq) if final else (None, None)
        fields = {"logprobs": logprobs, "finish_reason": reason, "matched_stop": matched}
        return b"}," + encode(fields)[1:] + b"]"
