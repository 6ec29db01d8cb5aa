"""One streaming request to a server, as a `Timeline`: native `/generate`, OpenAI completions and
chat.

Built to cost little: bytes are split at message ends and decoded by typed msgspec decoders that
skip what is not measured. Whatever goes wrong becomes `Timeline.error`, one short reason; nothing
is raised. Called by `bench.serving` and `bench.streaming`.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from bench.metrics import Timeline
from bench.workload import Prompt

PATHS = {"native": "/generate", "openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}
REASON_CHARACTERS = 160


class FinishReason(msgspec.Struct):
    type: str = ""
    message: str | None = None


class MetaInfo(msgspec.Struct):
    completion_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None


class NativeMessage(msgspec.Struct):
    meta_info: MetaInfo | None = None
    error: Any = None


class NativeText(msgspec.Struct):
    text: str = ""


class TokenDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = None
    prompt_tokens_details: TokenDetails | None = None


class Content(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class Choice(msgspec.Struct):
    text: str | None = None
    delta: Content | None = None
    message: Content | None = None


class OpenAIMessage(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


NATIVE = msgspec.json.Decoder(NativeMessage)
NATIVE_TEXT = msgspec.json.Decoder(NativeText)
OPENAI = msgspec.json.Decoder(OpenAIMessage)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where and how to ask. `extra` is merged into every body last."""

    url: str
    backend: str
    model: str | None = None
    stream: bool = True
    ignore_eos: bool = True
    temperature: float = 0.0
    top_p: float = 1.0
    headers: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def endpoint(self) -> str:
        return self.url.rstrip("/") + PATHS[self.backend]

    def body(self, prompt: Prompt) -> bytes:
        return msgspec.json.encode(self._body(prompt) | self.extra)

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        content = prompt.text if prompt.text is not None else list(prompt.tokens or ())
        if self.backend == "native":
            return {
                "text" if prompt.text is not None else "input_ids": content,
                "sampling_params": {
                    "temperature": self.temperature,
                    "top_p": self.top_p,
                    "max_new_tokens": prompt.output_len,
                    "ignore_eos": self.ignore_eos,
                },
                "stream": self.stream,
            }
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": prompt.output_len,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": self.stream,
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.stream:
            body["stream_options"] = {"include_usage": True}
        if self.backend == "openai":
            return body | {"prompt": content}
        if prompt.text is None:
            raise ValueError("the chat backend takes text prompts")
        return body | {"messages": [{"role": "user", "content": content}]}


class _Reader:
    """Applies the messages of one response to a timeline."""

    def __init__(self, timeline: Timeline, backend: str) -> None:
        self.timeline = timeline
        self.apply = self._native if backend == "native" else self._openai
        self.texts: list[str] = []
        self.last = b""

    def _native(self, message: bytes, now: float) -> None:
        decoded = NATIVE.decode(message)
        if decoded.error is not None:
            raise _Refused(_message_of(decoded.error))
        if decoded.meta_info is None:
            raise _Refused("message without meta_info")
        meta, timeline = decoded.meta_info, self.timeline
        new = meta.completion_tokens - timeline.output_tokens
        if new > 0:
            timeline.arrivals.append((now, new))
            timeline.output_tokens = meta.completion_tokens
        timeline.prompt_tokens, timeline.cached_tokens = meta.prompt_tokens, meta.cached_tokens
        if meta.finish_reason is not None and meta.finish_reason.type == "abort":
            raise _Refused(f"aborted: {meta.finish_reason.message}")
        self.last = message

    def _openai(self, message: bytes, now: float) -> None:
        decoded = OPENAI.decode(message)
        if decoded.error is not None:
            raise _Refused(_message_of(decoded.error))
        timeline = self.timeline
        for choice in decoded.choices:
            part = choice.delta or choice.message
            text = choice.text or (part and (part.content or part.reasoning_content)) or ""
            if text:
                timeline.arrivals.append((now, 1))
                self.texts.append(text)
        if (usage := decoded.usage) is not None and usage.completion_tokens is not None:
            timeline.output_tokens = usage.completion_tokens
            timeline.prompt_tokens = usage.prompt_tokens
            if usage.prompt_tokens_details is not None:
                timeline.cached_tokens = usage.prompt_tokens_details.cached_tokens or 0

    def finish(self) -> None:
        timeline = self.timeline
        if self.last:
            timeline.text = NATIVE_TEXT.decode(self.last).text
            return
        timeline.text = "".join(self.texts)
        count = len(timeline.arrivals)
        total = timeline.output_tokens = timeline.output_tokens or count
        if count == 0 and total:
            timeline.arrivals = [(timeline.ended, total)]  # tokens without visible text
        elif count and total != count:
            # Messages of several tokens: the usage tells how many in all, so each gets an equal
            # part.
            timeline.arrivals = [
                (when, total * (i + 1) // count - total * i // count)
                for i, (when, _) in enumerate(timeline.arrivals)
            ]


class _Refused(Exception):
    """The server answered, with an error."""


async def messages(content: aiohttp.StreamReader) -> AsyncIterator[tuple[bytes, float]]:
    """(payload, arrival time) of every server-sent event; all events of one read share its time."""
    pending = b""
    async for data in content.iter_any():
        now = time.perf_counter()
        pending += data
        if b"\n\n" not in pending and b"\r\n\r\n" not in pending:
            continue
        *complete, pending = pending.replace(b"\r\n", b"\n").split(b"\n\n")
        for event in complete:
            if event.startswith(b"data:"):
                yield event[5:].strip(), now


async def ask(session: aiohttp.ClientSession, target: Target, body: bytes) -> Timeline:
    """Sends one request and reads the answer to its end."""
    timeline = Timeline(sent=time.perf_counter())
    reader = _Reader(timeline, target.backend)
    headers = {"Content-Type": "application/json", **target.headers}
    try:
        async with session.post(target.endpoint, data=body, headers=headers) as response:
            if response.status != 200:
                raise _Refused(f"HTTP {response.status}: {_message_of(await response.read())}")
            done = not target.stream
            if target.stream:
                async for message, now in messages(response.content):
                    if message == b"[DONE]":
                        done = True
                    else:
                        reader.apply(message, now)
            else:
                reader.apply(await response.read(), time.perf_counter())
        timeline.ended = time.perf_counter()
        reader.finish()
        if not done:
            raise _Refused("the stream ended without [DONE]")
        if timeline.output_tokens == 0:
            raise _Refused("no tokens generated")
    except _Refused as e:
        timeline.error = str(e)[:REASON_CHARACTERS]
    except TimeoutError:
        timeline.error = "request timeout"
    except (aiohttp.ClientError, OSError) as e:
        timeline.error = f"{type(e).__name__}: {e}"[:REASON_CHARACTERS]
    except msgspec.DecodeError as e:
        timeline.error = f"unreadable answer: {e}"[:REASON_CHARACTERS]
    timeline.ended = timeline.ended or time.perf_counter()
    return timeline


def _message_of(error: Any) -> str:
    """The human part of an error in any of the envelopes servers use."""
    if isinstance(error, bytes):
        try:
            error = msgspec.json.decode(error)
        except msgspec.DecodeError:
            return error.decode(errors="replace").strip()
    while isinstance(error, dict):
        inner = error.get("error", error.get("message", error.get("detail")))
        if inner is None:
            break
        error = inner
    return str(error)
