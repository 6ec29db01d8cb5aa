"""The engine process: serves frames, says why it cannot start, and never outlives its parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from oracle import predict

from runtime.ipc import Channel
from runtime.request import (
    Control,
    ControlReply,
    Events,
    Failed,
    FromEngine,
    Ready,
    Request,
    SamplingParams,
    Stats,
)
from runtime.spawn import EngineProcess

ROOT = Path(__file__).resolve().parents[2]
NULL = {"artifact": "", "device": "null"}


class Worker:
    def __init__(self, options: object) -> None:
        text = options if isinstance(options, str) else msgspec.json.encode(options).decode()
        self.process = EngineProcess([text])
        self.channel = Channel(self.process.socket, FromEngine)

    def until(self, kind: type, seconds: float = 20.0) -> list:
        """Messages up to the first of a kind."""
        got: list = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            got += self.channel.receive(0.05)
            if any(isinstance(m, kind) for m in got):
                return got
        raise AssertionError(f"no {kind.__name__} in {got}")


@pytest.fixture
def start() -> Iterator:
    workers: list[Worker] = []

    def _start(options: object = NULL) -> Worker:
        workers.append(Worker(options))
        return workers[-1]

    yield _start
    for worker in workers:
        worker.process.kill()
        worker.process.wait(5)
        worker.channel.close()


def test_ready_then_tokens_then_replies(start) -> None:
    worker = start()
    ready = worker.until(Ready)[0]
    assert isinstance(ready, Ready)
    assert ready.context == 4096 and 0 < ready.phases["imports"] < ready.phases["ready"]
    request = Request(
        id=4, tokens=[1, 2, 3], sampling=SamplingParams(max_new_tokens=6, temperature=0)
    )
    worker.channel.send(request)
    worker.channel.send(Request(id=5, tokens=[10**6], sampling=SamplingParams()))
    tokens, ends = [], {}
    while len(ends) < 2:
        for message in worker.until(Events):
            for event in message.events if isinstance(message, Events) else []:
                if event.id == 4:
                    tokens += event.tokens
                if event.finish:
                    ends[event.id] = event.finish
    assert tokens == predict(request, vocab=ready.vocab, eos=()).tokens
    assert ends[5].status == 400
    worker.channel.send(Control(id=8, verb="stats"))
    reply = next(m for m in worker.until(ControlReply) if isinstance(m, ControlReply))
    assert reply.id == 8 and reply.stats.generation_tokens == 6


def test_heartbeats_come_without_work_and_with_it(start) -> None:
    worker = start({**NULL, "null_step_s": 0.02})
    worker.until(Ready)
    worker.until(Stats, 3.0)
    worker.channel.send(Request(id=1, tokens=[1], sampling=SamplingParams(max_new_tokens=4000)))
    first = next(m for m in worker.until(Stats, 3.0) if isinstance(m, Stats))
    second = next(m for m in worker.until(Stats, 1.0) if isinstance(m, Stats))
    assert second.steps > first.steps


def test_shutdown_and_closed_socket_end_it(start) -> None:
    worker = start()
    worker.until(Ready)
    worker.channel.send(Control(id=1, verb="shutdown"))
    assert worker.process.wait(5)
    other = start()
    other.until(Ready)
    other.channel.send(Request(id=1, tokens=[1], sampling=SamplingParams(max_new_tokens=4000)))
    other.channel.close()
    assert other.process.wait(5)


def test_bytes_that_are_no_frame_end_it(start) -> None:
    worker = start()
    worker.until(Ready)
    worker.process.socket.sendall(b"\xff" * 100)
    assert worker.process.wait(5)


def test_sigterm_is_left_to_the_parent(start) -> None:
    worker = start()
    worker.until(Ready)
    os.kill(worker.process.pid, signal.SIGTERM)
    worker.channel.send(Control(id=1, verb="stats"))
    worker.until(ControlReply)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"artifact": "/nowhere"}, 2, "/nowhere"),
        ({"artifact": "", "device": "gpu"}, 2, "device"),
        ({"artifact": "", "nonsense": 1}, 2, "nonsense"),
        ({**NULL, "max_running": 1000}, 2, "1000"),
        ("{", 2, ""),
    ],
    ids=["artifact", "device", "unknown", "contradiction", "json"],
)
def test_says_why_it_cannot_start(start, options: object, code: int, words: str) -> None:
    worker = start(options)
    failed = worker.until(Failed)[-1]
    assert failed.exit_code == code and words in failed.message
    assert worker.process.wait(5)


def test_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    """kill -9 of the parent while it starts and while it runs: no engine is left after a second."""
    code = (
        "import time, json\n"
        "from runtime.spawn import EngineProcess\n"
        f"p = EngineProcess([json.dumps({NULL!r})])\n"
        "print(p.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    for delay in (0.0, 1.5):
        with subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ) as parent:
            assert parent.stdout is not None
            pid = int(parent.stdout.readline())
            time.sleep(delay)
            parent.kill()
        deadline = time.monotonic() + 5
        while alive(pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not alive(pid)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_usage_on_wrong_arguments() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = subprocess.run(
            [sys.executable, "-m", "runtime.core.worker"], cwd=ROOT, capture_output=True, text=True
        )
    assert done.returncode == 2 and "usage" in done.stderr


def test_a_parent_that_was_gone_before_it_started_ends_it() -> None:
    """Before anything is loaded: the kernel tells only of deaths after it was asked to."""
    ours, theirs = socket.socketpair()
    ours.close()
    fd = theirs.fileno()
    options = '{"artifact": "/nowhere"}'  # would be exit code 2
    child = [sys.executable, "-m", "runtime.core.worker", str(fd), options]
    assert subprocess.run(child, pass_fds=(fd,), cwd=ROOT, timeout=20).returncode == 0
    theirs.close()
