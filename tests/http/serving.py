"""A real server process on the null device, and small ways to talk to it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Long enough to be interrupted.
ENDLESS = {"max_new_tokens": 900, "ignore_eos": True, "temperature": 0}


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        return self.json["error"]["message"]

    @property
    def events(self) -> list[Any]:
        """Parsed server-sent events; checks their framing."""
        assert self.body.endswith(b"data: [DONE]\n\n"), self.body[-200:]
        lines = self.body.decode().split("\n\n")
        assert lines[-1] == "" and all(line.startswith("data: ") for line in lines[:-1])
        return [json.loads(line[6:]) for line in lines[:-2]]


@dataclass
class ServerProcess:
    process: subprocess.Popen[str]
    port: int
    lines: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        headers: dict[str, str] | None = None,
        timeout: float = 30,
    ) -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = {"Content-Type": "application/json"} | (headers or {})
        try:
            connection.request(method, path, data, sent)
            answer = connection.getresponse()
            return Reply(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()

    def post(self, path: str, body: Any = None, **options: Any) -> Reply:
        return self.request("POST", path, body, **options)

    def get(self, path: str, **options: Any) -> Reply:
        return self.request("GET", path, **options)

    def generate(self, **body: Any) -> Reply:
        return self.post("/generate", body)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def open_stream(self, body: dict[str, Any], path: str = "/generate") -> socket.socket:
        """A streaming request whose first event has arrived."""
        data = json.dumps(body | {"stream": True}).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        sock = self.connect()
        sock.sendall(head.encode() + data)
        assert b"200 OK" in sock.recv(4096)
        return sock

    def info(self) -> dict[str, Any]:
        return self.get("/server_info").json["internal_states"][0]

    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        pids = [int(pid) for file in children for pid in file.read_text().split()]
        for pid in pids:
            if b"runtime.core.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        raise AssertionError("no engine process")

    def wait_ready(self) -> None:
        assert self.process.stdout is not None
        ready = self.process.stdout.readline()
        assert ready.startswith("ready http://"), self.lines
        self.port = int(ready.rsplit(":", 1)[1])

    def wait_for(self, what: str, timeout: float = 10) -> str:
        return wait_until(lambda: next((x for x in self.lines if what in x), ""), timeout, what)

    def wait_idle(self, timeout: float = 5) -> None:
        def idle() -> bool:
            stats = self.info()["stats"]
            return stats is not None and stats["running"] + stats["waiting"] == 0

        wait_until(idle, timeout, "idle engine")

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(40)


def wait_until(done: Any, timeout: float = 10, what: str = "condition") -> Any:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if found := done():
            return found
        time.sleep(0.01)
    raise AssertionError(f"{what}: not within {timeout} s")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextlib.contextmanager
def starting(artifact: Path, *overrides: str) -> Iterator[ServerProcess]:
    """Starts, without waiting, and kills whatever is left at the end."""
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "runtime.serve",
            f"artifact={artifact}",
            "device='null'",
            "port=0",
            *overrides,
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
    )
    server = ServerProcess(process, 0)
    assert process.stderr is not None and process.stdout is not None

    def read() -> None:
        for line in process.stderr or ():
            server.lines.append(line.rstrip("\n"))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join(5)
        process.stdout.close()
        process.stderr.close()


@contextlib.contextmanager
def serving(artifact: Path, *overrides: str) -> Iterator[ServerProcess]:
    """A server that is ready."""
    with starting(artifact, *overrides) as server:
        server.wait_ready()
        yield server
