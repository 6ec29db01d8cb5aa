"""A small server with known behaviour: native and OpenAI streams of `tokens` tokens, some failing.

Request k fails when k % fail_every == 0 (k counts from 1), in turn by status, by an error in the
stream, by a broken stream and by an abort.
"""

from __future__ import annotations

import asyncio
import json

from aiohttp import web

FAILURES = ("status", "stream_error", "cut", "abort")


class FakeServer:
    def __init__(self, *, gap: float = 0.002, fail_every: int = 0, per_message: int = 1) -> None:
        self.gap, self.fail_every, self.per_message = gap, fail_every, per_message
        self.bodies: list[dict] = []
        self.running = self.most_running = 0
        self.app = web.Application()
        self.app.router.add_get("/health", self.health)
        self.app.router.add_get("/get_model_info", self.model_info)
        self.app.router.add_get("/get_server_info", self.server_info)
        self.app.router.add_get("/v1/models", self.models)
        self.app.router.add_post("/generate", self.native)
        self.app.router.add_post("/v1/completions", self.openai)
        self.app.router.add_post("/v1/chat/completions", self.openai)

    async def health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def model_info(self, request: web.Request) -> web.Response:
        return web.json_response({"vocab_size": 100})

    async def server_info(self, request: web.Request) -> web.Response:
        return web.json_response({"artifact_digest": "abc123"})

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake"}]})

    def _failure(self) -> str | None:
        count = len(self.bodies)
        if not self.fail_every or count % self.fail_every:
            return None
        return FAILURES[(count // self.fail_every - 1) % len(FAILURES)]

    async def _open(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        return response

    async def native(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        failure = self._failure()
        if failure == "status":
            return web.json_response({"error": {"message": "queue is full"}}, status=503)
        total = body["sampling_params"]["max_new_tokens"]
        prompt = len(body.get("input_ids") or body["text"].split())
        self.running += 1
        self.most_running = max(self.most_running, self.running)

        def message(done: int, reason: dict | None) -> dict:
            return {
                "text": "x" * done,
                "output_ids": list(range(done)),
                "meta_info": {
                    "id": "1",
                    "prompt_tokens": prompt,
                    "completion_tokens": done,
                    "cached_tokens": 2,
                    "finish_reason": reason,
                },
            }

        if not body["stream"]:
            self.running -= 1
            return web.json_response(message(total, {"type": "length", "length": total}))
        response = await self._open(request)
        for done in range(self.per_message, total + 1, self.per_message):
            await asyncio.sleep(self.gap)
            if failure and done > total // 2:
                break
            last = done + self.per_message > total
            reason = {"type": "length", "length": total} if last else None
            await self._send(response, message(done, reason))
        self.running -= 1
        if failure == "stream_error":
            await self._send(response, {"error": {"message": "engine ended", "code": 500}})
        if failure == "abort":
            await self._send(response, message(done, {"type": "abort", "message": "too long"}))
        if failure != "cut":
            await response.write(b"data: [DONE]\n\n")
        return response

    async def openai(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        chat = "messages" in body
        total = body["max_tokens"]
        usage = {"prompt_tokens": 7, "completion_tokens": total, "total_tokens": total + 7}
        if not body["stream"]:
            text = "x" * total
            choice = {"message": {"content": text}} if chat else {"text": text}
            return web.json_response({"choices": [choice], "usage": usage})
        response = await self._open(request)
        if chat:
            await self._send(response, {"choices": [{"delta": {"role": "assistant"}}]})
        for _ in range(total // self.per_message):
            await asyncio.sleep(self.gap)
            text = "x" * self.per_message
            choice = {"delta": {"content": text}} if chat else {"text": text}
            await self._send(response, {"choices": [choice]})
        end = {"delta": {}} if chat else {"text": ""}
        await self._send(response, {"choices": [{**end, "finish_reason": "length"}]})
        await self._send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\r\n\r\n")
        return response

    @staticmethod
    async def _send(response: web.StreamResponse, value: dict) -> None:
        await response.write(b"data: " + json.dumps(value).encode() + b"\n\n")
