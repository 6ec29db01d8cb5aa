"""Two result files side by side: `python -m bench.compare before=a.jsonl after=b.jsonl`.

Results of the same benchmark and the same setting are paired (medians when a setting was measured
more than once). Out: a table of ratios; exit code 1 when a metric got worse by more than the
threshold, 2 when there is nothing to compare.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from bench import results
from bench.errors import BenchError, BenchUsage
from conf.bench_schema import CompareConfig
from conf.load import run

# What makes two results comparable, and which figures are compared (True: more is better).
SETTINGS: dict[str, tuple[str, ...]] = {
    "latency": ("batch_size", "input_len", "output_len", "threads"),
    "serving": (
        *("backend", "dataset_name", "request_rate", "max_concurrency", "num_prompts"),
        *("random_input_len", "random_output_len", "random_range_ratio"),
    ),
    "startup": (),
    "streaming": ("backend", "streams", "tokens"),
    "peers": ("model", "threads", "precision", "peer", "workload"),
}
METRICS: dict[str, dict[str, bool]] = {
    "latency": {"prefill_latency": False, "median_decode_latency": False},
    "serving": {
        "output_throughput": True,
        "median_ttft_ms": False,
        "median_tpot_ms": False,
        "p99_itl_ms": False,
        "failed": False,
    },
    "startup": {"ready": False, "first token": False},
    "streaming": {"cpu_us_per_token": False},
    "peers": {"tokens_per_second": True},
}

Key = tuple[tuple[str, Any], ...]


def flatten(line: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """One flat result per setting."""
    if line.get("bench") == "peers":
        for entry in line["results"]:
            yield {**line, **entry}
    elif line.get("bench") == "startup":
        yield {**line, **line["median_seconds"]}
    else:
        yield line


def by_setting(lines: Iterable[dict[str, Any]]) -> dict[Key, list[dict[str, Any]]]:
    found: dict[Key, list[dict[str, Any]]] = {}
    for line in lines:
        for result in flatten(line):
            bench = result.get("bench")
            if bench not in SETTINGS:
                raise BenchError(f"unknown kind of result {bench!r}; known: {', '.join(SETTINGS)}")
            key = (("bench", bench), *((name, result.get(name)) for name in SETTINGS[bench]))
            found.setdefault(key, []).append(result)
    return found


def change(before: float, after: float, more_is_better: bool) -> float:
    """Relative worsening: 0.1 is ten per cent worse, negative is better."""
    if before == after:
        return 0.0
    if more_is_better:
        return before / after - 1 if after else float("inf")
    return after / before - 1 if before else float("inf")


def compare(
    before: list[dict[str, Any]], after: list[dict[str, Any]], config: CompareConfig
) -> tuple[list[str], int]:
    """Table lines and the number of regressions."""
    old, new = by_setting(before), by_setting(after)
    common = [key for key in old if key in new]
    if not common:
        raise BenchError(
            f"{config.before} and {config.after} have no setting in common: nothing to compare"
        )
    lines = [f"{'':<4}{'metric':<24}{'before':>12}{'after':>12}{'ratio':>9}"]
    worse = 0
    for key in common:
        lines.append(" ".join(f"{name}={value}" for name, value in key if value is not None))
        bench = key[0][1]
        wanted = METRICS[bench]
        unknown = [m for m in config.metrics if all(m not in r for r in old[key])]
        if unknown:
            raise BenchUsage(f"metrics: {unknown[0]!r} is not in {config.before} for {bench}")
        for metric in config.metrics or wanted:
            a, b = (median(float(r[metric]) for r in rows[key]) for rows in (old, new))
            worsening = change(a, b, wanted.get(metric, metric.endswith("throughput")))
            bad = worsening > config.threshold
            worse += bad
            ratio = f"{b / a:.3f}" if a else "-"
            lines.append(f"{'':<4}{metric:<24}{a:>12.4g}{b:>12.4g}{ratio:>9}{' WORSE' * bad}")
    for name, rows, others in ((config.before, old, new), (config.after, new, old)):
        missing = sum(key not in others for key in rows)
        if missing:
            lines.append(f"{missing} settings only in {name}")
    return lines, worse


def main(config: CompareConfig, sources: Mapping[str, str]) -> int:
    lines, worse = compare(results.read(config.before), results.read(config.after), config)
    print("\n".join(lines))
    if worse:
        print(f"{worse} metrics worse by more than {config.threshold:.0%}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(run(CompareConfig, "bench/compare", main))
