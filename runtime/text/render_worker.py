"""Child process that renders chat templates: `python -m runtime.text.render_worker`.

Comes in on stdin: one frame with the template, then one frame per request (u32 length, msgpack).
Goes out on stdout: one frame per request. A render that takes too long or too much memory ends this
process, nothing else; the parent (`Renderer` in runtime/http/render.py) starts another.
"""

from __future__ import annotations

import resource
import signal
import struct
import sys
from typing import Any, BinaryIO

import jinja2
import msgspec

from runtime.text.chat import ChatTemplate, TemplateRefused

SECONDS = 2.0
MEMORY = 256 << 20  # above what the process uses when idle


def read_frame(stream: BinaryIO) -> bytes | None:
    head = stream.read(4)
    if len(head) < 4:
        return None
    (size,) = struct.unpack("<I", head)
    body = stream.read(size)
    return body if len(body) == size else None


def write_frame(stream: BinaryIO, message: Any) -> None:
    body = msgspec.msgpack.encode(message)
    stream.write(struct.pack("<I", len(body)) + body)
    stream.flush()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when we end
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    first = read_frame(stdin)
    if first is None:
        return
    setup = msgspec.msgpack.decode(first)
    try:
        template = ChatTemplate(setup["source"], setup["constants"])
    except (jinja2.TemplateError, RecursionError) as error:
        write_frame(stdout, {"broken": f"{type(error).__name__}: {error}"})
        return
    write_frame(stdout, {"ready": True})
    _limit_memory()
    while (frame := read_frame(stdin)) is not None:
        # SIGALRM's default action ends the process: no Python code has to run for it.
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        write_frame(stdout, _render(template, msgspec.msgpack.decode(frame)))
        signal.setitimer(signal.ITIMER_REAL, 0)


def _render(template: ChatTemplate, request: dict[str, Any]) -> dict[str, str]:
    try:
        return {"prompt": template.render(**request)}
    except TemplateRefused as error:
        return {"refused": str(error)}
    except (MemoryError, RecursionError):
        return {"refused": "the chat template needs too much memory for these messages."}


def _limit_memory() -> None:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


if __name__ == "__main__":
    main()
