"""Log lines: one JSON object per event, at most so many per second and class.

`setup` routes every logger of a process through it, the HTTP process's as the engine's; `AccessLog`
writes one line per request.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import msgspec

PER_SECOND = 10

_encode = msgspec.json.encode  # escapes control characters


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        if record.exc_info:
            fields["trace"] = self.formatException(record.exc_info)[-4000:]
        return _encode(fields).decode("utf-8", "replace")


class RateLimit(logging.Filter):
    """A class of events is a logger and its format string; what is cut is counted and told."""

    def __init__(self) -> None:
        super().__init__()
        self._windows: dict[tuple[str, str], list[int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        second = int(record.created)
        window = self._windows.setdefault((record.name, str(record.msg)[:80]), [second, 0, 0])
        if window[0] != second:
            if window[2]:
                record.msg = f"{record.msg} (and {window[2]} more like it)"
            window[:] = [second, 0, 0]
        window[1] += 1
        if window[1] > PER_SECOND:
            window[2] += 1
            return False
        return True


class AccessLog:
    """Same budget, kept here so that a line that is not written costs next to nothing."""

    def __init__(self) -> None:
        self._log = logging.getLogger("headstart.access")
        self._second = 0
        self._lines = 0
        self._left_out = 0

    def write(self, route: str, method: str, status: int, seconds: float) -> None:
        second = int(time.monotonic())
        if second != self._second:
            if self._left_out:
                self._log.info("access lines left out count=%d", self._left_out)
            self._second, self._lines, self._left_out = second, 0, 0
        self._lines += 1
        if self._lines > PER_SECOND:
            self._left_out += 1
            return
        self._log.info(
            "request route=%s method=%s status=%d ms=%.1f", route, method, status, seconds * 1e3
        )


def setup(level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines())
    handler.addFilter(RateLimit())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
