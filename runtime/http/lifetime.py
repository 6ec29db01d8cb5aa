"""From a started engine to an exit code: build the server, say ready, drain, stop.

Called once by serve.py, with the socket already bound and the engine already loading.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import msgspec
from aiohttp import web

from conf.schema import ServeConfig
from runtime import log as log_lines
from runtime.artifact import Artifact
from runtime.errors import HeadstartError
from runtime.http.app import build_app
from runtime.http.connection import Connections
from runtime.http.link import EngineLink
from runtime.http.render import Renderer
from runtime.http.server import Server
from runtime.manifest import Manifest
from runtime.metrics import Memory, RequestMetrics
from runtime.request import Failed
from runtime.spawn import EngineProcess
from runtime.text.model import TextModel
from runtime.text.tokenizer import Tokenizer

log = logging.getLogger("headstart.serve")

BACKLOG = 1024
PREFERRED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")  # clients may repeat
SLOW_FLOPS = 20e9  # per second: below what one core of any machine we know sustains


class EngineFailed(HeadstartError):
    """The first engine could not start; its own words and exit code."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.message)
        self.exit_code = failed.exit_code


def serve(
    config: ServeConfig,
    listener: socket.socket,
    engine: EngineProcess,
    spawn: Callable[[], EngineProcess],
) -> int:
    log_lines.setup(config.log_level)
    for name in config.limits.lifted():
        log.warning("no limit limits.%s=null: one client can take what all share", name)
    artifact = Artifact.open(config.artifact)
    step_s = max(config.limits.step_s, slow_step_s(artifact.manifest))
    server = _server(config, artifact, EngineLink(spawn, engine, step_s=step_s))
    asyncio.run(_live(server, listener))
    return 0


def slow_step_s(manifest: Manifest) -> float:
    """Seconds the largest step may take before it counts as stalled: a large model's first prompt
    on a small machine is slow, not dead."""
    steps = manifest.report.get("steps", {}).values()
    return max((step["flops"] for step in steps), default=0) / SLOW_FLOPS


def _server(config: ServeConfig, artifact: Artifact, link: EngineLink) -> Server:
    manifest = artifact.manifest
    tokenizer = Tokenizer.load(artifact.text)
    model = TextModel.make(
        config.served_model_name or manifest.name,
        tokenizer,
        context=manifest.model.context,
        vocab=manifest.model.vocab,
        limits=config.limits,
        embedding=manifest.model.embedding,
        stream_interval=config.stream_interval,
    )
    template = artifact.text("chat_template.jinja")
    renderer = None
    if template is not None and tokenizer is not None:
        renderer = Renderer(template.decode(), tokenizer.constants())
    generation = msgspec.json.decode(artifact.text("generation_config.json") or b"{}", type=dict)
    memory = Memory(weights=manifest.weights_bytes, page=manifest.state.page_bytes)
    return Server(
        config,
        model,
        link,
        renderer,
        info=_info(config, artifact, generation),
        defaults=generation,
        metrics=RequestMetrics(memory),
    )


def _info(config: ServeConfig, artifact: Artifact, generation: dict[str, Any]) -> dict[str, Any]:
    manifest = artifact.manifest
    name = config.served_model_name or manifest.name
    shown = asdict(config) | {"api_key": None, "admin_api_key": None}
    return {
        "model": {
            "model_path": manifest.name,
            "served_model_name": name,
            "tokenizer_path": manifest.name,
            "is_generation": manifest.model.embedding is None,
            "embedding": manifest.model.embedding,
            "preferred_sampling_params": {k: v for k, v in generation.items() if k in PREFERRED}
            or None,
            "weight_version": "default",
            "load_format": "safetensors",
            "reasoning_parser": None,
            "tool_call_parser": None,
            "disaggregation_mode": None,
            "model_type": manifest.model.family,
            "architectures": manifest.model.architectures,
            "max_model_len": manifest.model.context,
            "vocab_size": manifest.model.vocab,
            "has_image_understanding": False,
            "has_audio_understanding": False,
        },
        "server": {
            **shown,
            "model_path": manifest.name,
            "served_model_name": name,
            "version": manifest.tool,
            "artifact_digest": artifact.digest,
            "quant": manifest.quant,
            "dtype": manifest.dtype,
            "kv_dtype": manifest.kv_dtype,
            "target": manifest.target,
        },
    }


async def _live(server: Server, listener: socket.socket) -> None:
    config, link = server.config, server.link
    # handler_cancellation: a client that leaves takes its request with it.
    runner = web.AppRunner(build_app(server), handler_cancellation=True, handle_signals=False)
    await runner.setup()
    assert runner.server is not None
    connections = Connections(runner.server, config.limits)
    stop = asyncio.Event()
    again = asyncio.Event()
    _on_signals(stop, again)
    await link.start()
    loop = asyncio.get_running_loop()
    http: asyncio.Server | None = None
    try:
        # Before the engine is up: whoever comes early gets 503 and not silence.
        http = await loop.create_server(connections, sock=listener, backlog=BACKLOG)
        await _until_up(link, stop)
        if stop.is_set():
            return
        assert link.capacity is not None
        server.model = server.model.fitted(link.capacity.pages * link.capacity.page_size)
        _say_ready(config, listener)
        if server.renderer is not None:
            await server.renderer.start()
        gc.collect()
        gc.freeze()  # what is alive now lives to the end: no full collection walks it again
        await stop.wait()
        await _drain(server, again)
    finally:
        if http is not None:
            http.close()
        connections.close()
        await runner.cleanup()
        await link.close()
        if server.renderer is not None:
            await server.renderer.close()


def _on_signals(stop: asyncio.Event, again: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()

    def heard() -> None:
        (again if stop.is_set() else stop).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, heard)


async def _until_up(link: EngineLink, stop: asyncio.Event) -> None:
    stopped = asyncio.create_task(stop.wait())
    try:
        while not link.up and not stop.is_set():
            link.changed.clear()
            changed = asyncio.create_task(link.changed.wait())
            await asyncio.wait({stopped, changed}, return_when=asyncio.FIRST_COMPLETED)
            changed.cancel()
            if link.failed is not None:
                raise EngineFailed(link.failed)
    finally:
        stopped.cancel()


def _say_ready(config: ServeConfig, listener: socket.socket) -> None:
    port = listener.getsockname()[1]  # the chosen one when port=0
    host = f"[{config.host}]" if ":" in config.host else config.host
    log.info("The server is fired up and ready to roll!")
    print(f"ready http://{host}:{port}", flush=True)


async def _drain(server: Server, again: asyncio.Event) -> None:
    """New requests get 503 over the open socket while those under way end, up to a deadline."""
    server.draining = True
    limit = server.config.drain_s
    log.info("draining requests=%d limit_s=%g", len(server.jobs), limit)
    deadline = time.monotonic() + limit
    while server.jobs and not again.is_set() and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    if server.jobs:
        log.warning("drain ended early aborted=%d", len(server.jobs))
        for job in list(server.jobs):
            job.fail("The server is shutting down.", 503)
        await asyncio.sleep(0.1)  # let the handlers write it
    sys.stdout.flush()
