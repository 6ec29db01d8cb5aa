"""64 streams at once on the real device say what each says alone."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
from serving import ServerProcess, serving

STREAMS = 64


def body(i: int) -> dict[str, Any]:
    """Prompts of many lengths, some of them prefixes of others."""
    return {
        "input_ids": [(j * j + i % 7) % 500 + 1 for j in range(1 + 3 * i)],
        "sampling_params": {"max_new_tokens": 8 + i % 5, "temperature": 0, "ignore_eos": True},
        "stream": True,
    }


async def stream(session: aiohttp.ClientSession, server: ServerProcess, i: int) -> list[int]:
    ids: list[int] = []
    async with session.post(f"{server.url}/generate", json=body(i)) as reply:
        assert reply.status == 200, await reply.text()
        async for line in reply.content:
            if line.startswith(b"data: {"):
                message = json.loads(line[6:])
                assert message["output_ids"][: len(ids)] == ids, "a stream only grows"
                ids = message["output_ids"]
    return ids


async def test_together_as_alone(tiny_artifact: Path) -> None:
    with serving(tiny_artifact, "device=auto") as server:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            together = await asyncio.gather(*(stream(session, server, i) for i in range(STREAMS)))
            server.post("/flush_cache")
            alone = [await stream(session, server, i) for i in range(STREAMS)]
    assert [len(ids) for ids in alone] == [8 + i % 5 for i in range(STREAMS)]
    assert together == alone
