"""Metrics of hand-made timelines against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from bench.metrics import Timeline, goodput, peak_concurrency, spread, summarise


def timeline(sent: float, times: list[float], ended: float, **more: object) -> Timeline:
    return Timeline(
        sent=sent,
        prompt_tokens=10,
        output_tokens=len(times),
        arrivals=[(t, 1) for t in times],
        ended=ended,
        **more,  # type: ignore[arg-type]
    )


# Clock starts at 100. A: first token after 0.5 s, then every 0.1 s. B: one token. C fails.
A = timeline(100.0, [100.5, 100.6, 100.7, 100.8], 100.8)
B = timeline(100.2, [101.2], 101.2)
C = Timeline(sent=100.3, ended=102.0, error="HTTP 503: full")


def test_one_request() -> None:
    assert A.ttft == pytest.approx(0.5)
    assert A.latency == pytest.approx(0.8)
    assert A.tpot == pytest.approx(0.1)  # (0.8 - 0.5) / 3
    assert A.itls == pytest.approx([0.1, 0.1, 0.1])
    assert B.tpot is None and B.itls == []


def test_summary() -> None:
    result = summarise([A, B, C], 100.0)
    assert result["duration"] == pytest.approx(2.0)  # failed requests take time too
    assert (result["completed"], result["failed"]) == (2, 1)
    assert result["failures"] == {"HTTP 503: full": 1}
    assert result["total_input_tokens"] == 20
    assert result["total_output_tokens"] == 5
    assert result["output_throughput"] == pytest.approx(2.5)
    assert result["total_throughput"] == pytest.approx(12.5)
    assert result["concurrency"] == pytest.approx((0.8 + 1.0) / 2.0)
    assert result["mean_ttft_ms"] == pytest.approx(750)
    assert result["median_e2e_latency_ms"] == pytest.approx(900)
    assert result["mean_tpot_ms"] == pytest.approx(100)  # B has no TPOT
    assert result["max_itl_ms"] == pytest.approx(100)
    assert result["max_output_tokens_per_s"] == 4  # second 100 has A's four tokens
    assert result["max_concurrent_requests"] == 3


def test_percentiles_interpolate() -> None:
    got = spread("x", [i / 1000 for i in range(1, 102)])  # 1 .. 101 ms
    assert got["median_x_ms"] == pytest.approx(51)
    assert got["p90_x_ms"] == pytest.approx(91)
    assert got["p99_x_ms"] == pytest.approx(100)
    assert got["std_x_ms"] == pytest.approx(math.sqrt((101**2 - 1) / 12))


def test_nothing_succeeded() -> None:
    result = summarise([C], 100.0)
    assert result["completed"] == 0 and result["output_throughput"] == 0
    assert result["mean_ttft_ms"] == 0


def test_concurrency_does_not_count_touching_requests() -> None:
    first, second = timeline(0.0, [1.0], 1.0), timeline(1.0, [2.0], 2.0)
    assert peak_concurrency([first, second]) == 1
    assert peak_concurrency([first, timeline(0.5, [2.0], 2.0)]) == 2


def test_goodput_counts_failures_against_attainment() -> None:
    got = goodput([A, B, C], 2.0, {"ttft": 600.0, "e2el": 2000.0})
    assert got["slo_attainment"] == pytest.approx(1 / 3)  # A only
    assert got["request_goodput"] == pytest.approx(0.5)
    assert got["slo_attainment_by_metric"] == {
        "ttft": pytest.approx(1 / 3),
        "e2el": pytest.approx(2 / 3),
    }
