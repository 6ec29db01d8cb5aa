"""What the death of a process costs its clients: `python -m bench.recovery artifact=… clients=16`.

Starts a server, keeps it busy with as many streams as whole answers, kills its engine (SIGKILL),
then the server itself. Out: seconds from the first kill until every client was told, until
`/health` is 200 again, until a new request has its token; seconds from the second until no process
of the server is left; medians and one JSON line. A client that does not get exactly one error is an
error here.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping
from typing import Any

import aiohttp
import msgspec
import psutil

from bench import results
from bench.client import messages
from bench.errors import BenchError
from bench.server import Server
from bench.startup import BODY, timeline
from conf.bench_schema import RecoveryConfig
from conf.load import run
from runtime.artifact import Artifact

POLL_S = 0.002


class Clients:
    """Requests that run until the engine dies. `begun`: streams that had their first message."""

    def __init__(self, config: RecoveryConfig, url: str) -> None:
        self._url = url + "/generate"
        self._config = config
        self.begun = 0
        self.told: list[float] = []  # when each client had its error, as time.perf_counter

    async def run(self, session: aiohttp.ClientSession) -> None:
        await asyncio.gather(*(self._one(session, i) for i in range(self._config.clients)))

    async def _one(self, session: aiohttp.ClientSession, number: int) -> None:
        stream = number % 2 == 0
        body = {
            "input_ids": [number + 1, 2, 3],
            "sampling_params": {
                "max_new_tokens": self._config.tokens,
                "temperature": 0,
                "ignore_eos": True,
            },
            "stream": stream,
        }
        try:
            async with session.post(self._url, json=body) as answer:
                if answer.status == 200 and stream:
                    errors, said = await self._read(answer)
                else:
                    errors, said = int(answer.status == 503), await answer.read()
                    self.told.append(time.perf_counter())
        except (aiohttp.ClientError, OSError) as e:
            raise BenchError(f"client {number} was not told but cut off: {e}") from None
        if errors != 1:
            text = said[:200].decode(errors="replace")
            raise BenchError(f"client {number} got {errors} errors, not one: {text}")

    async def _read(self, answer: aiohttp.ClientResponse) -> tuple[int, bytes]:
        """Errors of a stream, and its last message but the end's mark."""
        errors, last = 0, b""
        async for message, now in messages(answer.content):
            if not last:
                self.begun += 1
            if message == b"[DONE]":
                return errors, last
            last = message
            if "error" in msgspec.json.decode(message):
                errors += 1
                self.told.append(now)
        raise BenchError(f"a stream ended without [DONE]: {last[:200].decode(errors='replace')}")


async def until(done: Any, seconds: float, what: str) -> float:
    """When `done()` was true (time.perf_counter)."""
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        if await done():
            return time.perf_counter()
        await asyncio.sleep(POLL_S)
    raise BenchError(f"{what}: not within {seconds:g} s")


async def engine_killed(config: RecoveryConfig, server: Server) -> dict[str, float]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        clients = Clients(config, server.url)
        load = asyncio.create_task(clients.run(session))

        async def loaded() -> bool:
            if load.done():
                load.result()
                raise BenchError(
                    f"the requests ended before the kill: raise tokens={config.tokens}"
                )
            stats = await _get(session, server.url + "/get_server_info")
            running = stats["internal_states"][0]["in_flight"] if stats else 0
            return running == config.clients and clients.begun == (config.clients + 1) // 2

        async def over() -> bool:
            return load.done()

        async def ready() -> bool:
            async with session.get(server.url + "/health") as answer:
                return answer.status == 200

        async def first_token() -> bool:
            headers = {"Content-Type": "application/json"}
            async with session.post(server.url + "/generate", data=BODY, headers=headers) as answer:
                return answer.status == 200

        await until(loaded, config.timeout, f"{config.clients} requests under way")
        engine = [p for p in _family(server.pid) if "runtime.core.worker" in p.cmdline()]
        if len(engine) != 1:
            raise BenchError(f"the server has {len(engine)} engine processes, expected one")
        killed = time.perf_counter()
        engine[0].kill()
        await until(over, config.timeout, "every client told")
        load.result()
        return {
            "last client told": max(clients.told) - killed,
            "ready again": await until(ready, config.timeout, "ready again") - killed,
            "token again": await until(first_token, config.timeout, "a token again") - killed,
        }


async def server_killed(config: RecoveryConfig, server: Server) -> float:
    children = _family(server.pid)[1:]

    async def gone() -> bool:
        return not any(_alive(child) for child in children)

    killed = time.perf_counter()
    server.process.kill()
    server.process.wait()
    return await until(gone, config.timeout, f"{len(children)} children gone") - killed


def _family(pid: int) -> list[psutil.Process]:
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def _get(session: aiohttp.ClientSession, url: str) -> Any:
    async with session.get(url) as answer:
        return msgspec.json.decode(await answer.read()) if answer.status == 200 else None


def kill_once(config: RecoveryConfig) -> dict[str, float]:
    with Server(config.artifact, config.serve, config.timeout) as server:
        figures = asyncio.run(engine_killed(config, server))
        return figures | {"nothing left": asyncio.run(server_killed(config, server))}


def main(config: RecoveryConfig, sources: Mapping[str, str]) -> int:
    results.warn_if_busy()
    digest = Artifact.open(config.artifact).digest
    runs = [kill_once(config) for _ in range(config.repeat)]
    medians = timeline("seconds since the kill", runs)
    setting = {name: getattr(config, name) for name in ("clients", "tokens", "repeat")}
    result = {**setting, "median_seconds": medians, "runs": runs}
    results.append(config.output_file, results.stamp("recovery", result, artifact=digest))
    return 0


if __name__ == "__main__":
    sys.exit(run(RecoveryConfig, "bench/recovery", main))
