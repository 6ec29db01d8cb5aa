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
START_S = 10.0


class Renderer:
    def __init__(self, source: str, constants: dict[str, str]) -> None:
        self._setup = msgspec.msgpack.encode({"source": source, "constants": constants})
        self.knows_tools = "tools" in source
        self._broken = False
        self._child: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()

    async def start(self) -> None:
        """Start the child ahead of the first request; its imports take a tenth of a second."""
        await self._turn(None)

    async def render(self, request: dict[str, Any], size: int) -> str:
        """`size`: characters that came in."""
        request = request | {"most": max(OUTPUT_FLOOR, OUTPUT_FACTOR * size)}
        answer = await self._turn(msgspec.msgpack.encode(request))
        if "prompt" in answer:
            return str(answer["prompt"])
        raise InvalidRequest(str(answer["refused"]), param="messages")

    async def close(self) -> None:
        child, self._child = self._child, None
        if child is not None and child.returncode is None:
            child.kill()
            await child.wait()

    async def _turn(self, frame: bytes | None) -> dict[str, Any]:
        """One exchange at a time, each to its end even when its client leaves meanwhile: an answer
        left in the pipe would reach the next request.
        """
        await self._lock.acquire()  # a client that leaves while waiting here costs nothing
        turn = asyncio.create_task(self._exchange(frame))
        turn.add_done_callback(lambda _: self._lock.release())
        return await asyncio.shield(turn)

    async def _exchange(self, frame: bytes | None) -> dict[str, Any]:
        try:
            async with asyncio.timeout(START_S):
                child = await self._ensure_child()
            if self._broken:
                return {"refused": "this model's chat template cannot be compiled."}
            if frame is None:
                return {}
            async with asyncio.timeout(SECONDS + SLACK_S):
                return await self._ask(child, frame)
        except (TimeoutError, asyncio.IncompleteReadError, OSError):
            log.warning("chat template worker ended")
            await self.close()
            return {"refused": f"the chat template did not finish within {SECONDS:g} s."}
        except BaseException:
            await self.close()
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
