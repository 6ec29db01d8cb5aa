"""The peer comparison as a table and as result lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.bandwidth import Rate
from bench.peers.workloads import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One peer on one workload: median and best seconds per timing."""

    precision: str
    peer: str
    workload: Workload
    seconds: float
    best_seconds: float
    version: str
    read_bytes: float  # that one timing of a decode must read: all weights and the contexts
    share_of_bound: float | None = None  # median over decode runs; prefill is not bound by reads

    @property
    def tokens_per_second(self) -> float:
        return self.workload.tokens / self.seconds


def render(figures: list[Figures], rate: Rate, weight_bytes: float, name: str) -> str:
    """One block per precision; `name` of the shape; ratios are ours over the peer's."""
    precision = figures[0].precision
    lines = [
        "",
        f"{name} {precision}: tokens/s, median of all steps; read bandwidth "
        f"{rate.best / 1e9:.1f} GB/s (median {rate.median / 1e9:.1f}) "
        f"over {weight_bytes / 1e6:.0f} MB",
        f"{'workload':<26}{'peer':<14}{'tok/s':>10}{'best':>10}{'% of bound':>12}{'ours/peer':>11}",
    ]
    for workload in dict.fromkeys(f.workload for f in figures):
        rows = [f for f in figures if f.workload == workload]
        ours = next((f for f in rows if f.peer == "headstart"), None)
        for f in rows:
            share = "-" if f.share_of_bound is None else f"{100 * f.share_of_bound:.0f} %"
            ratio = "-" if ours is None or ours is f else f"{f.seconds / ours.seconds:.2f}x"
            lines.append(
                f"{workload.label if f is rows[0] else '':<26}{f.peer:<14}"
                f"{f.tokens_per_second:>10.1f}{workload.tokens / f.best_seconds:>10.1f}"
                f"{share:>12}{ratio:>11}"
            )
    return "\n".join(lines)


def result_lines(figures: list[Figures], rates: dict[str, Rate]) -> list[dict[str, Any]]:
    return [
        {
            "precision": f.precision,
            "peer": f.peer,
            "version": f.version,
            "workload": f.workload.label,
            "batch": f.workload.batch,
            "context": f.workload.context,
            "median_seconds": f.seconds,
            "best_seconds": f.best_seconds,
            "tokens_per_second": f.tokens_per_second,
            "read_bytes": f.read_bytes,
            "share_of_bound": f.share_of_bound,
            "bandwidth_best": rates[f.precision].best,
            "bandwidth_median": rates[f.precision].median,
        }
        for f in figures
    ]
