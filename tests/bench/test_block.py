"""The printed block, character by character."""

from __future__ import annotations

from bench.block import render
from bench.metrics import Timeline, summarise

GOLDEN = """\
============ Serving Benchmark Result ============
Backend:                                 native
Traffic request rate:                    inf
Max request concurrency:                 8
Successful requests:                     1
Failed requests:                         1
  1 x HTTP 503: full
Benchmark duration (s):                  2.00
Total input tokens:                      10
Total input text tokens:                 10
Total generated tokens:                  3
Request throughput (req/s):              0.50
Input token throughput (tok/s):          5.00
Output token throughput (tok/s):         1.50
Peak output token throughput (tok/s):    3.00
Peak concurrent requests:                2
Total token throughput (tok/s):          6.50
Concurrency:                             0.45
---------------------Goodput----------------------
SLOs (ms):                               ttft:600
Request goodput (req/s):                 0.50
SLO attainment (%):                      50.00
  ttft attainment (%):                   50.00
----------------End-to-End Latency----------------
Mean E2E Latency (ms):                   900.00
Median E2E Latency (ms):                 900.00
P90 E2E Latency (ms):                    900.00
P95 E2E Latency (ms):                    900.00
P99 E2E Latency (ms):                    900.00
---------------Time to First Token----------------
Mean TTFT (ms):                          500.00
Median TTFT (ms):                        500.00
P90 TTFT (ms):                           500.00
P95 TTFT (ms):                           500.00
P99 TTFT (ms):                           500.00
-----Time per Output Token (excl. 1st token)------
Mean TPOT (ms):                          200.00
Median TPOT (ms):                        200.00
P90 TPOT (ms):                           200.00
P95 TPOT (ms):                           200.00
P99 TPOT (ms):                           200.00
---------------Inter-Token Latency----------------
Mean ITL (ms):                           200.00
Median ITL (ms):                         200.00
P90 ITL (ms):                            280.00
P95 ITL (ms):                            290.00
P99 ITL (ms):                            298.00
Max ITL (ms):                            300.00
----------------Cache Hit Details-----------------
Total prompt tokens:                     10
Total cached tokens:                     4
Cache hit rate:                          40.00%
==================================================
warning: look here"""


def test_golden() -> None:
    done = Timeline(
        sent=0.0,
        prompt_tokens=10,
        output_tokens=3,
        cached_tokens=4,
        arrivals=[(0.5, 1), (0.6, 1), (0.9, 1)],
        ended=0.9,
    )
    failed = Timeline(sent=0.0, ended=2.0, error="HTTP 503: full")
    result = {
        "backend": "native",
        "request_rate": None,
        "max_concurrency": 8,
        **summarise([done, failed], 0.0, {"ttft": 600.0}),
        "warnings": ["look here"],
    }
    assert render(result) == GOLDEN
