"""Chat templates rendered in a child process with a time and memory bound.

Comes in: messages of one request. Goes out: the prompt, or `InvalidRequest`. A render that hangs
ends its child; the next request starts another. Used by the chat and tokenize routes.
"""

from __future__ import annotations

import asyncio
import logging
import struct
import sys
from typing import Any

import msgspec

from runtime.errors import InvalidRequest
from runtime.text.render_worker import SECONDS

log = logging.getLogger("headstart.chat")

OUTPUT_FACTOR = 16  # characters out per character in
OUTPUT_FLOOR = 65_536
SLACK_S = 1.0  # the child ends itself first


class Renderer:
    def __init__(self, source: str, constants: dict[str, str]) -> None:
        self._setup = msgspec.msgpack.encode({"source": source, "constants": constants})
        self._broken = False
        self._child: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Start the child ahead of the first request; its imports take a tenth of a second."""
        async with self._lock:
            await self._ensure_child()

    async def render(self, request: dict[str, Any], size: int) -> str:
        """`size`: characters that came in."""
        request = request | {"most": max(OUTPUT_FLOOR, OUTPUT_FACTOR * size)}
        async with self._lock:
            answer = await self._exchange(msgspec.msgpack.encode(request))
        if "prompt" in answer:
            return str(answer["prompt"])
        raise InvalidRequest(str(answer["refused"]), param="messages")

    async def close(self) -> None:
        if self._child is not None and self._child.returncode is None:
            self._child.kill()
            await self._child.wait()

    async def _exchange(self, frame: bytes) -> dict[str, Any]:
        child = await self._ensure_child()
        if self._broken:
            return {"refused": "this model's chat template cannot be compiled."}
        try:
            async with asyncio.timeout(SECONDS + SLACK_S):
                return await self._ask(child, frame)
        except (TimeoutError, asyncio.IncompleteReadError, ConnectionError):
            log.warning("chat template worker ended pid=%d", child.pid)
            await self.close()
            self._child = None
            return {"refused": f"the chat template did not finish within {SECONDS:g} s."}
        except asyncio.CancelledError:  # its answer would reach the next request
            await self.close()
            self._child = None
            raise

    async def _ensure_child(self) -> asyncio.subprocess.Process:
        if self._child is None or self._child.returncode is not None:
            self._child = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "runtime.text.render_worker",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=1 << 26,
            )
            answer = await self._ask(self._child, self._setup)
            if "broken" in answer:
                self._broken = True
                log.error("chat template broken error=%s", answer["broken"])
        return self._child

    async def _ask(self, child: asyncio.subprocess.Process, frame: bytes) -> dict[str, Any]:
        assert child.stdin is not None and child.stdout is not None
        child.stdin.write(struct.pack("<I", len(frame)) + frame)
        await child.stdin.drain()
        (size,) = struct.unpack("<I", await child.stdout.readexactly(4))
        answer: dict[str, Any] = msgspec.msgpack.decode(await child.stdout.readexactly(size))
        return answer
