"""The engine link's clocks: how long a lost engine is waited for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from runtime.http.link import BACKOFF_S, START_S, EngineLink
from runtime.request import Ready, Stats

READY = Ready(
    context=64,
    vocab=8,
    pages=4,
    page_size=16,
    max_seqs=2,
    max_step_tokens=8,
    waiting_requests=8,
    phases={"ready": 1.0},
)


def link() -> EngineLink:
    process = cast(Any, SimpleNamespace(pid=1))
    return EngineLink(cast(Any, None), process, step_s=1.0)


def test_an_engine_that_becomes_ready_is_never_waited_for_longer_than_five_seconds():
    lost = link()
    for _ in range(50):
        assert BACKOFF_S[min(lost._failures, len(BACKOFF_S) - 1)] <= 2.0
        lost._failures += 1  # as _restart does
        lost._set_ready(READY)


def test_throughput_is_what_came_between_two_heartbeats(monkeypatch: pytest.MonkeyPatch):
    beats = link()
    at = {name: 0 for name in Stats.__struct_fields__}
    for second, tokens, expected in ((10.0, 40, 0.0), (12.0, 100, 30.0), (13.0, 100, 0.0)):
        monkeypatch.setattr("runtime.http.link.time.monotonic", lambda second=second: second)
        beats._heartbeat(Stats(**(at | {"generation_tokens": tokens})))
        assert beats.throughput == expected


def test_a_restart_has_a_deadline_and_the_first_start_has_none():
    fresh = link()
    assert fresh._start_s() == float("inf")
    fresh._set_ready(READY)
    fresh._protocol = cast(Any, object())
    assert fresh._start_s() == START_S
