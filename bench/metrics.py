"""From the timelines of requests to the figures of a serving benchmark. Pure: seconds in,
milliseconds and rates out.

Definitions (those of SGLang's bench_serving): TTFT = first token − send; TPOT = (latency − TTFT) /
(tokens − 1) for requests of more than one token; ITL = gaps between arrivals that carry tokens;
concurrency = Σ latency / duration; peak output = the busiest second of the run. Failed requests
count no tokens and no latency, but they are counted, with their reasons.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PERCENTILES = (90, 95, 99)


@dataclass(slots=True, kw_only=True)
class Timeline:
    """One request. Times are seconds of one clock; `arrivals` are (time, new tokens) of every
    message that carried tokens."""

    sent: float
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    arrivals: list[tuple[float, int]] = field(default_factory=list)
    ended: float = 0.0
    error: str | None = None
    text: str = ""

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def latency(self) -> float:
        return self.ended - self.sent

    @property
    def ttft(self) -> float:
        """Only of a request with arrivals."""
        return self.arrivals[0][0] - self.sent

    @property
    def tpot(self) -> float | None:
        if self.output_tokens < 2:
            return None
        return (self.latency - self.ttft) / (self.output_tokens - 1)

    @property
    def itls(self) -> list[float]:
        times = [t for t, _ in self.arrivals]
        return [b - a for a, b in itertools.pairwise(times)]


def spread(name: str, seconds: Sequence[float], *, largest: bool = False) -> dict[str, float]:
    """Mean, median, std and percentiles of `seconds`, in ms; zeros when there are none."""
    values = np.asarray(seconds if len(seconds) else [0.0], dtype=np.float64) * 1000
    out = {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
    }
    for p in PERCENTILES:
        out[f"p{p}_{name}_ms"] = float(np.percentile(values, p))
    if largest:
        out[f"max_{name}_ms"] = float(values.max())
    return out


def peak_tokens_per_second(requests: Sequence[Timeline], start: float) -> float:
    """Tokens that arrived in the busiest whole second since `start`."""
    seconds: Counter[int] = Counter()
    for request in requests:
        for time, tokens in request.arrivals:
            seconds[int(time - start)] += tokens
    return float(max(seconds.values(), default=0))


def peak_concurrency(requests: Sequence[Timeline]) -> int:
    """Most requests in flight at one moment."""
    changes = sorted(
        [(r.sent, 1) for r in requests] + [(r.ended, -1) for r in requests],
        key=lambda change: (change[0], change[1]),
    )
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def goodput(
    requests: Sequence[Timeline], duration: float, objectives: dict[str, float]
) -> dict[str, Any]:
    """Share of all requests sent that met every objective (milliseconds; keys ttft, tpot, e2el),
    and of each alone."""
    met: dict[str, int] = dict.fromkeys(objectives, 0)
    good = 0
    for request in requests:
        if not request.ok or not request.arrivals:
            continue
        values = {"ttft": request.ttft, "tpot": request.tpot or 0.0, "e2el": request.latency}
        hits = [name for name, limit in objectives.items() if values[name] * 1000 <= limit]
        for name in hits:
            met[name] += 1
        good += len(hits) == len(objectives)
    sent = max(1, len(requests))
    return {
        "goodput_slos_ms": objectives,
        "request_goodput": good / duration,
        "slo_attainment": good / sent,
        "slo_attainment_by_metric": {name: count / sent for name, count in met.items()},
    }


def summarise(
    requests: Sequence[Timeline], start: float, objectives: dict[str, float] | None = None
) -> dict[str, Any]:
    """All figures of a run that began at `start`."""
    done = [r for r in requests if r.ok]
    duration = max((r.ended for r in requests), default=start) - start
    duration = max(duration, 1e-9)
    prompt, output = sum(r.prompt_tokens for r in done), sum(r.output_tokens for r in done)
    cached = sum(r.cached_tokens for r in done)
    with_tokens = [r for r in done if r.arrivals]
    tpots = [t for r in with_tokens if (t := r.tpot) is not None]
    return {
        "duration": duration,
        "completed": len(done),
        "failed": len(requests) - len(done),
        "failures": dict(Counter(r.error for r in requests if r.error is not None).most_common()),
        "total_input_tokens": prompt,
        "total_input_text_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(done) / duration,
        "input_throughput": prompt / duration,
        "output_throughput": output / duration,
        "total_throughput": (prompt + output) / duration,
        "max_output_tokens_per_s": peak_tokens_per_second(done, start),
        "max_concurrent_requests": peak_concurrency(requests),
        "concurrency": sum(r.latency for r in done) / duration,
        **spread("e2e_latency", [r.latency for r in done]),
        **spread("ttft", [r.ttft for r in with_tokens]),
        **spread("tpot", tpots),
        **spread("itl", [gap for r in with_tokens for gap in r.itls], largest=True),
        "cache_report": {
            "total_prompt_tokens": prompt,
            "total_cached_tokens": cached,
            "cache_hit_rate_pct": 100 * cached / max(1, prompt),
        },
        **(goodput(requests, duration, objectives) if objectives else {}),
    }
