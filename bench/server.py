"""A server of ours as a child process, for the benchmarks that start their own: `with Server(…)`.

Knows when it is ready by the line that runtime.serve prints; ends it by SIGTERM, then by force.
"""

from __future__ import annotations

import http.client
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from bench.errors import BenchError

_READY = re.compile(rb"^ready (http://\S+)$", re.MULTILINE)
_PHASE = re.compile(r'phase="([^"]+)"[^}]*\}\s+(\S+)$', re.MULTILINE)


class Server:
    """`started` and `ready` are times of `time.perf_counter`."""

    def __init__(self, artifact: str, options: Sequence[str] = (), timeout: float = 60.0) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        command = [sys.executable, "-m", "runtime.serve", f"artifact={artifact}", "port=0"]
        self.started = time.perf_counter()
        self.process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=self._log
        )
        try:
            self.url = self._wait_ready(timeout)
        except BenchError:
            self.close()
            raise
        self.ready = time.perf_counter()

    @property
    def pid(self) -> int:
        """Of the HTTP process."""
        return self.process.pid

    def _wait_ready(self, timeout: float) -> str:
        assert self.process.stdout is not None
        deadline, seen = self.started + timeout, b""
        while (left := deadline - time.perf_counter()) > 0:
            if not select.select([self.process.stdout], [], [], left)[0]:
                break
            data = self.process.stdout.read1(4096)  # type: ignore[attr-defined]
            if not data:
                self.process.wait()
                raise BenchError(
                    f"the server ended with code {self.process.returncode}: {self._last_words()}"
                )
            seen += data
            if match := _READY.search(seen):
                return match[1].decode()
        raise BenchError(f"the server was not ready after {timeout:g} s: {self._last_words()}")

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"

    def request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        """One plain request, as little client as possible."""
        place = urlsplit(self.url)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
        try:
            headers = {"Content-Type": "application/json"} if body else {}
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def phases(self) -> dict[str, float]:
        """The engine's own start phases, from /metrics (seconds since its start)."""
        status, text = self.request("GET", "/metrics")
        if status != 200:
            return {}
        lines = (line for line in text.decode().splitlines() if "startup" in line)
        return {name: float(value) for name, value in _PHASE.findall("\n".join(lines))}

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        self._log.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
