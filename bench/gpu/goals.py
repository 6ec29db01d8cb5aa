"""The goals of the GPU target, and which of them a run of `bench.gpu` reached.

Comes in: the document that `bench.gpu` writes. Goes out: goal, measured value and whether it holds,
unmeasured ones too. Times are meant for one H200; shares and ratios for any GPU, since both sides
of them come from the same run. The serving goals stand beside what TensorRT-LLM 0.14 publishes for
Llama-3.1-8B in bf16 on one H200.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.gpu.documents import printed
from bench.peers.shape import Shape

MAIN, SMALL = "llama3-8b", "llama3.2-1b"
BUCKETS = 36  # graphs of the goal for a start


class Results:
    """`at(section, model, key, …)`: a number of the document; KeyError where there is none."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self._figures = {
            (r["section"], r["model"]): r["figures"] for r in document["sections"] if "figures" in r
        }

    def at(self, section: str, model: str, *keys: str | int) -> Any:
        found = self._figures[section, model]
        for key in keys:
            found = found[key]
        return found


Find = Callable[[Results], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """`least` or `most`: what the value found must reach."""

    number: str
    text: str
    find: Find
    least: float | None = None
    most: float | None = None

    def holds(self, value: float) -> bool:
        return (self.least is None or value >= self.least) and (
            self.most is None or value <= self.most
        )

    @property
    def limit(self) -> str:
        return f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"


def number(section: str, model: str, *keys: str | int) -> Find:
    return lambda r: float(r.at(section, model, *keys))


def over_ours(peer: str, batch: int) -> Find:
    """A peer's time over ours."""

    def find(r: Results) -> float:
        ours: float = r.at("decode", MAIN, f"batch_{batch}", "ms")
        theirs: float = r.at("peers", MAIN, f"{peer}_batch_{batch}_ms")
        return theirs / ours

    return find


def prefill_share(length: int) -> Find:
    """Per cent of the time the products take at the measured peak."""

    def find(r: Results) -> float:
        tokens = r.at("prefill", MAIN, f"tokens_{length}", "tokens")
        floor = prefill_flops(Shape.load(MAIN), tokens) / r.at("calls", MAIN, "peak_tflops") / 1e12
        ms: float = r.at("prefill", MAIN, f"tokens_{length}", "ms")
        return 1e5 * floor / ms

    return find


def prefill_flops(shape: Shape, tokens: int) -> float:
    """Of one prompt: products of all tokens with every matrix, with the head of the last alone;
    attention's two products, half of them masked."""
    weights = dict(shape.tensors())
    matrices = sum(s[0] * s[1] for name, s in weights.items() if len(s) == 2 and ".layers." in name)
    head = shape.vocab * shape.dim
    attention = 2 * shape.layers * shape.heads * shape.head_dim * tokens * (tokens + 1)
    return 2.0 * (matrices * tokens + head) + attention


def tokens_differ(r: Results) -> float:
    return float(r.at("tokens", "", "tokens") - r.at("tokens", "", "equal"))


def without_weights(r: Results) -> float:
    seconds = r.at("startup", MAIN)
    return float(seconds["first token"] - (seconds["engine weights"] - seconds["engine arenas"]))


def all_graphs_ms(r: Results) -> float:
    """Of BUCKETS graphs, by the mean of those there are."""
    figures = r.at("restore", MAIN)
    return float(1e3 * figures["all_plans_s"] / figures["plans"] * BUCKETS)


def attention(*keys: str) -> Find:
    """Of the longest prompt."""
    return lambda r: float(r.at("calls", MAIN, "prefill", -1, keys[0]))


def attention_over_torch(r: Results) -> float:
    longest = r.at("calls", MAIN, "prefill", -1)
    return float(longest["tflops"] / longest["torch_tflops"])


GOALS = (
    Goal(number="-", text="kernels' cases that are wrong on the device",
         find=number("contracts", "", "failed"), most=0),
    Goal(number="-", text="tokens that differ from the CPU's", find=tokens_differ, most=0),
    Goal(number="-", text="probes that failed", find=number("probes", "", "failed"), most=0),
    Goal(number="G1", text="8B bf16 decode, batch 1, ms",
         find=number("decode", MAIN, "batch_1", "ms"), most=3.95),
    Goal(number="G1", text="8B bf16 decode, batch 1, % of bandwidth bound",
         find=number("decode", MAIN, "batch_1", "bound_pct"), least=89),
    Goal(number="G1", text="torch.compile with static cache / ours, batch 1",
         find=over_ours("compiled", 1), least=1.10),
    Goal(number="G1", text="transformers with static cache / ours, batch 1",
         find=over_ours("transformers", 1), least=1.5),
    Goal(number="G2", text="1B bf16 decode, batch 1, ms",
         find=number("decode", SMALL, "batch_1", "ms"), most=0.75),
    Goal(number="G3", text="8B fp8 decode, batch 1, ms",
         find=number("decode", f"{MAIN}/fp8", "batch_1", "ms"), most=2.2),
    Goal(number="G3", text="8B int4 decode, batch 1, ms",
         find=number("decode", f"{MAIN}/int4", "batch_1", "ms"), most=1.5),
    *(
        Goal(number="G4", text=f"8B bf16 decode, batch {batch}, % of bandwidth bound",
             find=number("decode", MAIN, f"batch_{batch}", "bound_pct"), least=85)
        for batch in (8, 32, 128, 256)
    ),
    Goal(number="G4", text="torch.compile with static cache / ours, batch 8",
         find=over_ours("compiled", 8), least=1.15),
    *(
        Goal(number="G5", text=f"8B bf16 prefill of {length} tokens, % of the measured peak",
             find=prefill_share(length), least=80)
        for length in (1024, 4096, 8192)
    ),
    *(
        goal
        for rate, ttft, itl, their_ttft, their_itl in (
            (8, 22, 6, 24, 7), (16, 25, 8, 27, 9), (32, 40, 14, 44, 16),
        )
        for goal in (
            Goal(number="G7", text=f"TTFT at {rate} requests/s, ms (TensorRT-LLM: {their_ttft})",
                 find=number("serving", MAIN, f"rate_{rate}", "median_ttft_ms"), most=ttft),
            Goal(number="G7", text=f"ITL at {rate} requests/s, ms (TensorRT-LLM: {their_itl})",
                 find=number("serving", MAIN, f"rate_{rate}", "median_itl_ms"), most=itl),
        )
    ),
    Goal(number="G7", text="output tokens/s, unlimited rate (TensorRT-LLM: 10121)",
         find=number("serving", MAIN, "unlimited", "output_throughput"), least=12000),
    Goal(number="G9", text="products, cuBLAS / ours, geometric mean, >= 512 rows",
         find=number("calls", MAIN, "many_rows_over_cublas"), least=0.97),
    Goal(number="G9", text="products, cuBLAS / ours, geometric mean, <= 64 rows",
         find=number("calls", MAIN, "few_rows_over_cublas"), least=1.05),
    *(
        Goal(number="G9", text=f"8B fp8dq products, torch's _scaled_mm / ours, {rows} rows",
             find=number("calls", f"{MAIN}/fp8dq", f"{name}_over_scaled_mm"), least=0.95)
        for rows, name in ((">= 512", "many_rows"), ("<= 64", "few_rows"))
    ),
    Goal(number="G10", text="attention of a prompt, TFLOP/s",
         find=attention("tflops"), least=470),
    Goal(number="G10", text="attention of a prompt, ours / torch's fused one",
         find=attention_over_torch, least=0.85),
    Goal(number="G10", text="attention in decode, % of measured bandwidth",
         find=number("calls", MAIN, "decode", "share_pct"), least=85),
    Goal(number="G10", text="attention of a skewed batch, static split / ours",
         find=number("calls", MAIN, "skewed", "ratio"), least=1.5),
    Goal(number="G11", text="sampling by top-p of 128 rows, us",
         find=number("calls", MAIN, "sampling", "us"), most=45),
    Goal(number="G11", text="sampling by top-p, torch's sort / ours",
         find=number("calls", MAIN, "sampling", "ratio"), least=3),
    Goal(number="G12", text="process start to first token, 8B bf16, s",
         find=number("startup", MAIN, "first token"), most=3.0),
    Goal(number="G12", text="the same without the weights' copy, s",
         find=without_weights, most=1.0),
    Goal(number="G13", text=f"{BUCKETS} graphs restored, ms (by the mean)",
         find=all_graphs_ms, most=150),
    Goal(number="G13", text="slowest graph restored, ms",
         find=lambda r: 1e3 * float(r.at("restore", MAIN, "slowest_plan_s")), most=4),
)  # fmt: skip


def reached(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a goal: `measured` is null and `holds` says `unmeasured` where nothing was found."""
    results, rows = Results(document), []
    for goal in GOALS:
        row: dict[str, Any] = {"number": goal.number, "goal": goal.text, "limit": goal.limit}
        try:
            value = goal.find(results)
        except (KeyError, IndexError, TypeError, ZeroDivisionError):
            rows.append({**row, "measured": None, "holds": "unmeasured"})
        else:
            rows.append({**row, "measured": value, "holds": "yes" if goal.holds(value) else "no"})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    width = max(len(row["goal"]) for row in rows)
    lines = [f"{'':<4} {'goal':<{width}} {'limit':>9} {'measured':>10}  holds"]
    for row in rows:
        value = "-" if row["measured"] is None else f"{row['measured']:.4g}"
        head = f"{row['number']:<4} {row['goal']:<{width}} {row['limit']:>9}"
        lines.append(f"{head} {value:>10}  {row['holds']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(printed("goals", lambda document: table(reached(document))))
