"""The life of an engine process: open the device, say Ready (or Failed), then serve frames until
told to stop.

Comes in: a descriptor and options from the command line, frames of ToEngine. Goes out: frames of
FromEngine; `Stats` is the heartbeat, sent by the loop itself so that it cannot lie. Called by
worker.py.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import sys
import time
from collections.abc import Sequence

import msgspec

from runtime import log as log_lines
from runtime.artifact import Artifact
from runtime.core.loop import EngineLoop
from runtime.core.options import EngineOptions
from runtime.core.phases import Phases
from runtime.device.base import open_session
from runtime.errors import HeadstartError, UsageError
from runtime.grammar.client import grammars_of
from runtime.ipc import BadFrame, Channel
from runtime.request import Events, Failed, Ready

BEAT_BUSY_S = 0.25
BEAT_IDLE_S = 1.0

log = logging.getLogger("headstart.engine")


def main(arguments: Sequence[str]) -> None:
    """Does not return: threads of the native library may be in a step nobody waits for."""
    phases = Phases()
    phases.mark("imports")
    log_lines.setup("info")
    if len(arguments) != 2 or not arguments[0].isdigit():
        sys.stderr.write("usage: python -m runtime.core.worker FD OPTIONS\n")
        code = UsageError.exit_code
    else:
        code = run(Channel(socket.socket(fileno=int(arguments[0]))), arguments[1], phases)
    logging.shutdown()
    os._exit(code)


def run(channel: Channel, options: str, phases: Phases) -> int:
    """The exit code. Only device-level faults and a broken connection end up here; what concerns
    one request is an event.
    """
    try:
        loop = open_loop(msgspec.json.decode(options, type=EngineOptions), phases)
        channel.send(ready(loop, phases))
        gc.collect()
        gc.freeze()  # what is alive now lives to the end: no collection walks it again
        serve(channel, loop)
    except EOFError:
        return 0  # the parent closed the socket: that is how it ends us
    except BadFrame as error:
        log.error("bad frame: %s", error)
        return 1
    except (HeadstartError, msgspec.MsgspecError) as error:
        code = error.exit_code if isinstance(error, HeadstartError) else UsageError.exit_code
        tell(channel, Failed(message=str(error), exit_code=code))
        return code
    except Exception as error:
        log.exception("engine fault")
        tell(channel, Failed(message=f"engine fault: {error}", exit_code=1))
        return 1
    return 0


def open_loop(options: EngineOptions, phases: Phases) -> EngineLoop:
    """A session and the loop over it, from options alone. The null device also runs without an
    artifact.
    """
    artifact = None
    if options.artifact or options.device != "null":
        artifact = Artifact.open(options.artifact)
        phases.mark("artifact")
    session = open_session(
        artifact,
        device=options.device,
        threads=options.threads,
        gpu=options.gpu,
        kv_tokens=options.kv_tokens,
        trust=options.trust_artifact,
        null_step_s=options.null_step_s,
        mark=phases.mark,
    )
    return EngineLoop(
        session,
        options,
        eos=artifact.manifest.model.eos_token_ids if artifact else (),
        grammars=grammars_of(artifact, session.capacity.slots) if artifact else None,
    )


def serve(channel: Channel, loop: EngineLoop) -> None:
    beat = 0.0
    while not loop.stopping:
        busy = loop.has_work
        timeout = 0.0 if busy else max(beat + BEAT_IDLE_S - time.monotonic(), 0.001)
        for message in channel.receive(timeout):
            loop.receive(message)
        if loop.has_work:
            events = loop.step()
            if events:
                channel.send(Events(events=events))
        for reply in loop.replies:
            channel.send(reply)
        loop.replies.clear()
        now = time.monotonic()
        if now - beat >= (BEAT_BUSY_S if busy else BEAT_IDLE_S):
            beat = now
            if not busy:
                loop.idle()
            channel.send(loop.stats())


def ready(loop: EngineLoop, phases: Phases) -> Ready:
    policy, capacity = loop.scheduler.policy, loop.session.capacity
    phases.mark("ready")
    return Ready(
        context=capacity.context,
        vocab=capacity.vocab,
        pages=capacity.pages,
        page_size=capacity.page_size,
        max_seqs=policy.max_running,
        max_step_tokens=policy.max_step_tokens,
        waiting_requests=policy.waiting_requests,
        phases=phases.seconds,
    )


def tell(channel: Channel, failed: Failed) -> None:
    try:
        channel.send(failed)
    except EOFError:
        log.error("nobody hears: %s", failed.message)
