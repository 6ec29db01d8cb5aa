"""CPU time the HTTP process spends per streamed token: `python -m bench.streaming artifact=…`, or
`url=… pid=…` for a running server.

64 streams of 400 tokens (by default) run at once; the CPU time of the HTTP process alone, from
/proc/<pid>/stat, is divided by the tokens. With `artifact` the server runs on the null device,
whose steps cost next to nothing, so that the streaming path is all there is. Out: median over runs
and one JSON line.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp

from bench import results
from bench.client import Target, ask
from bench.errors import BenchError, BenchUsage
from bench.lag import LoopWatch
from bench.server import Server
from bench.serving import first_model
from bench.workload import Prompt
from conf.bench_schema import StreamingConfig
from conf.load import run
from runtime.artifact import Artifact

TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, all its threads, none of its children."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        raise BenchUsage(f"pid={pid}: there is no such process") from None
    # The name in parentheses may hold spaces; utime and stime are fields 14 and 15.
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


async def streams(config: StreamingConfig, url: str, pid: int) -> dict[str, Any]:
    """One run: all streams at once."""
    if config.backend == "openai-chat":
        prompt = Prompt(text="a " * config.input_len, output_len=config.tokens)
    else:
        prompt = Prompt(tokens=tuple(range(1, config.input_len + 1)), output_len=config.tokens)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, read_bufsize=1 << 20) as session:
        model = await first_model(session, url) if config.backend != "native" else None
        target = Target(url=url, backend=config.backend, model=model)
        body = target.body(prompt)
        first = await ask(session, target, target.body(_short(prompt)))
        if not first.ok:
            raise BenchError(f"the warm-up request to {target.endpoint} failed: {first.error}")
        before = cpu_seconds(pid)
        async with LoopWatch() as watch:
            timelines = await asyncio.gather(
                *(ask(session, target, body) for _ in range(config.streams))
            )
        used = cpu_seconds(pid) - before
    failed = [t.error for t in timelines if not t.ok]
    if failed:
        raise BenchError(f"{len(failed)} of {config.streams} streams failed: {failed[0]}")
    tokens = sum(t.output_tokens for t in timelines)
    messages = sum(len(t.arrivals) for t in timelines)
    duration = max(t.ended for t in timelines) - min(t.sent for t in timelines)
    return {
        "cpu_us_per_token": used / tokens * 1e6,
        "tokens_per_core_second": tokens / used if used else 0.0,
        "tokens_per_second": tokens / duration,
        "tokens_per_message": tokens / max(1, messages),
        "server_cpu": used / duration,
        "client_cpu": watch.cpu,
    }


def _short(prompt: Prompt) -> Prompt:
    return Prompt(text=prompt.text, tokens=prompt.tokens, output_len=8)


def main(config: StreamingConfig, sources: Mapping[str, str]) -> int:
    running = (config.url is not None, config.pid is not None)
    if running != ((True, True) if config.artifact is None else (False, False)):
        raise BenchUsage("give artifact=<directory>, or url=… and pid=… of a running server")
    if config.serve and config.artifact is None:
        raise BenchUsage(f"serve={config.serve}: the server at url runs already; leave it out")
    results.warn_if_busy()
    with contextlib.ExitStack() as stack:
        url, pid, digest = config.url, config.pid, None
        if config.artifact is not None:
            digest = Artifact.open(config.artifact).digest
            options = ["device='null'", *config.serve]
            server = stack.enter_context(Server(config.artifact, options))
            url, pid = server.url, server.pid
        assert url is not None and pid is not None
        runs = [asyncio.run(streams(config, url.rstrip("/"), pid)) for _ in range(config.runs)]
    best = min(r["cpu_us_per_token"] for r in runs)
    figures = {name: median(r[name] for r in runs) for name in runs[0]}
    print(
        f"{config.streams} streams x {config.tokens} tokens, {config.backend}: "
        f"{figures['cpu_us_per_token']:.1f} us of HTTP-process CPU per token (best {best:.1f}), "
        f"{figures['tokens_per_core_second']:.0f} tokens/s/core, "
        f"{figures['tokens_per_second']:.0f} tokens/s, "
        f"{figures['tokens_per_message']:.2f} tokens per message"
    )
    setting = {name: getattr(config, name) for name in ("backend", "streams", "tokens", "runs")}
    line = {**setting, **figures, "best_cpu_us_per_token": best}
    results.append(config.output_file, results.stamp("streaming", line, artifact=digest))
    return 0


if __name__ == "__main__":
    sys.exit(run(StreamingConfig, "bench/streaming", main))
