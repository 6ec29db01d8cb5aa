"""Benchmarks that start their own server: failures are told in the server's words, CPU is read."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from bench.errors import BenchError
from bench.server import Server
from bench.streaming import cpu_seconds
from bench.streaming import main as streaming
from conf.bench_schema import StreamingConfig


def test_a_server_that_cannot_start(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match=r"the server ended with code [1-9].*nothing-here"):
        Server(str(tmp_path / "nothing-here"))


def test_cpu_seconds_of_this_process() -> None:
    start, before = time.process_time(), cpu_seconds(os.getpid())
    while time.process_time() - start < 0.1:
        pass
    assert 0.05 <= cpu_seconds(os.getpid()) - before <= 1.0


def test_no_such_process() -> None:
    with pytest.raises(BenchError, match="no such process"):
        cpu_seconds(2**22 + 1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"url": "http://x"},
        {"artifact": "a", "url": "http://x"},
        {"artifact": "a", "pid": 1},
        {"artifact": "a", "url": "http://x", "pid": 1},
    ],
)
def test_streaming_needs_one_server(options: dict) -> None:
    with pytest.raises(BenchError, match="give artifact="):
        streaming(StreamingConfig(**options), {})
