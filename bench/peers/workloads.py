"""The workloads of the peer comparison: decode at (batch, context) and prefill of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.windows import windows
from conf.bench_schema import PeersConfig

WARM_STEPS = 2  # first steps of a decode run: caches and threads wake up


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`batch` 0: a prefill of `context` tokens; otherwise a decode step of `batch` sequences that
    hold `context` tokens each.
    """

    batch: int
    context: int

    @property
    def tokens(self) -> int:
        """Tokens that one timing stands for."""
        return self.batch or self.context

    @property
    def label(self) -> str:
        if self.batch:
            return f"decode batch {self.batch} at {self.context}"
        return f"prefill {self.context}"

    def command(self, steps: int) -> dict[str, Any]:
        if self.batch:
            return {
                "do": "decode",
                "batch": self.batch,
                "context": self.context,
                "steps": steps + WARM_STEPS,
            }
        return {"do": "prefill", "tokens": self.context}

    def seconds(self, answer: dict[str, Any]) -> list[float]:
        """The timings of a worker's answer that count."""
        if self.batch:
            return windows([float(s) for s in answer["steps"][WARM_STEPS:]])
        return [float(answer["seconds"])]


def workloads(config: PeersConfig) -> list[Workload]:
    decode = [Workload(batch=b, context=c) for b in config.batch for c in config.context]
    return decode + [Workload(batch=0, context=tokens) for tokens in config.prefill]
