"""A process that answers one line with one line, is ended when it takes too long, and starts again
with the next question.

`WorkerProcess(command, first)`: `first` is sent to every new one, whose first line is `hello`.
`ask` raises `WorkerLost` with what was seen when the process hung or ended; the question is not
repeated. `Questions` is the other side. For work on a device: a kernel that hangs or faults takes
the driver's context with it, and with that the process.
"""

from __future__ import annotations

import json
import os
import select
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from compiler.errors import CompileError
from runtime.lifetime import die_with_parent

START_S = 120.0


class WorkerLost(Exception):
    """The process is gone: `hung: …` or `failed: …`."""


class WorkerProcess:
    def __init__(self, command: list[str], first: dict[str, Any]) -> None:
        self._command, self._first = command, first
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self.hello: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()
        self._errors.close()

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        if self._process is None:
            self._start()
        return self._exchange(question, seconds)

    def _start(self) -> None:
        self._errors.seek(0)
        self._errors.truncate()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # what it starts ends with it
        )
        try:
            self.hello = self._exchange(self._first, START_S)
        except WorkerLost as lost:
            raise CompileError(f"{shlex.join(self._command)} does not start: {lost}") from None

    def _exchange(self, question: dict[str, Any], seconds: float) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        deadline, seen = time.monotonic() + seconds, b""
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
        except OSError:
            self._end()
            raise WorkerLost(f"failed: {self._last_words()}") from None
        while not seen.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([process.stdout], [], [], left)[0]:
                self._end()
                raise WorkerLost(f"hung: no answer in {seconds:g} s")
            data = os.read(process.stdout.fileno(), 1 << 16)
            if not data:
                self._end()
                raise WorkerLost(f"failed: {self._last_words()}")
            seen += data
        answer = json.loads(seen)
        assert isinstance(answer, dict)
        return answer

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"

    def _end(self) -> None:
        """At once: a driver call that hangs does not listen."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    pass


class Questions:
    """In the process that answers: `first` of its parent, then the questions; `tell` answers. What
    a library prints goes to stderr. Ends with its parent, whatever it is doing."""

    def __init__(self) -> None:
        die_with_parent()
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.first: dict[str, Any] = json.loads(sys.stdin.readline())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(json.loads, sys.stdin)

    def tell(self, answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=self._answers)
