"""Requests that are cancelled while the template worker answers never shift its answers."""

from __future__ import annotations

import asyncio
import os
import signal

from runtime.http.render import Renderer

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def asked(text: str) -> dict:
    return {"messages": [{"role": "user", "content": text}]}


def test_a_client_that_leaves_gives_its_prompt_to_nobody_else():
    async def run() -> None:
        renderer = Renderer(TEMPLATE, {})
        try:
            for round_, wait in enumerate((0, 0.0005, 0.001, 0.002, 0.01, 0.02, 0.04, 0.08) * 2):
                if round_ < 8:
                    await renderer.close()  # so that it leaves while the worker still starts
                gone = asyncio.create_task(renderer.render(asked(f"secret {round_}"), 10))
                await asyncio.sleep(wait)
                gone.cancel()
                answers = await asyncio.gather(
                    *(renderer.render(asked(f"mine {round_}.{i}"), 10) for i in range(3))
                )
                assert answers == [f"mine {round_}.{i}" for i in range(3)]
        finally:
            await renderer.close()

    asyncio.run(run())


def test_a_worker_that_is_killed_is_replaced():
    async def run() -> None:
        renderer = Renderer(TEMPLATE, {})
        try:
            await renderer.start()
            assert renderer._child is not None
            os.kill(renderer._child.pid, signal.SIGKILL)
            await renderer._child.wait()
            assert await renderer.render(asked("still here"), 10) == "still here"
        finally:
            await renderer.close()

    asyncio.run(run())
