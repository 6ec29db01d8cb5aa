"""Where the decode steps of a batch spend their time: by kind of node of the plan, and by phase of
the engine loop. What `bench.latency profile=true` prints and records.

A kind is a node's label without the number of its layer, as in the section nodes of `make gpu`.
There every kind is replayed alone, as one graph; here the plan loop of the CPU reads the clock
after every node of the steps themselves.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from statistics import mean
from typing import Any

from bench.bandwidth import Bandwidth, Rate
from bench.errors import BenchUsage
from bench.static_batch import StaticBatch
from runtime.artifact import PARAM_ADDRESS, Artifact, LaunchPlan, node_kind
from runtime.device.base import Session
from runtime.device.cpu import CpuSession, PlanTimes
from runtime.plan import ARENAS

READS_PAGES = ("attention", "mla_attention")  # ops that read the keys and values of every context
LOOKS_UP = ("embed", "embed_positions")  # ops that read a few rows of their tables


def profiled(session: Session, artifact: Artifact) -> CpuSession:
    """The session, where it can be profiled."""
    if not isinstance(session, CpuSession):
        raise BenchUsage(
            "profile=true: the plan loop of the CPU times the nodes of a step, artifact "
            f"{artifact.path} is for {artifact.manifest.target.kind}; leave it out (`make gpu "
            "sections=[nodes]` times the kinds of node of a GPU)"
        )
    return session


class Laps:
    """Seconds of every phase of the engine loop, one number per time it was passed."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._last = time.perf_counter()

    def mark(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase].append(now - self._last)
        self._last = now

    def restart(self) -> None:
        self._last = time.perf_counter()


def profile(
    static: StaticBatch,
    artifact: Artifact,
    buffer: Bandwidth,
    prompts: list[list[int]],
    output_len: int,
) -> dict[str, Any]:
    """One run of a batch, its decode without pauses."""
    session, laps = profiled(static.session, artifact), Laps()
    times: list[dict[str, PlanTimes]] = []
    rates: list[Rate] = []
    ahead = 0
    with session.profiling() as read:
        unheard = static.loop.mark

        def pause() -> None:  # before and after the decode
            nonlocal ahead
            ahead = static.loop.in_flight
            static.loop.mark = unheard
            times.append(read())
            rates.append(buffer.read())
            if len(rates) == 1:
                laps.restart()
                static.loop.mark = laps.mark

        static.run(prompts, output_len, pause, every=output_len)
    context = len(prompts[0]) + output_len / 2
    nodes, native, steps = by_kind(artifact, times[0], times[-1], len(prompts), context)
    waited = steps - ahead  # the last plan ran on after the last phase
    phases = {name: sum(seconds) / waited * 1e6 for name, seconds in laps.seconds.items()}
    return {
        "steps": steps,
        "step_us": sum(phases.values()),
        "native_us": native * 1e6,
        "between_nodes_us": native * 1e6 - sum(n["us"] for n in nodes.values()),
        "nodes": nodes,
        "host_us": phases,
        "bandwidth": mean(rate.median for rate in rates),
    }


def by_kind(
    artifact: Artifact,
    before: Mapping[str, PlanTimes],
    after: Mapping[str, PlanTimes],
    batch: int,
    context: float,
) -> tuple[dict[str, dict[str, float]], float, int]:
    """Per step: of each kind of node how many there are, their microseconds together and the bytes
    they must read; and of the whole plan its seconds. And how many steps there were. Means over the
    steps between two readings, the kinds in the order of the plan.
    """
    steps = sum(after[name].steps - before[name].steps for name in after)
    out: dict[str, dict[str, float]] = {}
    native = 0.0
    for name, of in after.items():
        ran = of.steps - before[name].steps
        if not ran:
            continue
        plan = artifact.plan(0, name)
        native += (of.total - before[name].total) / steps
        seconds = (of.nodes - before[name].nodes) / steps
        read = node_bytes(artifact, plan, batch, context)
        for label, taken, size in zip(plan.header.labels, seconds.tolist(), read, strict=True):
            of_kind = out.setdefault(node_kind(label), {"nodes": 0.0, "us": 0.0, "bytes": 0.0})
            of_kind["nodes"] += ran / steps
            of_kind["us"] += taken * 1e6
            of_kind["bytes"] += size * ran / steps
    return out, native, steps


def node_bytes(artifact: Artifact, plan: LaunchPlan, batch: int, context: float) -> list[float]:
    """What each node of a decode step must read: the weights it points to (of a looked-up table
    next to nothing), or its share of the keys and values of `batch` contexts. Their sum is
    `static_batch.step_bytes`, but for the padding between tensors.
    """
    manifest = artifact.manifest
    sizes = {tensor.offset: tensor.size for tensor in manifest.tensors[0]}
    ops = [label.split()[0] for label in plan.header.labels]
    kv = batch * context * manifest.state.page_bytes / manifest.state.page_size
    readers = sum(op in READS_PAGES for op in ops)
    out = []
    for op, node in zip(ops, plan.nodes, strict=True):
        params = plan.params[node["first_param"] : node["first_param"] + node["params"]]
        weights = params[
            (params["kind"] == PARAM_ADDRESS) & (params["arena"] == ARENAS.index("weights"))
        ]
        read = 0.0 if op in LOOKS_UP else float(sum(sizes[at] for at in weights["value"].tolist()))
        out.append(read + (kv / readers if op in READS_PAGES else 0.0))
    return out


def table(result: Mapping[str, Any]) -> list[str]:
    """The lines for people, of what `profile` gives."""
    native = result["native_us"]

    def row(name: str, us: float, of: Mapping[str, float] | None = None) -> str:
        line = f"  {name:<24}{us:>9.1f}{100 * us / native:>8.1f} %"
        if of is None:
            return line
        rate = f"{of['bytes'] / us / 1e3:>8.1f}" if of["bytes"] else f"{'-':>8}"
        return line + f"{of['nodes']:>7.0f}{of['bytes'] / 1e6:>10.2f}{rate}"

    host = ", ".join(f"{name} {us:.1f}" for name, us in result["host_us"].items())
    return [
        f"Profile. {result['steps']} decode steps, {result['step_us']:.1f} us each, of which the "
        f"plan {native:.1f}; memory gave {result['bandwidth'] / 1e9:.2f} GB/s",
        f"  {'kind of node':<24}{'us':>9}{'of plan':>10}{'nodes':>7}{'MB':>10}{'GB/s':>8}",
        *(row(name, of["us"], of) for name, of in result["nodes"].items()),
        row("between nodes", result["between_nodes_us"]),
        row("between plans", result["step_us"] - native),
        f"  engine loop, us: {host}",
    ]
