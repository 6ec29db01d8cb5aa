"""The printed block of a serving benchmark: labels in 40 columns, the layout scripts know from
SGLang's bench_serving.
"""

from __future__ import annotations

from typing import Any

WIDTH, LABEL = 50, 40

_SECTIONS = (
    ("End-to-End Latency", "E2E Latency", "e2e_latency"),
    ("Time to First Token", "TTFT", "ttft"),
    ("Time per Output Token (excl. 1st token)", "TPOT", "tpot"),
    ("Inter-Token Latency", "ITL", "itl"),
)


def _line(label: str, value: Any) -> str:
    text = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{label + ':':<{LABEL}} {text:<9}".rstrip()


def render(result: dict[str, Any]) -> str:
    """The block for one result of `bench.serving`."""
    rate = result["request_rate"]
    limit = result["max_concurrency"]
    lines = [
        f"{' Serving Benchmark Result ':=^{WIDTH}}",
        _line("Backend", result["backend"]),
        _line("Traffic request rate", "inf" if rate is None else float(rate)),
        _line("Max request concurrency", "not set" if limit is None else limit),
        _line("Successful requests", result["completed"]),
        _line("Failed requests", result["failed"]),
        *(f"  {count} x {reason}" for reason, count in result["failures"].items()),
        _line("Benchmark duration (s)", result["duration"]),
        _line("Total input tokens", result["total_input_tokens"]),
        _line("Total input text tokens", result["total_input_tokens"]),
        _line("Total generated tokens", result["total_output_tokens"]),
    ]
    if "total_output_tokens_retokenized" in result:
        lines.append(
            _line("Total generated tokens (retokenized)", result["total_output_tokens_retokenized"])
        )
    lines += [
        _line("Request throughput (req/s)", result["request_throughput"]),
        _line("Input token throughput (tok/s)", result["input_throughput"]),
        _line("Output token throughput (tok/s)", result["output_throughput"]),
        _line("Peak output token throughput (tok/s)", result["max_output_tokens_per_s"]),
        _line("Peak concurrent requests", result["max_concurrent_requests"]),
        _line("Total token throughput (tok/s)", result["total_throughput"]),
        _line("Concurrency", result["concurrency"]),
    ]
    if "goodput_slos_ms" in result:
        lines += _goodput(result)
    for title, label, key in _SECTIONS:
        lines.append(f"{title:-^{WIDTH}}")
        names = ["mean", "median", "p90", "p95", "p99"] + ["max"] * (key == "itl")
        for name in names:
            lines.append(_line(f"{name.capitalize()} {label} (ms)", result[f"{name}_{key}_ms"]))
    cache = result["cache_report"]
    if cache["total_cached_tokens"]:
        lines += [
            f"{'Cache Hit Details':-^{WIDTH}}",
            _line("Total prompt tokens", cache["total_prompt_tokens"]),
            _line("Total cached tokens", cache["total_cached_tokens"]),
            _line("Cache hit rate", f"{cache['cache_hit_rate_pct']:.2f}%"),
        ]
    lines.append("=" * WIDTH)
    lines += [f"warning: {text}" for text in result["warnings"]]
    return "\n".join(lines)


def _goodput(result: dict[str, Any]) -> list[str]:
    objectives = " ".join(f"{name}:{limit:g}" for name, limit in result["goodput_slos_ms"].items())
    return [
        f"{'Goodput':-^{WIDTH}}",
        _line("SLOs (ms)", objectives),
        _line("Request goodput (req/s)", result["request_goodput"]),
        _line("SLO attainment (%)", 100 * result["slo_attainment"]),
        *(
            _line(f"  {name} attainment (%)", 100 * share)
            for name, share in result["slo_attainment_by_metric"].items()
        ),
    ]
