"""Counters and histograms of the HTTP process, and their Prometheus text.

Comes in: what happened to requests, from runtime/http/stream.py (once per event, so it has to be
cheap: a bisection and two additions) and the engine's `Stats`. Goes out: `/metrics`. Names are
SGLang's with our prefix.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Values
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from runtime.request import Ready, Stats
from runtime.text.sequence import Sequence

PREFIX = "headstart:"
GIB = 1 << 30

# Finer than SGLang's below 100 ms, where small models live; its bounds are all kept.
_SECONDS = (0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8)
TTFT_S: Values[float] = (0.005, 0.01, 0.02, 0.05, *_SECONDS, 10, 20, 40, 60, 80, 100, 200, 400)
E2E_S: Values[float] = (*TTFT_S, 600, 1200, 1800, 2400)
_MS = (0.5, 1, 2, 4, 6, 8, 10, 15, 20, 25, 30, 35, 40, 60, 80)
ITL_S: Values[float] = (*(ms / 1e3 for ms in _MS), *_SECONDS)
TOKENS = (1, 10, 50, 100, 200, 500, 1000, 2000, 4000, 8000, 16000, 32000, 64000, 128000)


class Histogram:
    """Counts per bucket, not cumulative until asked."""

    __slots__ = ("bounds", "counts", "help", "name", "total")

    def __init__(self, name: str, text: str, bounds: Values[float]) -> None:
        self.name = name
        self.help = text
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def family(self, model: str) -> Metric:
        running = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            running += count
            buckets.append(("+Inf" if bound == float("inf") else str(float(bound)), running))
        family = HistogramMetricFamily(PREFIX + self.name, self.help, labels=["model_name"])
        family.add_metric([model], buckets=buckets, sum_value=self.total)
        return family


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of the artifact's weights and of one KV page."""

    weights: int
    page: int


class RequestMetrics:
    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.started = time.time()
        self.ttft = Histogram("time_to_first_token_seconds", "Request to first token.", TTFT_S)
        self.itl = Histogram("inter_token_latency_seconds", "Between tokens.", ITL_S)
        self.tpot = Histogram(
            "request_time_per_output_token_seconds", "Per request, after the first token.", ITL_S
        )
        self.queue = Histogram("queue_time_seconds", "Arrival to first admission.", TTFT_S)
        self.e2e = Histogram("e2e_request_latency_seconds", "Request to last token.", E2E_S)
        self.prompts = Histogram("prompt_tokens_histogram", "Prompt lengths.", TOKENS)
        self.uncached = Histogram(
            "uncached_prompt_tokens_histogram", "Prompt lengths less what was cached.", TOKENS
        )
        self.outputs = Histogram("generation_tokens_histogram", "Output lengths.", TOKENS)
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0
        self.requests = 0
        self.structured = 0  # of them, with a grammar
        self.aborted = 0
        self.http_requests: Counter[str] = Counter()  # by route
        self.http_responses: Counter[tuple[str, int]] = Counter()  # by route and status
        self.http_active = 0

    def received(self, seq: Sequence) -> None:
        self.requests += 1
        self.structured += seq.request.sampling.grammar is not None
        self.prompt_tokens += len(seq.request.tokens)
        self.prompts.observe(len(seq.request.tokens))

    def tokens(self, seq: Sequence, count: int) -> None:
        now = time.perf_counter()
        if seq.first_token_at:
            self.itl.observe((now - seq.last_token_at) / count, count)
        else:
            seq.first_token_at = now
            self.ttft.observe(now - seq.created)
        seq.last_token_at = now
        self.generation_tokens += count

    def admitted(self, queue_s: float) -> None:
        self.queue.observe(queue_s)

    def finished(self, seq: Sequence) -> None:
        if seq.finish is not None and seq.finish["type"] == "abort":
            self.aborted += 1
            return
        self.cached_tokens += seq.cached_tokens
        self.uncached.observe(len(seq.request.tokens) - seq.cached_tokens)
        self.outputs.observe(len(seq.ids))
        self.e2e.observe(seq.finished_at - seq.created)
        if len(seq.ids) > 1:
            decoding = seq.finished_at - seq.first_token_at
            self.tpot.observe(decoding / (len(seq.ids) - 1))

    def abandoned(self) -> None:
        self.aborted += 1


class _Scrape(Collector):
    """One scrape: the numbers as they are now."""

    def __init__(
        self,
        metrics: RequestMetrics,
        model: str,
        stats: Stats | None,
        ready: Ready | None,
        throughput: float,
    ) -> None:
        self._metrics = metrics
        self._model = model
        self._stats = stats
        self._ready = ready
        self._throughput = throughput

    def collect(self) -> Iterable[Metric]:
        m = self._metrics
        latencies = (m.queue, m.ttft, m.itl, m.tpot, m.e2e)
        for histogram in (*latencies, m.prompts, m.uncached, m.outputs):
            yield histogram.family(self._model)
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens received.", m.prompt_tokens),
            ("generation_tokens", "Tokens generated.", m.generation_tokens),
            ("num_requests", "Requests received.", m.requests),
            ("num_so_requests", "Requests with a grammar (structured output).", m.structured),
            ("num_aborted_requests", "Requests that did not end by themselves.", m.aborted),
        ):
            yield self._counter(name, text, value)
        cached = CounterMetricFamily(
            PREFIX + "cached_tokens",
            "Prompt tokens found in the prefix cache.",
            labels=["model_name", "cache_source"],
        )
        cached.add_metric([self._model, "device"], m.cached_tokens)
        yield cached
        cpu = CounterMetricFamily(PREFIX + "process_cpu_seconds", "CPU time of this process.")
        cpu.add_metric([], time.process_time())
        yield cpu
        yield self._gauge("http_requests_active", "HTTP requests under way.", m.http_active)
        yield from self._http()
        if self._stats is not None and self._ready is not None:
            yield from self._engine(self._stats, self._ready)

    def _engine(self, s: Stats, ready: Ready) -> Iterable[Metric]:
        memory = self._metrics.memory
        used = s.pages_used * s.page_size
        cached = s.pages_cached * s.page_size
        total = s.pages_total * s.page_size
        for name, text, value in (
            ("num_running_reqs", "Sequences in the running batch.", s.running),
            ("num_queue_reqs", "Requests waiting.", s.waiting),
            ("num_grammar_queue_reqs", "Requests with a grammar to compile.", s.waiting_grammars),
            ("gen_throughput", "Tokens generated per second, last heartbeat.", self._throughput),
            ("utilization", "Running sequences, of those that fit.", s.running / ready.max_seqs),
            ("token_usage", "Share of the KV pool in use.", used / total if total else 0.0),
            ("num_used_tokens", "KV slots referenced by running sequences.", used),
            ("kv_used_tokens", "KV slots referenced by running sequences.", used),
            ("kv_evictable_tokens", "KV slots only the prefix cache holds.", cached),
            ("kv_available_tokens", "KV slots free.", total - used - cached),
            (
                "cache_hit_rate",
                "Prompt tokens found in the prefix cache, of all.",
                s.cached_tokens / s.prompt_tokens if s.prompt_tokens else 0.0,
            ),
            ("max_total_num_tokens", "KV slots.", total),
            ("page_size", "Tokens in a KV page.", s.page_size),
            ("num_pages", "KV pages.", s.pages_total),
            ("context_len", "Longest sequence.", ready.context),
            ("weight_memory_usage_gb", "GiB of weights.", memory.weights / GIB),
            (
                "kv_cache_memory_usage_gb",
                "GiB of the KV pool.",
                s.pages_total * memory.page / GIB,
            ),
        ):
            yield self._gauge(name, text, value)
        yield self._counter("num_retracted_requests", "Preempted sequences.", s.retractions)
        evicted = s.evicted_pages * s.page_size
        yield self._counter("evicted_tokens", "KV slots taken from the prefix cache.", evicted)
        startup = GaugeMetricFamily(
            PREFIX + "startup_time_seconds", "Start-up by phase.", labels=["phase"]
        )
        for phase, seconds in ready.phases.items():
            startup.add_metric([phase], seconds)
        yield startup

    def _http(self) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            PREFIX + "http_requests", "HTTP requests by route.", labels=["endpoint"]
        )
        for route, count in self._metrics.http_requests.items():
            requests.add_metric([route], count)
        yield requests
        responses = CounterMetricFamily(
            PREFIX + "http_responses",
            "HTTP responses by route and status.",
            labels=["endpoint", "status_code"],
        )
        for (route, status), count in self._metrics.http_responses.items():
            responses.add_metric([route, str(status)], count)
        yield responses

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family


def prometheus_text(
    metrics: RequestMetrics,
    model: str,
    stats: Stats | None,
    ready: Ready | None,
    throughput: float = 0.0,
) -> bytes:
    """`throughput`: generated tokens per second between the engine's last two heartbeats."""
    registry = CollectorRegistry()
    registry.register(_Scrape(metrics, model, stats, ready, throughput))
    return generate_latest(registry)
