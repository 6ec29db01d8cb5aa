"""Every process of the server logs one JSON object per event."""

from __future__ import annotations

import json
import logging
import time

import pytest

from runtime import log as log_lines
from runtime.spawn import EngineProcess


def test_the_engine_process_logs_as_the_http_process_does(capfd: pytest.CaptureFixture) -> None:
    worker = EngineProcess(['{"artifact":"","device":"null"}'])
    try:
        worker.socket.setblocking(True)
        worker.socket.recv(4)  # it is ready
        worker.socket.sendall(b"\xff" * 64)
        assert worker.wait(10)
    finally:
        worker.kill()
        worker.socket.close()
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [(line["level"], line["logger"]) for line in lines] == [("error", "headstart.engine")]
    assert "bad frame" in lines[0]["event"]


def test_an_exception_stays_on_one_line_and_control_characters_are_escaped() -> None:
    try:
        raise ValueError("a\nb\x1b[31m")
    except ValueError as error:
        trace = (type(error), error, error.__traceback__)
        record = logging.LogRecord("x", logging.ERROR, "", 0, "went\nwrong", (), trace)
    line = log_lines.JsonLines().format(record)
    assert "\n" not in line and "\x1b" not in line
    assert json.loads(line)["event"] == "went\nwrong" and "ValueError" in line


def test_what_the_rate_limit_cuts_is_counted() -> None:
    limit = log_lines.RateLimit()
    now = int(time.time())

    def record(at: int) -> logging.LogRecord:
        made = logging.LogRecord("x", logging.ERROR, "", 0, "again", (), None)
        made.created = at
        return made

    kept = [limit.filter(record(now)) for _ in range(log_lines.PER_SECOND + 5)]
    assert sum(kept) == log_lines.PER_SECOND
    later = record(now + 1)
    assert limit.filter(later) and later.getMessage() == "again (and 5 more like it)"
